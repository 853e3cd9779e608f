"""What an adapter replaces in its base is its own: every name answers as PEFT does with that adapter alone."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder
from loratune.errors import Exit
from loratune.model.adapter import placing
from loratune.model.adapter.attach import attach_adapter, load_adapter
from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.model.weights.unpacked import keep_unpacked
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sections import ModelSettings

Cli = Callable[..., Result]
TARGETS = ["q_proj", "v_proj", "up_proj"]
PROMPTS = [[5, 6, 7, 8], [40, 41], [100, 90, 80, 70, 60], [7], [2000, 3000]]
GROWN = 3008 + 4
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all biases": {"bias": "all"},
    "biases of its layers": {"bias": "lora_only"},
    "a bias of B": {"lora_bias": True},
    "DoRA with biases": {"bias": "all", "use_dora": True},
    "a head": {"modules_to_save": ["lm_head"]},
    "an embedding": {"modules_to_save": ["embed_tokens"]},
    "an embedding kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "a whole block": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "LoRA on embedding and head": {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 100, 3000]},
    "tokens apart": {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [40]}},
    "a grown vocabulary": {"grown": True},
    "a grown vocabulary in full": {"grown": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    "a grown vocabulary, LoRA on both": {"grown": True, "target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "a grown vocabulary, LoRA on the embedding": {"grown": True, "target_modules": [*TARGETS, "embed_tokens"]},
    "a grown vocabulary, its tokens": {"grown": True, "trainable_token_indices": [5, *range(3008, GROWN)]},
    "a shrunken vocabulary": {"grown": -4},
}
# Of an embedding of its own, PEFT saves the rows and not those of the head.
CASES = [(kind, tied) for kind in KINDS for tied in (True, False) if tied or not kind.endswith("LoRA on the embedding")]


def make_adapter(base: Path, folder: Path, seed: int = 1, grown: int = 0, **settings: Any) -> Path:
    """A PEFT folder with random weights in every trained tensor."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if grown:
        model.resize_token_embeddings(GROWN if grown is True else 3008 + grown)
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": TARGETS}
    with warnings.catch_warnings():  # PEFT speaks of tied and of resized embeddings
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**(defaults | settings), base_model_name_or_path=str(base)))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn_like(parameter)
        adapted.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path | None) -> Any:
    """A base that is loaded for this adapter alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        rows = {len(t) for name, t in tensors.items() if name.endswith(("embed_tokens.weight", "base_layer.weight"))}
        model.resize_token_embeddings(*(rows or {3008}), mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def last_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """Of the last position."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0, -1]
    return logits


def peft_logits(base: Path, adapter: Path | None, prompt: list[int]) -> torch.Tensor:
    return last_logits(peft_model(base, adapter), prompt)


def loaded(base: Path, adapters: dict[str, Path]) -> Any:
    model = load_base(ModelSettings(base="x", dtype="float32"), base, detect_hardware())
    for name, folder in adapters.items():
        model = load_adapter(model, folder, name)
    return model


