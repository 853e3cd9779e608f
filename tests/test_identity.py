"""Whatever is changed in a run, a checkpoint or a base: every command that reads it refuses it, by whichever path."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from safetensors.torch import load_file, save_file
from typer.testing import Result

from loratune.errors import Exit
from loratune.runs.manifest import read_manifest, write_manifest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLI = Callable[..., Result]
Change = Callable[[Path], Any]
COMMANDS: dict[str, tuple[str, ...]] = {
    "infer": ("infer", "--prompt", "hi", "--max-new-tokens", "2"),
    "serve": ("serve", "--port", "0", "--no-api-key"),
    "merge": ("merge",),
    "merge without logits": ("merge", "--no-logits"),
    "merge without proof": ("merge", "--no-verify"),
    "export adapter": ("export", "--format", "adapter"),
    "export vllm": ("export", "--format", "vllm"),
    "export gguf": ("export", "--format", "gguf"),
}
READS_ONLY = ("infer", "serve")


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(short_run, tmp_path / "run"))


@pytest.fixture
def base(random_qwen: Path, tmp_path: Path) -> Path:
    """A copy of its base."""
    return Path(shutil.copytree(random_qwen, tmp_path / "base"))


@pytest.fixture
def done(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command on an adapter; a server is not left running."""
    monkeypatch.setattr("loratune.generation.server.running.run", lambda *_: None)

    def call(command: str, adapter: Path, *flags: Any) -> Result:
        output = () if command in READS_ONLY else ("--output", tmp_path / "out" / "made")
        return cli(*COMMANDS[command], "--adapter", adapter, *output, *flags, env={"COLUMNS": "20000"})

    return call


@pytest.fixture
def refused(done: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """Run a command that has to end with exit code 4 and one message, and to leave nothing."""

    def call(command: str, adapter: Path, *flags: Any) -> str:
        (tmp_path / "out").mkdir(exist_ok=True)
        before = tree(tmp_path)
        result = done(command, adapter, *flags)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, ""), result.stderr or repr(result.exception)
        assert result.stderr.count("error: ") == 1
        assert tree(tmp_path) == before
        return " ".join(result.stderr.split())

    return call


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, as somebody would who does not compute its seal anew."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_manifest(change: Callable[[dict[str, Any]], Any], is_old: bool = False) -> Change:
    """A changed manifest; one of an earlier version has no hash of its own."""

    def edited(run: Path) -> None:
        edit(run / "manifest.json", lambda values: (values.pop("sha256") if is_old else None, change(values)))

    return edited


def replace(name: str, old: str, new: str) -> Change:
    """A changed text."""

    def replaced(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return replaced


def zero_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300] + bytes(300))


