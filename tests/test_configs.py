"""A model folder is data: no key of its configs chooses code, kernels or adapters, and odd values are one message."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers.dynamic_module_utils
import transformers.integrations.hub_kernels
import transformers.modeling_utils
import transformers.utils.hub
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from typer.testing import Result

from loratune.data.template import trial as template_trial
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.families import FAMILIES
from loratune.model.config import allowed_keys, load_config, load_generation_config
from loratune.model.files import check_config
from loratune.model.from_folder import load_from_folder
from loratune.model.tokenizer import load_tokenizer

Cli = Callable[..., Result]
KERNELS = ["kernels-community/flash-attn2", "org/kernel@rev:fn"]


@pytest.fixture
def folder(random_qwen: Path, tmp_path: Path) -> Path:
    """A copy of the random model that a test may damage."""
    return shutil.copytree(random_qwen, tmp_path / "model")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What anybody has asked a hub for: stand-ins for all that would fetch kernels, code or files record it."""
    calls: list[str] = []

    def record(name: str) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **options: Any) -> Any:
            calls.append(f"{name} {arguments}")
            raise RuntimeError(f"a hub was asked: {name} {arguments}")

        return stand_in

    kernels = transformers.integrations.hub_kernels
    for name in ("get_kernel", "load_and_register_attn_kernel"):
        monkeypatch.setattr(kernels, name, record(name))
    monkeypatch.setattr(transformers.dynamic_module_utils, "get_class_from_dynamic_module", record("dynamic module"))
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, record(name))
        monkeypatch.setattr(transformers.utils.hub, name, record(name), raising=False)
    return calls


def edit(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def infer(cli: Cli, folder: Path) -> Result:
    return cli("infer", "--model", folder, "--prompt", "hi", "--max-new-tokens", 2)


def told(result: Result) -> str:
    """What a command has said, without the breaks of the screen."""
    return " ".join(result.stderr.split())


# --- nothing chooses code ---


PLANTS: dict[str, dict[str, Any]] = {
    **{
        f"{key} {kernel}": {key: kernel}
        for key in ("_attn_implementation", "attn_implementation")
        for kernel in KERNELS
    },
    "by layer": {"_attn_implementation": {"": "sdpa", "text_config": KERNELS[0]}},
    "nested": {"text_config": {"_attn_implementation": KERNELS[0]}},
    "nested in a list": {"layers": [{"deeper": {"attn_implementation": KERNELS[1]}}]},
    "internal": {"_attn_implementation_internal": KERNELS[0]},
    "experts": {"experts_implementation": KERNELS[0]},
    "experts, private": {"_experts_implementation": KERNELS[0]},
    "use_kernels": {"use_kernels": True, "kernel_config": {"RMSNorm": KERNELS[0]}},
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "evil.E"}},
    "auto_map of a part": {"text_config": {"auto_map": {"AutoConfig": "evil.E"}}},
    "custom_generate": {"custom_generate": "org/evil"},
    "custom_pipelines": {"custom_pipelines": {"text-generation": {"impl": "evil.E"}}},
}


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        (name, plant)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        for plant in PLANTS
        if (name, plant) != ("config.json", "auto_map")  # which may be there; see below
    ],
)
def test_a_config_that_chooses_code_or_kernels_is_refused(
    folder: Path, asked: list[str], plant: str, name: str
) -> None:
    edit(folder, name, **PLANTS[plant])
    with pytest.raises(LoratuneError, match="asks for code outside transformers") as raised:
        check_config(folder)
    assert raised.value.exit_code == Exit.MODEL
    assert str(folder / name) in str(raised.value)
    assert not asked