def decoded_logits(decoder: SlotDecoder, names: list[str], prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of the last position of each prompt, all read in one step of the decoder, whose logits are caught."""
    caught: dict[int, torch.Tensor] = {}

    def choose(rows: Any, logits: torch.Tensor) -> None:
        for running, row in zip(rows, logits, strict=True):
            caught[id(running)] = row
            running.tokens.append(0)
            running.finish = "length"

    decoder._choose = choose  # type: ignore[method-assign]
    asked = [
        RunningSequence(p, Sampling(max_new_tokens=1), frozenset(), n) for p, n in zip(prompts, names, strict=True)
    ]
    for running in asked:
        decoder.add(running)
    while not decoder.is_idle:
        decoder.step()
    return [caught[id(running)] for running in asked]


@pytest.fixture(scope="module")
def biased_qwen(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """random_qwen with biases that are not 0."""
    folder = shutil.copytree(random_qwen, tmp_path_factory.mktemp("models") / "biased")
    torch.manual_seed(4)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.normal_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def untied_qwen(biased_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "untied"
    shutil.copytree(biased_qwen, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_every_name_answers_as_peft_does_with_that_adapter_alone(
    biased_qwen: Path, untied_qwen: Path, tmp_path: Path, kind: str, tied: bool
) -> None:
    """Whatever the order of loading, in one pass with others and alone, and after switching to and fro."""
    base = biased_qwen if tied else untied_qwen
    odd = make_adapter(base, tmp_path / "odd", 2, **KINDS[kind])
    folders = {"plain": make_adapter(base, tmp_path / "plain"), "odd": odd}
    names = ["odd", BASE, "plain", "odd", "plain"]
    models = {name: peft_model(base, folders.get(name)) for name in (BASE, *folders)}
    expected = [last_logits(models[name], prompt) for name, prompt in zip(names, PROMPTS, strict=True)]
    assert (expected[0][:3000] - last_logits(models[BASE], PROMPTS[0])[:3000]).abs().max() > 1e-2
    for order in (("plain", "odd"), ("odd", "plain")):
        decoder = SlotDecoder(loaded(base, {name: folders[name] for name in order}))
        together = decoded_logits(decoder, names, PROMPTS)
        alone = [decoded_logits(decoder, [n], [p])[0] for n, p in zip(names, PROMPTS, strict=True)]
        for wanted, found, single in zip(expected, together, alone, strict=True):
            torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)
            assert not found[len(wanted) :].isfinite().any()  # another's larger vocabulary
            torch.testing.assert_close(single, wanted, rtol=1e-4, atol=1e-4)


def test_biases_of_several_adapters_share_a_pass(
    biased_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        "all": make_adapter(biased_qwen, tmp_path / "all", 2, bias="all"),
        "few": make_adapter(biased_qwen, tmp_path / "few", 3, bias="lora_only", target_modules=["q_proj"]),
        "plain": make_adapter(biased_qwen, tmp_path / "plain"),
    }
    decoder = SlotDecoder(loaded(biased_qwen, folders))
    passes = []
    run = decoder._pass
    monkeypatch.setattr(decoder, "_pass", lambda *rest: passes.append(rest[3]) or run(*rest))
    names = ["all", "few", BASE, "plain", "all"]
    for name, prompt, found in zip(names, PROMPTS, decoded_logits(decoder, names, PROMPTS), strict=True):
        torch.testing.assert_close(found, peft_logits(biased_qwen, folders.get(name), prompt), rtol=1e-4, atol=1e-4)
    assert passes == [names]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_keeps_its_biases_too(biased_qwen: Path, tmp_path: Path, quantization: str) -> None:
    settings = ModelSettings(base="x", dtype="float32", quantization=quantization, compute_dtype="float32")

    def base() -> Any:
        model = load_base(settings, biased_qwen, detect_hardware())
        keep_unpacked(model)
        return model

    folders = {
        "biased": make_adapter(biased_qwen, tmp_path / "biased", 2, bias="all"),
        "plain": make_adapter(biased_qwen, tmp_path / "plain"),
    }
    expected = {BASE: base()} | {name: PeftModel.from_pretrained(base(), folder) for name, folder in folders.items()}
    model = base()
    before = own_parameters(model).fingerprint()
    for name, folder in folders.items():
        model = load_adapter(model, folder, name)
    assert own_parameters(model).fingerprint() == before
    names, decoder = ["biased", BASE, "plain", "biased", "plain"], SlotDecoder(model)
    for name, prompt, found in zip(names, PROMPTS, decoded_logits(decoder, names, PROMPTS), strict=True):
        with torch.no_grad():
            wanted = expected[name].eval()(torch.tensor([prompt])).logits[0, -1]
        # What bitsandbytes rounds the inputs of a layer to may differ by a step.
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 if quantization == "int8" else 1e-4)


def test_training_leaves_the_base_s_biases_to_the_base(biased_qwen: Path) -> None:
    """The closing questions ask both, and whatever happens after them finds the trained model."""
    model = load_base(ModelSettings(base="x", dtype="float32"), biased_qwen, detect_hardware())
    adapted = attach_adapter(model, LoraSettings(bias="all", rank=2), "some/base", seed=1)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.3
    adapted.eval()
    with torch.no_grad():
        expected = adapted(torch.tensor([PROMPTS[0]])).logits[0, -1]
    decoder = SlotDecoder(adapted)
    for name, wanted in ((BASE, peft_logits(biased_qwen, None, PROMPTS[0])), ("default", expected)):
        found = decoded_logits(decoder, [name], [PROMPTS[0]])[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    decoded_logits(decoder, [BASE], [PROMPTS[0]])
    decoder.close()
    assert all(parameter is trained[name] for name, parameter in adapted.named_parameters() if name in trained)
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == set(trained)


@pytest.mark.parametrize("written", ["values", "object"])
def test_a_base_that_loading_has_changed_is_noticed(
    cli: Cli, random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    folder, load = make_adapter(random_qwen, tmp_path / "a"), placing.set_peft_model_state_dict

    def careless(model: Any, tensors: Any, name: str) -> Any:
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        if written == "values":
            layer.weight.data[3, 5] += 1e-3
        else:
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        return load(model, tensors, name)

    monkeypatch.setattr(placing, "set_peft_model_state_dict", careless)
    result = cli("infer", "--adapter", folder, "--base-model", random_qwen, "--prompt", "x", "--max-new-tokens", 1)
    assert result.exit_code == Exit.MODEL
    assert "has changed 1 parameter of the base, first model.layers.1.mlp.down_proj.weight" in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of_the_future"])
@pytest.mark.parametrize("command", ["infer", "merge", "vllm", "adapter"])
def test_a_start_that_changes_the_base_is_refused_by_every_command(
    cli: Cli, random_qwen: Path, tmp_path: Path, start: str, command: str
) -> None:
    folder = make_adapter(random_qwen, tmp_path / "a")
    edit(folder, init_lora_weights=start)
    result = command_on(cli, command, folder, random_qwen, tmp_path)
    assert result.exit_code == Exit.MODEL
    assert start in result.stderr


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_a_start_that_leaves_the_base_alone_is_not_even_computed(
    random_qwen: Path, tmp_path: Path, start: bool | str | None
) -> None:
    folder = make_adapter(random_qwen, tmp_path / "a")
    expected = peft_logits(random_qwen, folder, PROMPTS[0])
    edit(folder, init_lora_weights=start, eva_config={"rho": 2.0} if start == "eva" else None)
    found = decoded_logits(SlotDecoder(loaded(random_qwen, {"a": folder})), ["a"], [PROMPTS[0]])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def command_on(cli: Cli, command: str, adapter: Path, base: Path, tmp_path: Path) -> Result:
    """Run a command on an adapter."""
    given = ["--adapter", adapter, "--base-model", base]
    if command == "infer":
        return cli("infer", *given, "--prompt", "x", "--max-new-tokens", 2)
    if command == "merge":
        return cli("merge", *given, "--output", tmp_path / "out")
    if command == "combine":
        several = ["--adapter", f"a={adapter}", "--adapter", f"b={adapter}", "--weights", "0.5,0.5"]
        return cli("merge", *several, "--base-model", base, "--output", tmp_path / "out")
    return cli("export", *given, "--format", command, "--output", tmp_path / "out")


COMMANDS = ["infer", "merge", "combine", "vllm", "adapter"]
TRANSFORMERS = {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers.models.qwen2.modeling_qwen2"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"auto_mapping": TRANSFORMERS, "task_type": None}, ""),
        ({"auto_mapping": {**TRANSFORMERS, "unsloth_fixed": True}, "task_type": None}, ""),
        ({"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}}, ""),
        ({"corda_config": {"cache_file": "/x"}, "runtime_config": {"ephemeral_gpu_offload": False}}, ""),
        ({"fan_in_fan_out": True, "merge_weights": True, "enable_lora": None, "some_new_switch": False}, ""),
        ({"auto_mapping": {"parent_library": "transformers_modules.x"}}, "auto_mapping names code outside"),
        ({"auto_mapping": {"parent_library": ["transformers"]}}, "auto_mapping names code outside"),
        ({"megatron_config": {"a": 1}}, "megatron_config is set, which needs code"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
        ({"kasa_config": {"beta": 1}, "some_new_size": 16}, "some_new_size is set"),
        ({"enable_lora": [True, False, True]}, "enable_lora is set"),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters names mlp.weight"),
    ],
)
def test_a_config_is_judged_alike_by_every_command(
    cli: Cli, random_qwen: Path, tmp_path: Path, values: dict[str, Any], words: str, command: str
) -> None:
    folder = make_adapter(random_qwen, tmp_path / "a")
    edit(folder, **values)
    result = command_on(cli, command, folder, random_qwen, tmp_path)
    assert result.exit_code == (Exit.MODEL if words else 0), result.stderr
    assert words in " ".join(result.stderr.split())
    if command == "adapter" and not words:
        assert (
            not {"auto_mapping", "corda_config"} & json.loads((tmp_path / "out/adapter_config.json").read_text()).keys()
        )


# --- resized vocabularies ---


def add_token(base: Path, folder: Path, count: int = 4) -> list[int]:
    """A tokenizer with tokens that the base does not have, as an adapter's folder holds it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<more {number}>" for number in range(count)], special_tokens=True)
    while len(tokenizer) < GROWN:  # the base has rows to spare
        tokenizer.add_tokens([f"<more {len(tokenizer)}>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(["<more 3010>"])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "tied"), [case for case in CASES if "vocabulary" in case[0] or "tokens" in case[0]])
def test_a_resized_vocabulary_is_merged_with_config_and_tokenizer(
    cli: Cli, biased_qwen: Path, untied_qwen: Path, tmp_path: Path, kind: str, tied: bool
) -> None:
    base = biased_qwen if tied else untied_qwen
    folder = make_adapter(base, tmp_path / "a", **KINDS[kind])
    by_peft = peft_model(base, folder)
    rows = len(last_logits(by_peft, [5]))
    if rows == GROWN:
        add_token(base, folder)
    result = cli("merge", "--adapter", folder, "--base-model", base, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert (f"vocabulary of {rows} rows" in " ".join(result.stderr.split())) is (rows != 3008)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == merged.get_output_embeddings().weight.shape[0] == rows
    for prompt in [*PROMPTS, [rows - 1, 3]]:
        torch.testing.assert_close(last_logits(merged, prompt), last_logits(by_peft, prompt), rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) <= rows or rows < 3008


@pytest.mark.parametrize("format_", ["gguf", "bnb4"])
def test_a_resized_vocabulary_is_exported(cli: Cli, random_qwen: Path, tmp_path: Path, format_: str) -> None:
    folder = make_adapter(random_qwen, tmp_path / "a", grown=True)
    add_token(random_qwen, folder)
    given = ["--adapter", folder, "--base-model", random_qwen, "--format", format_, "--output", tmp_path / "out"]
    result = cli("export", *given, *(["-q", "f32"] if format_ == "gguf" else []))
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out/verification.json").read_text())
    assert report["logits" if format_ == "gguf" else "read_back"]["largest_difference"] < 1e-4


def test_adapters_that_bring_an_embedding_are_not_combined_without_it(
    cli: Cli, random_qwen: Path, tmp_path: Path
) -> None:
    folder = make_adapter(random_qwen, tmp_path / "a", grown=True)
    result = command_on(cli, "combine", folder, random_qwen, tmp_path)
    assert result.exit_code == Exit.MODEL
    assert "brings lm_head.weight, model.embed_tokens.weight" in " ".join(result.stderr.split())


def test_an_adapter_with_new_tokens_answers_and_its_base_names_what_it_lacks(
    cli: Cli, random_qwen: Path, tmp_path: Path
) -> None:
    folder = make_adapter(random_qwen, tmp_path / "a", grown=True)
    add_token(random_qwen, folder)
    asked = ["--adapter", folder, "--base-model", random_qwen, "--max-new-tokens", 3]
    template = "{% for m in messages %}{{ '<more 3010>' + m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    result = cli("infer", *asked, "--prompt", "x")
    assert result.exit_code == 0, result.stderr
    assert "was trained with a vocabulary of 3012 rows and brings them" in " ".join(result.stderr.split())
    result = cli("infer", *asked, "--prompt", "x", "--no-adapter")
    assert result.exit_code == Exit.MODEL
    assert "has no token <more 3010>: its vocabulary has 3,008 rows" in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["infer", "merge"])
@pytest.mark.parametrize("lacking", ["all", "the head", "LoRA's own", "tokens' own"])
def test_rows_that_an_adapter_does_not_bring_are_refused(
    cli: Cli, random_qwen: Path, tmp_path: Path, command: str, lacking: str
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "the head": {"modules_to_save": ["embed_tokens"]},
        "LoRA's own": {"target_modules": ["embed_tokens", "lm_head"]},
        "tokens' own": {"trainable_token_indices": [5, *range(3008, GROWN)]},
    }
    folder = make_adapter(random_qwen, tmp_path / "a", grown=True, **kinds.get(lacking, {}))
    path = folder / "adapter_model.safetensors"
    ends = ("lm_head.weight",) if lacking == "the head" else ("embed_tokens.weight", "lm_head.weight", "layer.weight")
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(ends)}
    save_file(tensors, path)
    add_token(random_qwen, folder)
    result = command_on(cli, command, folder, random_qwen, tmp_path)
    assert result.exit_code == Exit.MODEL
    assert "save_embedding_layers=True" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