# What was changed → how, what is said of it, and the commands that let it through before all came by one function.
IN_A_RUN: dict[str, tuple[Change, str]] = {
    "system prompt": (replace("recipe.yaml", "system: null", "system: Be rude."), "recipe.yaml; restore"),
    "template": (replace("recipe.yaml", "template: chat", "template: alpaca"), "recipe.yaml; restore"),
    "quantization": (replace("recipe.yaml", "quantization: none", "quantization: nf4"), "recipe.yaml; restore"),
    "rank": (replace("recipe.yaml", "rank: 16", "rank: 64"), "recipe.yaml; restore"),
    "a comment": (replace("recipe.yaml", "model:", "# mine\nmodel:"), "copy it and give the copy to sft"),
    "recipe cut": (lambda run: (run / "recipe.yaml").write_text("model:"), "recipe.yaml; restore"),
    "recipe gone": (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml; restore"),
    "hash of the template": (edit_manifest(lambda v: v["template"].update(sha256="0" * 64)), "manifest.json: has been"),
    "the same, old": (edit_manifest(lambda v: v["template"].update(sha256="0" * 64), True), "prompt template is not"),
    "end token": (edit_manifest(lambda v: v["template"].update(end_token_id=5)), "manifest.json: has been changed"),
    "files emptied": (edit_manifest(lambda v: v.update(files={})), "manifest.json: has been changed"),
    "files removed": (edit_manifest(lambda v: v.pop("files")), "manifest.json: has been changed"),
    "files emptied, old": (edit_manifest(lambda v: v.update(files={}), True), "does not say what the run's files were"),
    "files removed, old": (edit_manifest(lambda v: v.pop("files"), True), "does not say what the run's files were"),
    "a file elsewhere, old": (
        edit_manifest(lambda v: v["files"].update({"adapter/../../x": {}}), True), "what the run's files were"
    ),
    "recipe unsealed, old": (edit_manifest(lambda v: v["files"].pop("recipe.yaml"), True), "what the run's files were"),
    "weights unsealed, old": (edit_manifest(lambda v: v["files"].pop(f"adapter/{WEIGHTS}"), True), "(added)"),
    "hashes of the base, old": (
        edit_manifest(lambda v: [v["base"].pop(key) for key in list(v["base"]) if "sha256" in key], True),
        "is another model",
    ),
    "manifest gone": (lambda run: (run / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "weights": (lambda run: zero_the_end(run / "adapter" / WEIGHTS), f"adapter/{WEIGHTS}; restore"),
    "alpha": (lambda run: edit(run / "adapter" / CONFIG, lambda v: v.update(lora_alpha=64)), f"adapter/{CONFIG}"),
    "probe rows": (replace("probe.json", "rows", "Rows"), "probe.json; restore"),
    "probe rows gone": (lambda run: (run / "probe.json").unlink(), "probe.json; restore"),
    "a template added": (lambda run: (run / "adapter" / "added_tokens.json").write_text("{}"), "tokens.json (added)"),
}  # fmt: skip


@pytest.mark.parametrize("change", IN_A_RUN)
@pytest.mark.parametrize("command", ["infer", "merge without proof", "export vllm"])
def test_a_changed_run_is_refused_by_every_command(
    refused: Callable[..., str], run: Path, change: str, command: str
) -> None:
    apply, words = IN_A_RUN[change]
    apply(run)
    for adapter in (run, run / "adapter"):
        assert words in refused(command, adapter)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_manifest_without_a_seal_is_told_once(done: Callable[..., Result], run: Path, command: str) -> None:
    edit_manifest(lambda _: None, True)(run)
    result = done(command, run)
    assert result.exit_code == 0, result.stderr or repr(result.exception)
    told = " ".join(result.stderr.split())
    assert told.count(f"warning: {run}: its manifest.json carries no seal") == 1


def test_runs_of_earlier_versions_have_not_sealed_their_probe_rows(done: Callable[..., Result], run: Path) -> None:
    edit_manifest(lambda values: values["files"].pop("probe.json"), True)(run)
    (run / "probe.json").unlink()
    result = done("merge", run)
    assert result.exit_code == 0, result.stderr
    verification = run.parent / "out" / "made" / "verification.json"
    assert json.loads(verification.read_text())["compared_on"] == "built-in questions"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_comes_by_the_same_checks(refused: Callable[..., str], run: Path, command: str) -> None:
    (run / "link").symlink_to("adapter")
    IN_A_RUN["system prompt"][0](run)
    for adapter in (run, run / "adapter", run / "link", run / "checkpoints" / "step-000004"):
        assert "recipe.yaml; restore" in refused(command, adapter)


@pytest.mark.parametrize("command", ["infer", "merge", "export adapter", "export gguf"])
def test_what_is_let_through_is_told(done: Callable[..., Result], run: Path, tmp_path: Path, command: str) -> None:
    IN_A_RUN["a comment"][0](run)
    result = done(command, run, "--force")
    assert result.exit_code == 0, result.stderr
    assert "warning: changed since the run ended: recipe.yaml" in result.stderr


def test_files_that_nothing_reads_may_lie_in_a_run(done: Callable[..., Result], run: Path) -> None:
    others = ("status.json", "notes.txt", "adapter/notes.txt", "adapter/modeling.py", "checkpoints/step-000004/x.py")
    for name in others:
        (run / name).write_text("mine")
    for adapter in (run, run / "adapter", run / "checkpoints" / "step-000004"):
        result = done("infer", adapter)
        assert (result.exit_code, result.stderr.count("warning")) == (0, 0), result.stderr


def test_an_adapter_that_was_copied_out_of_its_run_is_a_plain_one(
    done: Callable[..., Result], run: Path, tmp_path: Path, random_qwen: Path
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "copy")
    result = done("infer", tmp_path / "copy", "--base-model", random_qwen)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning") == 1
    assert "no loratune manifest: base and prompt template could not be checked" in result.stderr


# --- checkpoints ---

IN_A_CHECKPOINT: dict[str, tuple[Change, str]] = {
    "weights": (lambda folder: zero_the_end(folder / WEIGHTS), f"{WEIGHTS} has been changed"),
    "alpha": (lambda folder: edit(folder / CONFIG, lambda v: v.update(lora_alpha=64)), CONFIG),
    "optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "seal": (lambda folder: edit(folder / "checkpoint.json", lambda v: v.update(step=3)), "has been changed"),
    "seal gone": (lambda folder: (folder / "checkpoint.json").unlink(), "no checkpoint.json in it"),
    "a tokenizer added": (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "added since it was"),
}


@pytest.mark.parametrize("change", IN_A_CHECKPOINT)
@pytest.mark.parametrize("command", ["infer", "serve", "merge without proof", "export adapter"])
def test_a_changed_checkpoint_is_refused_by_every_command(
    refused: Callable[..., str], run: Path, tmp_path: Path, random_qwen: Path, change: str, command: str
) -> None:
    checkpoint, copy = run / "checkpoints" / "step-000004", tmp_path / "copy"
    apply, words = IN_A_CHECKPOINT[change]
    apply(checkpoint)
    assert words in refused(command, checkpoint)
    if change != "seal gone":  # without one a copy is a plain adapter
        shutil.copytree(checkpoint, copy)
        assert words in refused(command, copy, "--base-model", random_qwen)


def test_a_checkpoint_is_not_asked_with_settings_that_the_run_has_gone_on_with(
    refused: Callable[..., str], run: Path
) -> None:
    manifest = read_manifest(run)
    assert manifest.record
    prompt = manifest.record.prompt.model_copy(update={"system": "Be rude."})
    write_manifest(run, dataclasses.replace(manifest, record=dataclasses.replace(manifest.record, prompt=prompt)))
    told = refused("merge", run / "checkpoints" / "step-000004")
    assert "prompt.system was None and is 'Be rude.'" in told


@pytest.mark.parametrize("command", ["infer", "merge"])
def test_a_copied_checkpoint_knows_its_base_and_says_what_it_does_not_know(
    done: Callable[..., Result], refused: Callable[..., str], run: Path, tmp_path: Path, base: Path, command: str
) -> None:
    copy = shutil.copytree(run / "checkpoints" / "step-000004", tmp_path / "copy")
    result = done(command, copy, "--base-model", base)
    assert result.exit_code == 0, result.stderr
    assert "its base is checked, its prompt settings are not known" in result.stderr
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    scale_all_but_the_middle(base / "model.safetensors")
    assert "weights differ" in refused(command, copy, "--base-model", base)


# --- the base, byte by byte ---


def change_weights(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def reverse_rows(path: Path) -> None:
    """500 rows of the embedding in the other order, far from its middle."""
    name = "model.embed_tokens.weight"
    change_weights(path, lambda w: w.update({name: w[name].clone()}) or w[name][:500].copy_(w[name][:500].flip(0)))


def scale_all_but_the_middle(path: Path) -> None:
    """Every value × 1.2 that a sample of 4096 bytes in the middle of its tensor does not hold."""

    def scale(weights: dict[str, Any]) -> None:
        for name, values in weights.items():
            flat = values.clone().reshape(-1)
            kept = (len(flat) - 1024) // 2
            if kept > 8:
                flat[: kept - 8] *= 1.2
                flat[-(kept - 8) :] *= 1.2
            weights[name] = flat.reshape(values.shape)

    change_weights(path, scale)


def one_in_a_corner(path: Path) -> None:
    def add(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1

    change_weights(path, add)


OTHER_WEIGHTS: dict[str, tuple[Change, str]] = {
    "rows reversed": (reverse_rows, "model.embed_tokens.weight"),
    "scaled": (scale_all_but_the_middle, "model.layers.0.mlp"),
    "one weight": (one_in_a_corner, "in 1 of 26 tensors (model.layers.1.mlp.down_proj.weight)"),
}


@pytest.mark.parametrize("command", ["infer", "merge without proof", "export adapter", "export gguf"])
@pytest.mark.parametrize("change", OTHER_WEIGHTS)
def test_a_base_with_other_weights_anywhere_is_another_base(
    refused: Callable[..., str], done: Callable[..., Result], run: Path, base: Path, change: str, command: str
) -> None:
    from loratune.runs.fingerprint import sampled_fingerprint

    path = base / "model.safetensors"
    before = sampled_fingerprint(base, [path])
    apply, words = OTHER_WEIGHTS[change]
    apply(path)
    assert sampled_fingerprint(base, [path]) == before  # samples do not see it
    told = refused(command, run, "--base-model", base)
    assert "is another model: weights differ in" in told
    assert words in told
    assert "--force" in told


def test_a_run_of_an_earlier_version_knows_its_base_by_samples_and_says_so(
    done: Callable[..., Result], cli: CLI, run: Path, base: Path, tmp_path: Path
) -> None:
    edit_manifest(lambda v: [v["base"].pop(key) for key in ("tensors_sha256", "tensors")], is_old=True)(run)
    result = done("merge", run, "--base-model", base)
    assert result.exit_code == 0, result.stderr
    assert "sampled: 4096 bytes of each tensor" in " ".join(result.stderr.split())
    assert json.loads((tmp_path / "out" / "made" / "verification.json").read_text())["base_checked"] == "sampled"
    shown = cli("runs", "show", run, env={"COLUMNS": "200"})
    assert "identified by samples: 4096 bytes of each tensor" in " ".join(shown.stdout.split())
    assert json.loads(cli("runs", "show", run, "--json").stdout)["base_checked"] == "sampled"


def test_a_run_knows_every_byte_of_its_base_and_says_so(done: Callable[..., Result], cli: CLI, run: Path) -> None:
    result = done("merge", run)
    assert "every byte of its weights compared" in " ".join(result.stderr.split())
    state = json.loads(cli("runs", "show", run, "--json").stdout)
    assert (state["base_checked"], state["changed"]) == ("every byte", [])
    IN_A_RUN["a comment"][0](run)
    shown = cli("runs", "show", run, env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "changed since: recipe.yaml" in " ".join(shown.stdout.split())


# --- adapters that are incomplete ---


@pytest.fixture(scope="module")
def saved(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as PEFT's save_pretrained leaves it; not to be changed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(random_qwen), config)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def plain(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "plain"))


def keep(is_kept: Callable[[str], bool]) -> Change:
    """Leave tensors out."""

    def change(folder: Path) -> None:
        weights = {name: values for name, values in load_file(folder / WEIGHTS).items() if is_kept(name)}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return change


def without_prefix(folder: Path) -> None:
    weights = {name.removeprefix("base_model.model."): values for name, values in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def targets(*names: str) -> Change:
    return lambda folder: edit(folder / CONFIG, lambda values: values.update(target_modules=list(names)))


PREFIX = "no prefix"
"""A fault without the base, by whose names the tensors' are completed."""
INCOMPLETE: dict[str, Change] = {
    "a layer missing": keep(lambda name: ".layers.1." not in name),
    "a module missing": keep(lambda name: ".layers.1.self_attn.v_proj." not in name),
    "half a module": keep(lambda name: not name.endswith("layers.1.self_attn.v_proj.lora_B.weight")),
    "no tensors": keep(lambda name: False),
    PREFIX: without_prefix,
    "fewer targets": targets("q_proj"),
    "more targets": targets("q_proj", "v_proj", "down_proj", "k_proj"),
    "a target that the base lacks": targets("q_proj", "v_proj", "down_proj", "c_attn"),
    "no layer meant": lambda folder: edit(folder / CONFIG, lambda values: values.update(layers_to_transform=[0])),
}


@pytest.mark.parametrize("command", ["infer", *(name for name in COMMANDS if name not in READS_ONLY)])
@pytest.mark.parametrize("fault", [name for name in INCOMPLETE if name not in ("a target that the base lacks", PREFIX)])
def test_an_incomplete_adapter_is_refused_also_where_no_model_runs(
    refused: Callable[..., str], plain: Path, random_qwen: Path, fault: str, command: str
) -> None:
    INCOMPLETE[fault](plain)
    told = refused(command, plain, "--base-model", random_qwen)
    assert "its config and its tensors do not match" in told or "vLLM cannot serve this adapter" in told


@pytest.mark.parametrize("command", ["infer", "merge without proof", "export vllm"])
def test_a_target_that_no_module_answers_to_changes_nothing(
    done: Callable[..., Result], plain: Path, random_qwen: Path, command: str
) -> None:
    INCOMPLETE["a target that the base lacks"](plain)  # as PEFT has it
    result = done(command, plain, "--base-model", random_qwen)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("fault", ["half a module", "no tensors", PREFIX, "fewer targets"])
def test_without_its_base_an_adapter_is_compared_with_its_own_config(
    refused: Callable[..., str], done: Callable[..., Result], plain: Path, fault: str
) -> None:
    edit(plain / CONFIG, lambda values: values.update(base_model_name_or_path="someone/else"))
    whole = done("export adapter", plain)
    assert whole.exit_code == 0
    assert "the base is not on this machine" in whole.stderr
    INCOMPLETE[fault](plain)
    assert refused("export adapter", plain, "--overwrite")


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LoRA tensor:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(q|k)_proj"},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"target_modules": ["lm_head", "o_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.0.mlp.up_proj": 2}, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["k_proj"], "bias": "all"},
        {"target_modules": ["k_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_what_peft_saves_is_complete(random_qwen: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from loratune.errors import LoratuneError
    from loratune.model.adapter.attach import check_adapter

    base = AutoModelForCausalLM.from_pretrained(random_qwen)
    shapes = {name: tuple(values.shape) for name, values in base.named_parameters(remove_duplicate=False)}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    check_adapter(tmp_path / "plain", shapes)
    weights = load_file(tmp_path / "plain" / WEIGHTS)
    for left_out in [name for name in weights if "lora_" in name]:
        rest = {name: values for name, values in weights.items() if name != left_out}
        save_file(rest, tmp_path / "plain" / WEIGHTS, {"format": "pt"})
        with pytest.raises(LoratuneError, match="0 tensors too many, 1 too few"):
            check_adapter(tmp_path / "plain", shapes)


# --- values of an adapter's tensors ---


def first_as(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change the values of one matrix."""

    def changed(adapter: Path) -> None:
        weights = load_file(adapter / WEIGHTS)
        name = min(weights)
        save_file(weights | {name: change(weights[name]).contiguous()}, adapter / WEIGHTS)

    return changed


def without(part: str) -> Change:
    def changed(adapter: Path) -> None:
        weights = {name: tensor for name, tensor in load_file(adapter / WEIGHTS).items() if part not in name}
        save_file(weights, adapter / WEIGHTS)

    return changed


CANNOT_BE_COMPUTED: dict[str, tuple[Change, str]] = {
    "complex": (first_as(lambda t: t.to(torch.complex64)), "of an unsupported dtype (complex64) in 1 tensor,"),
    "integers": (first_as(lambda t: torch.ones_like(t).to(torch.int32)), "(int32)"),
    "8 bits": (first_as(lambda t: t.to(torch.float8_e4m3fn)), "(float8_e4m3fn)"),
    "float64 beyond float32": (first_as(lambda t: t.double() + 1e300), "makes updates larger than float32 can hold"),
    "1e38": (
        lambda adapter: save_file(
            {name: torch.full_like(t, 1e38) for name, t in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS
        ),
        "makes updates larger than float32 can hold",
    ),
    "alpha 0": (lambda adapter: edit(adapter / CONFIG, lambda v: v.update(lora_alpha=0)), "lora_alpha is 0"),
    "other rank": (lambda adapter: edit(adapter / CONFIG, lambda v: v.update(r=4)), "adapter's config says 4"),
    "head not there": (
        lambda adapter: edit(adapter / CONFIG, lambda v: v.update(modules_to_save=["lm_head"])),
        "lm_head was trained and is not in the file",
    ),
    "DoRA without lengths": (
        lambda adapter: edit(adapter / CONFIG, lambda v: v.update(use_dora=True)),
        "lora_magnitude_vector",
    ),
    "half of the modules": (without("q_proj.lora_A"), "its config and its tensors do not match"),
}
WITHOUT_A_BASE = ("export adapter", "export vllm")


@pytest.mark.parametrize("change", CANNOT_BE_COMPUTED)
@pytest.mark.parametrize("command", ["infer", "merge without proof", *WITHOUT_A_BASE])
def test_every_command_judges_an_adapter_alike(
    refused: Callable[..., str], run: Path, base: Path, tmp_path: Path, change: str, command: str
) -> None:
    plain = Path(shutil.copytree(run / "adapter", tmp_path / "plain"))
    edit(plain / CONFIG, lambda values: values.update(base_model_name_or_path="org/elsewhere"))
    apply, words = CANNOT_BE_COMPUTED[change]
    apply(plain)
    told = refused(command, plain, *([] if command == "export adapter" else ["--base-model", base]))
    if command == "export vllm" and change in ("head not there", "DoRA without lengths"):
        words = "vLLM cannot serve this adapter as it is"  # whatever its tensors are
    assert words in told
