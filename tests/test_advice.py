"""What output advises is run: no command that a refusal or a success names is refused in turn."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.commands import Command, free_place, loratune
from loratune.delivery.advice import serve_merged
from loratune.delivery.export.servers.plan import check_for
from loratune.errors import Exit
from loratune.model.files import check_base
from loratune.recipe.loading import load_recipe
from loratune.runs.going_on import next_command
from loratune.runs.manifest import Manifest, read_manifest, write_manifest
from loratune.runs.state import evaluation_command, serving_command
from loratune.runs.status import set_status
from loratune.runs.tokenizer_files import copy_tokenizer_files
from loratune.training import failures

CLI = Callable[..., Result]
WEIGHTS = "adapter_model.safetensors"
PROGRAMS = ("loratune", "vllm", "llama-cli", "llama-server", "ollama", "python")
ADVISED = re.compile(rf"^ *(?:[\w',. -]+: )?((?:{'|'.join(PROGRAMS)}) (?!\S* ?:).*?)(?:  \([A-Z]+: .*)?$", re.MULTILINE)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # transformers 5.23's GGUF loader hands numpy's read-only arrays to torch.
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]


def advised(result: Result) -> Iterator[list[str]]:
    """The command lines in an output, as a shell splits them."""
    for line in ADVISED.findall(result.stderr):
        yield shlex.split(line)


def run_advice(cli: CLI, result: Result, chosen: dict[str, str], depth: int = 2) -> list[str]:
    """Run what is advised, in its order, and what that advises in turn; the programs and subcommands that ran."""
    ran = []
    for words in advised(result):
        assert "…" not in " ".join(words)
        filled = [re.sub(r"\b(ORG|MODEL)\b", lambda found: chosen[found[0]], word) for word in words]
        ran.append(" ".join(words[:2]))
        if words[0] != "loratune":
            check_foreign(filled)
            continue
        endings = {"infer": ["--prompt", "hi", "--max-new-tokens", 1], "serve": ["--port", 0, "--no-api-key"]}
        done = cli(*filled[1:], *endings.get(filled[1], []))
        assert done.exit_code == 0, f"{shlex.join(filled)}: {done.stderr}"
        if depth > 1:
            ran += run_advice(cli, done, chosen, depth - 1)
    return ran


def check_foreign(words: list[str]) -> None:
    """What another program would be given, as far as it can be known without it."""
    if words[:2] == ["vllm", "serve"]:
        check_base(Path(words[2]))
        if "--lora-modules" in words:
            module = words[words.index("--lora-modules") + 1]
            assert check_for("vllm", Path(module.partition("=")[2])).problems == []
    elif words[:3] == ["python", "-m", "sglang.launch_server"]:
        check_base(Path(words[words.index("--model-path") + 1]))
        if "--lora-paths" in words:
            module = words[words.index("--lora-paths") + 1]
            assert check_for("sglang", Path(module.partition("=")[2])).problems == []
    elif words[:2] == ["ollama", "create"]:
        assert re.fullmatch(r"[a-z0-9_][a-z0-9_.-]{0,79}", words[2])
        source = re.match(r"FROM (.*)", Path(words[4]).read_text(encoding="utf-8"))
        assert source
        assert (Path(words[4]).parent / source[1]).is_file()
    elif words[0] == "python":
        check_base(Path(words[2]))
    else:
        assert Path(words[-1]).is_file()


@pytest.fixture
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` loads everything and ends where it would begin to answer."""
    monkeypatch.setattr("loratune.generation.server.running.run", lambda *_: None)