def test_classes_of_a_folder_s_own_are_not_loaded_where_transformers_has_the_architecture(
    cli: Cli, folder: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass E: ...\n")
    classes = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E", "AutoTokenizer": "evil.E"}
    edit(folder, auto_map=classes)
    result = infer(cli, folder)
    assert result.exit_code == 0, result.stderr
    assert not mark.exists()
    assert type(load_from_folder(folder, attn_implementation="sdpa")).__module__.startswith("transformers.models.")
    edit(folder, model_type="evil")
    with pytest.raises(LoratuneError, match=r"asks for code|no model of its own"):
        check_config(folder)


@pytest.mark.parametrize("command", ["infer", "sft", "export"])
def test_every_command_refuses_it(cli: Cli, folder: Path, rows_file: Path, asked: list[str], command: str) -> None:
    edit(folder, _attn_implementation=KERNELS[0])
    commands: dict[str, list[Any]] = {
        "infer": ["infer", "--model", folder, "--prompt", "hi"],
        "sft": ["sft", "--model.base", folder, "--data.train", rows_file, "--output", folder.parent / "run"],
        "export": ["export", "--model", folder, "--format", "gguf", "--output", folder.parent / "gguf"],
    }
    result = cli(*commands[command])
    assert result.exit_code == Exit.MODEL, (result.exception, result.stderr)
    assert "asks for code outside transformers (_attn_implementation)" in told(result)
    assert not asked


@pytest.mark.parametrize("plant", [p for p in PLANTS if "attn" in p or p == "nested"])
def test_even_unchecked_no_key_reaches_transformers(
    folder: Path, asked: list[str], plant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.model.config.check_values", lambda path, values: None)
    edit(folder, **PLANTS[plant])
    model = load_from_folder(folder, attn_implementation="sdpa", dtype="auto")
    assert model.config._attn_implementation == "sdpa"
    load_tokenizer(folder)
    assert not asked


def test_the_plant_is_one(folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda: True, raising=False)
    edit(folder, _attn_implementation=KERNELS[0])
    assert AutoConfig.from_pretrained(folder)._attn_implementation == KERNELS[0]
    with pytest.raises((RuntimeError, ImportError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_implementation_that_is_transformers_own_is_not_taken_from_the_config(cli: Cli, folder: Path) -> None:
    edit(folder, _attn_implementation="flash_attention_2", transformers_weights="evil.bin", fusion_config=None)
    result = infer(cli, folder)
    assert result.exit_code == 0, result.stderr
    assert load_from_folder(folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_what_gets_through_is_declared_or_read_by_the_architecture(kind: str) -> None:
    allowed = allowed_keys(kind)
    assert {"torch_dtype", "tie_word_embeddings"} <= allowed
    sizes = {key for key in allowed if key.endswith(("kernel_size", "kernel_dim"))}  # of convolutions
    assert not [key for key in allowed - sizes if key.startswith("_") or "implementation" in key or "kernel" in key]
    assert not allowed & {"auto_map", "quantization_config", "transformers_weights", "return_dict"}
    assert {key for key in allowed if key.endswith("_config")} <= {
        *CONFIG_MAPPING[kind].sub_configs,
        "per_layer_config",
    }


def test_a_config_says_what_it_says_to_transformers(folder: Path) -> None:
    edit(folder, head_dim=8, rope_theta=5000.0, model_name="x", use_mrope=False)
    ours, theirs = load_config(folder).to_dict(), AutoConfig.from_pretrained(folder).to_dict()
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= {"_name_or_path", "model_name", "use_mrope"}


# --- adapters beside a base ---


@pytest.mark.parametrize("command", ["infer", "sft", "merge", "export"])
def test_an_adapter_beside_the_weights_is_refused(
    cli: Cli, folder: Path, short_run: Path, rows_file: Path, tmp_path: Path, command: str
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(short_run / "adapter" / name, folder / name)
    out = tmp_path / "out"
    commands: dict[str, list[Any]] = {
        "infer": ["infer", "--model", folder, "--prompt", "hi"],
        "sft": ["sft", "--model.base", folder, "--data.train", rows_file, "--output", out],
        "merge": ["merge", "--adapter", short_run, "--base-model", folder, "--output", out, "--no-logits"],
        "export": ["export", "--model", folder, "--format", "gguf", "--output", out],
    }
    result = cli(*commands[command])
    assert result.exit_code == Exit.MODEL, (result.exception, result.stderr)
    assert "an adapter is next to the weights" in told(result)
    assert "--adapter" in told(result)
    assert not out.exists()


# --- odd values ---


ODD: dict[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "evil.E"},
    "num_hidden_layers": {"num_hidden_layers": 10**9},
    "num_attention_heads": {"num_attention_heads": 0},
    "hidden_size": {"hidden_size": -32},
    "intermediate_size": {"intermediate_size": "48"},
    "vocab_size": {"vocab_size": 10**9},
    "rms_norm_eps": {"rms_norm_eps": float("nan")},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "rope_type": {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
    "dtype": {"dtype": "load"},
    "attention_dropout": {"attention_dropout": 1.5},
    "max_position_embeddings": {"max_position_embeddings": 0},
    "layer_types": {"layer_types": ["evil", "evil"]},
    "model_type": {"model_type": ["qwen2"]},
    "per_layer_config": {"per_layer_config": {"0": {"hidden_size": 8}}},
}


def load_checked(folder: Path) -> Any:
    check_config(folder)
    return load_from_folder(folder, attn_implementation="sdpa", dtype="auto")


@pytest.mark.parametrize("key", ODD)
def test_an_odd_value_is_told_with_file_and_key(folder: Path, key: str) -> None:
    edit(folder, **ODD[key])
    start = time.process_time()
    with pytest.raises(LoratuneError) as raised:
        load_checked(folder)
    assert raised.value.exit_code == Exit.MODEL
    assert str(folder) in str(raised.value)
    named = {"vocab_size": "embed_tokens", "rope_type": "rope_parameters"}.get(key, key)
    assert named in str(raised.value)
    assert time.process_time() - start < 10


def test_fewer_layers_than_the_weights_have_make_another_model(folder: Path) -> None:
    edit(folder, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(LoratuneError, match=r"the config's model does not have model\.layers\.1"):
        load_from_folder(folder, attn_implementation="sdpa", dtype="auto")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "{", "\udcff"])
def test_a_file_that_is_no_config_is_told(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, errors="surrogateescape")
    with pytest.raises(LoratuneError) as raised:
        check_config(folder)
    assert raised.value.exit_code == Exit.MODEL
    assert str(folder / name) in str(raised.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"top_p": "0.9"}, "top_p"), ({"temperature": [1]}, "temperature"), ({"top_k": 1.5}, "top_k"),
        ({"do_sample": 1}, "do_sample"), ({"eos_token_id": "</s>"}, "eos_token_id"), ({"min_p": -1}, "min_p"),
        ({"eos_token_id": [1, None]}, "eos_token_id"), ({"repetition_penalty": {}}, "repetition_penalty"),
    ],
)  # fmt: skip
def test_an_odd_generation_config_is_told(folder: Path, values: dict[str, Any], key: str) -> None:
    edit(folder, "generation_config.json", **values)
    with pytest.raises(LoratuneError, match=rf"generation_config\.json:\n  {key} is"):
        load_generation_config(folder)


def test_a_generation_config_passes_on_what_is_sampled_with(folder: Path) -> None:
    edit(folder, "generation_config.json", top_p=0.8, cache_implementation="org/evil", stop_strings=["x"])
    config = load_generation_config(folder)
    assert (config.top_p, config.cache_implementation, config.stop_strings) == (0.8, None, None)


@pytest.mark.parametrize(
    "values",
    [{"model_max_length": "x"}, {"tokenizer_class": 5}, {"chat_template": 5}, {"added_tokens_decoder": {"x": 1}}],
)
def test_an_odd_tokenizer_config_is_no_traceback(cli: Cli, folder: Path, values: dict[str, Any]) -> None:
    edit(folder, "tokenizer_config.json", **values)
    result = infer(cli, folder)
    assert result.exit_code in (0, Exit.MODEL), (result.exception, result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_no_value_of_any_key_is_a_traceback(cli: Cli, folder: Path, name: str) -> None:
    known = json.loads((folder / name).read_text())
    odd = [None, -1, 0, 10**9, "x", [], {}, float("nan"), 1.5, True, KERNELS[1]]
    for key in known:
        for value in odd:
            (folder / name).write_text(json.dumps(known | {key: value}))
            result = infer(cli, folder)
            assert result.exit_code in (0, Exit.MODEL), (key, value, result.exception, result.stderr)


# --- templates ---


BOMBS = {
    "ranges in each other": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls of calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a text times a number": "{{ 'x' * 10**10 }}",
    "a doubled text": "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "a long prompt": "{% for i in range(90000) %}{{ 'abcdefghijklmnop' }}{% endfor %}",
    "a long text": "[" * 90_000,
    "a long template": "[" * 200_000,
    "a long comment": "{# " + "[" * 200_000 + " #}",
    "one range": "{% for i in range(10**9) %}x{% endfor %}",
    "blocks in blocks": "{% for a in [1] %}" * 40 + "{% endfor %}" * 40,
}


@pytest.mark.parametrize("bomb", ["a long text", "a long template"])
@pytest.mark.parametrize("format", ["ollama", "gguf", "bnb4"])
def test_no_model_is_run_on_endless_prompts(cli: Cli, folder: Path, tmp_path: Path, bomb: str, format: str) -> None:
    (folder / "chat_template.jinja").write_text(BOMBS[bomb] + "{{ messages[0].content }}")
    result = cli("export", "--model", folder, "--format", format, "--output", tmp_path / "made")
    assert result.exit_code == Exit.MODEL, (result.exception, result.stderr)
    assert "chat template" in told(result)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_never_ends_is_refused(
    cli: Cli, folder: Path, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "CPU_SECONDS", 1)
    (folder / "chat_template.jinja").write_text(BOMBS[bomb] + "{{ messages[0].content }}")
    result = infer(cli, folder)
    assert result.exit_code == Exit.MODEL, (result.exception, result.stderr)
    assert "chat template" in told(result)
    assert "prompt.template" in told(result) or "refuses the messages" in told(result)


def test_a_trial_costs_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(template_trial, "_tried", set())
    fork = template_trial.os.fork
    monkeypatch.setattr(template_trial.os, "fork", lambda: (made.append(1), fork())[1])
    for _ in range(3):
        template_trial.try_template("a template", [lambda: "short"])
    assert made == [1]