@pytest.fixture
def adapter(random_qwen: Path, tmp_path: Path) -> Callable[..., Path]:
    """Have PEFT write a trained adapter of the random model."""

    def write(base: Path | None = None, rows: int = 0, **settings: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base or random_qwen)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        config = LoraConfig(task_type="CAUSAL_LM", **{"init_lora_weights": False, **settings})
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "my adapter", save_embedding_layers=bool(rows))
        return tmp_path / "my adapter"

    return write


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank pattern": {"rank_pattern": {"down_proj": 6}},
    "rank pattern of one scale": {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"down_proj": 16}},
    "rank above the most": {"r": 520},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained tokens": {"trainable_token_indices": [5, 7]},
    "grown vocabulary": {"rows": 3010},
}
REFUSED_BY_VLLM = {*KINDS} - {"plain", "rslora", "rank pattern of one scale"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_vllm_refuses_is_merged_and_what_it_takes_is_served(
    cli: CLI, adapter: Callable[..., Path], random_qwen: Path, tmp_path: Path, kind: str
) -> None:
    folder = adapter(**KINDS[kind])
    done = cli("export", "--adapter", folder, "--format", "vllm", "--output", tmp_path / "out")
    if kind not in REFUSED_BY_VLLM:
        assert done.exit_code == 0, done.stderr
        check_foreign(shlex.split(done.stdout))
        return
    assert done.exit_code == Exit.MODEL, done.stderr
    assert run_advice(cli, done, {}, 1) == ["loratune merge", "vllm serve"]


@pytest.mark.parametrize("kind", ["plain", "rslora"])
def test_sglang_is_advised_as_vllm_is(cli: CLI, adapter: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    done = cli("export", "--adapter", adapter(**KINDS[kind]), "--format", "sglang", "--output", tmp_path / "out")
    if kind == "plain":
        assert done.exit_code == 0, done.stderr
        check_foreign(shlex.split(done.stdout))
        return
    assert done.exit_code == Exit.MODEL, done.stderr
    assert run_advice(cli, done, {}, 1) == ["loratune merge", "python -m"]


@pytest.mark.parametrize("target", ["gguf", "ollama", "adapter", "bnb4"])
def test_what_a_success_names_next_is_not_refused(
    cli: CLI, adapter: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    done = cli("export", "--adapter", adapter(), "--format", target, "--output", tmp_path / "模型 1")
    assert done.exit_code == 0, done.stderr
    first = {"gguf": "llama-cli -m", "ollama": "ollama create", "bnb4": "vllm serve", "adapter": "loratune export"}
    if target == "bnb4":  # a quantised folder is for other programs
        assert [words[:2] for words in advised(done)] == [["vllm", "serve"]]
        return
    assert run_advice(cli, done, {"ORG": "me"}, 1)[0] == first[target]


@pytest.mark.usefixtures("_no_server")
def test_a_merge_and_a_run_name_commands_that_run(
    cli: CLI, short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli("merge", "--adapter", short_run, "--output", tmp_path / "it's merged")
    assert done.exit_code == 0, done.stderr
    assert run_advice(cli, done, {}) == ["loratune infer", "loratune serve"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert serve_merged(tmp_path / "it's merged").words[:2] == ("vllm", "serve")
    assert run_advice(cli, cli("runs", "show", short_run), {}) == ["loratune infer"]
    serving = serving_command(short_run)
    assert serving
    assert serving.words[:6] == ("loratune", "export", "--adapter", str(short_run), "--format", "vllm")
    assert cli(*serving.words[1:]).exit_code == 0
    assert serving_command(tmp_path / "no run") is None


def test_an_upload_after_a_dry_run_is_the_same_command_with_what_it_needs(
    cli: CLI, short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr("loratune.delivery.export.hub._upload_to_hugging_face", lambda *given: sent.append(given) or {})
    monkeypatch.setattr("loratune.delivery.export.hub._check_arrived", lambda *_: None)
    output = tmp_path / "to give"
    arguments = ["--adapter", short_run, "--format", "adapter", "--push", "hf:me/it", "--output", output]
    done = cli("export", *arguments)
    assert done.exit_code == 0, done.stderr
    assert not sent
    assert run_advice(cli, done, {}, 1) == ["loratune export"]
    assert len(sent) == 1


def test_a_base_that_is_not_named_or_quantised_is_asked_for(
    cli: CLI, adapter: Callable[..., Path], random_qwen: Path, tmp_path: Path
) -> None:
    folder = adapter(use_dora=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    quantised = tmp_path / "gptq"
    shutil.copytree(random_qwen, quantised)
    values = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "gptq"}}))
    for base in (str(quantised), "org/name"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        done = cli("export", "--adapter", folder, "--format", "vllm", "--output", tmp_path / "out")
        assert done.exit_code == Exit.MODEL
        assert "(MODEL: the folder of its base" in done.stderr
        assert run_advice(cli, done, {"MODEL": str(random_qwen)}, 1) == ["loratune merge", "vllm serve"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.usefixtures("_no_server")
def test_what_cannot_be_merged_is_served_here_or_nothing_is_advised(
    cli: CLI, adapter: Callable[..., Path], random_qwen: Path, tmp_path: Path
) -> None:
    dora = adapter(use_dora=True, target_modules=["q_proj", "embed_tokens"])
    done = cli("export", "--adapter", dora, "--format", "vllm", "--output", tmp_path / "out")
    assert "nor can it be merged into its base" in done.stderr
    assert run_advice(cli, done, {}, 1) == ["loratune serve"]
    tensors = load_file(dora / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "magnitude" not in name}, dora / WEIGHTS, {"format": "pt"})
    done = cli("export", "--adapter", dora, "--format", "vllm", "--output", tmp_path / "out")
    assert "nor can it be merged into its base" in done.stderr
    assert "lora_magnitude_vector" in " ".join(done.stderr.split())
    assert list(advised(done)) == []
    assert cli("merge", "--adapter", dora, "--output", tmp_path / "out").exit_code == Exit.MODEL
    assert cli("infer", "--adapter", dora, "--prompt", "hi").exit_code == Exit.MODEL


def test_an_untrained_adapter_is_told_before_the_merge_and_float32_is_not_advised(
    cli: CLI, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(init_lora_weights=True)
    with monkeypatch.context() as patch:
        patch.setattr("loratune.delivery.merge.merge.write_merged", lambda *_: pytest.fail("weights were written"))
        for command in (["merge"], ["export", "--format", "gguf"]):
            done = cli(*command, "--adapter", folder, "--output", tmp_path / "out")
            assert done.exit_code == Exit.MODEL, done.stderr
            assert "was the adapter trained?" in " ".join(done.stderr.split())
            assert "--dtype" not in done.stderr
    assert run_advice(cli, done, {}, 1) == ["loratune merge"]


def test_force_is_advised_only_where_it_helps(cli: CLI, short_run: Path, random_qwen: Path, tmp_path: Path) -> None:
    alike, other = tmp_path / "alike", tmp_path / "other"
    for folder, change in ((alike, 0), (other, 16)):
        config = AutoModelForCausalLM.from_pretrained(random_qwen).config
        config.intermediate_size += change
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        copy_tokenizer_files(random_qwen, folder)
    for command in (["merge", "--output", tmp_path / "out"], ["infer", "--prompt", "hi", "--max-new-tokens", 1]):
        told = cli(*command, "--adapter", short_run, "--base-model", other)
        assert told.exit_code == Exit.MODEL
        assert "is another model" in " ".join(told.stderr.split())
        assert "--force" not in told.stderr
        told = cli(*command, "--adapter", short_run, "--base-model", alike)
        assert "insist with --force" in " ".join(told.stderr.split())
        assert cli(*command, "--adapter", short_run, "--base-model", alike, "--force").exit_code == 0


# --- exports that are refused before a merge ---


def changed_base(random_qwen: Path, folder: Path, file: str, change: Callable[[Any], None]) -> Path:
    shutil.copytree(random_qwen, folder)
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    change(values)
    (folder / file).write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", lambda config: config.update(hidden_act="gelu"), "hidden_act"),
        ("tokenizer.json", lambda state: state.update(normalizer={"type": "NFKC"}), "normalizer"),
    ],
)
@pytest.mark.parametrize("target", ["gguf", "ollama"])
def test_what_gguf_cannot_state_is_told_before_the_merge_and_llama_cpp_gets_a_merged_model(
    cli: CLI, adapter: Callable[..., Path], random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    file: str, change: Callable[[Any], None], words: str, target: str,
) -> None:  # fmt: skip
    base = changed_base(random_qwen, tmp_path / "base", file, change)
    folder = adapter(base)
    with monkeypatch.context() as patch:
        patch.setattr("loratune.delivery.export.export.carry_out", lambda *_: pytest.fail("merged"))
        done = cli("export", "--adapter", folder, "--format", target, "--output", tmp_path / "out")
    assert done.exit_code == Exit.MODEL, done.stderr
    assert words in done.stderr
    assert "/loratune-" not in done.stderr  # no folder that is gone
    assert run_advice(cli, done, {}, 1) == ["loratune merge", "python convert_hf_to_gguf.py"]


def test_a_template_that_ollama_cannot_have_is_told_before_the_merge_and_the_gguf_file_is_advised(
    cli: CLI, adapter: Callable[..., Path], random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_qwen, base)
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ loop.index }}. {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    folder = adapter(base)
    with monkeypatch.context() as patch:
        patch.setattr("loratune.delivery.export.export.carry_out", lambda *_: pytest.fail("merged"))
        done = cli("export", "--adapter", folder, "--format", "ollama", "--output", tmp_path / "out")
    assert done.exit_code == Exit.MODEL, done.stderr
    assert "cannot be written for Ollama" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
    assert run_advice(cli, done, {}, 1) == ["loratune export", "llama-server --jinja"]


def test_a_disk_without_room_for_merged_model_and_file_is_told_before_the_merge(
    cli: CLI, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratune.delivery.export.rehearsal as rehearsal

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("loratune.delivery.export.export.carry_out", lambda *_: pytest.fail("merged"))
    done = cli("export", "--adapter", adapter(), "--format", "gguf", "--output", tmp_path / "out")
    assert done.exit_code == Exit.IO
    assert "the merged model that it is made from need" in " ".join(done.stderr.split())


# --- runs ---


def begun_run(short_run: Path, folder: Path) -> Path:
    """A run that has ended before its first checkpoint."""
    folder.mkdir()
    recipe = (short_run / "recipe.yaml").read_text(encoding="utf-8").replace(str(short_run), str(folder))
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    write_manifest(folder, Manifest(record=read_manifest(short_run).record))
    set_status(folder, "diverged", step=1, steps=4)
    return folder


def test_a_run_that_diverged_is_begun_anew_with_a_lower_rate(cli: CLI, short_run: Path, tmp_path: Path) -> None:
    folder = begun_run(short_run, tmp_path / "my run")
    shown = cli("runs", "show", folder)
    assert "--training.learning_rate 0.00167" in shown.stderr
    assert run_advice(cli, shown, {}, 1) == ["loratune sft"]
    assert "learning_rate: 0.00167" in (folder / "recipe.yaml").read_text(encoding="utf-8")


def test_a_run_is_resumed_only_from_a_checkpoint(short_run: Path, tmp_path: Path) -> None:
    folder = begun_run(short_run, tmp_path / "run")
    assert str(next_command(folder, "interrupted")).endswith("--overwrite")
    assert str(next_command(short_run, "interrupted")).endswith("--resume")


def test_settings_that_save_memory_are_settings_that_the_model_takes(
    cli: CLI, short_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "ADVICE_LIMIT", 99)
    recipe = short_run / "recipe.yaml"
    advice = [shlex.split(text.partition("  (")[0]) for text in failures.memory_advice(load_recipe(str(recipe), {}))]
    assert ["--lora.layers", "last 1"] in advice  # of two
    assert len(advice) >= 5
    for flags in advice:
        shown = cli("sft", "--config", recipe, *flags, "--show")
        assert shown.exit_code == 0, shown.stderr
    shortest = load_recipe(str(recipe), {"training.max_length": "8"})
    assert not any("max_length" in text for text in failures.memory_advice(shortest))


# --- the mechanism ---


def test_a_command_is_quoted_and_says_what_is_to_be_put_in() -> None:
    made = loratune("do it", "merge", {"--adapter": "my run", "--force": True, "--base-model": None, "--x": False})
    assert made.line == "loratune merge --adapter 'my run' --force"
    assert str(made) == f"do it: {made.line}"
    assert str(Command("give it", ("x", "hf:ORG/a"), {"ORG": "your name"})).endswith("x hf:ORG/a  (ORG: your name)")


def test_a_free_place_is_one_that_nothing_has(tmp_path: Path) -> None:
    assert free_place(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").symlink_to(tmp_path / "nowhere")
    assert free_place(tmp_path / "a") == tmp_path / "a-3"


@pytest.mark.parametrize("written", [".", "..", "../run/.", "/", "a"])
def test_a_place_beside_a_folder_without_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    (tmp_path / "above" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "run")
    place = free_place(Path(written), "-merged")
    assert str(place.resolve()) == f"{Path(written).resolve()}-merged"
    assert str(evaluation_command(Path(written)).words[-1]).endswith("-eval")
