"""Names and expressions in an adapter's config: what PEFT finds with them, within bounds."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.files import MOST_PATTERNS, read_config_values
from loratune.model.adapter.patterns import as_expressions, settle_patterns, targeted

Cli = Callable[..., Result]
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
MODULES = ["model.embed_tokens", *(f"model.layers.{n}.{part}" for n in range(12) for part in PARTS), "lm_head"]
BASE = {f"{name}.weight": (8, 8) for name in MODULES} | {"model.norm.weight": (8,)}
# Each needs more time than there is; the first is what has hung every command.
EVIL = [
    r"(([a-z_.0-9]+)*)*!",
    r"(?:\w|\w\w|.)*[A-Z]",
    r"((((.{1,1000}){1,1000}){1,1000}){1,1000})[A-Z]",
    r"(?:(?:.{0,5}){0,5}){0,5}[A-Z]",
    r"(?:.|(?R))*[A-Z]",
]
PATTERN_KEYS = ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]


def values(**settings: Any) -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **settings}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": r"(?:.*?(?:language|layers).*?(?:self_attn|mlp).*?(?:k_proj|down_proj).*?)|(?:\blm_head)"},
        {"target_modules": r"model\.layers\.[\d]{1,}\.mlp\.(?:up_proj)"},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "lay[a-z]+"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "x+"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
)
def test_the_modules_are_those_that_peft_finds(settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**settings)
    expected = [name for name in MODULES if check_target_module_exists(config, name) is True] or [
        name for name in MODULES if isinstance(check_target_module_exists(config, name), re.Match)
    ]
    settled = settle_patterns(values(**settings), BASE, tmp_path)
    assert targeted(settled, BASE) == expected
    handed = {key: settled[key] for key in settings}
    again = LoraConfig(**handed)  # PEFT finds the same with what it is handed
    assert [name for name in MODULES if check_target_module_exists(again, name) is True] == expected


def test_all_linear_means_the_matrices_without_embedding_and_head(tmp_path: Path) -> None:
    settled = settle_patterns(values(target_modules="all-linear"), BASE, tmp_path)
    assert targeted(settled, BASE) == MODULES[1:-1]


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 4, "up_proj": 2},
        {"model.layers.1.self_attn.q_proj": 4, "q_proj": 2},
        {"layers.1.self_attn.q_proj": 4},
        {r"layers\.(1|2)\..*": 4, r".*": 1},
        {r"^model\.layers\.1\.mlp\.up_proj": 4},
        {"_proj": 4},
    ],
)
def test_ranks_are_those_that_peft_finds(patterns: dict[str, int], tmp_path: Path) -> None:
    settled = settle_patterns(values(rank_pattern=patterns), BASE, tmp_path)["rank_pattern"]
    handed = as_expressions(settled)
    for name in MODULES:
        expected = patterns.get(get_pattern_key(list(patterns), name), 8)
        assert settled.get(name, 8) == expected
        assert handed.get(get_pattern_key(list(handed), name), 8) == expected


@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
)
@pytest.mark.parametrize("expression", EVIL)
def test_an_expression_has_seconds(key: str, expression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.model.adapter.patterns.SECONDS", 0.3)
    given = {expression: 8} if key.endswith(("rank_pattern", "alpha_pattern")) else expression
    settings = values(**{key: given}) | ({"layers_to_transform": [1]} if key == "layers_pattern" else {})
    start = time.process_time()
    with contextlib.suppress(LoratuneError):  # the engine sees through some at once, as `re` does not
        settle_patterns(settings, BASE, tmp_path)
    assert time.process_time() - start < 3


def test_an_expression_that_takes_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.model.adapter.patterns.SECONDS", 0.3)
    with pytest.raises(LoratuneError, match="takes too long") as raised:
        settle_patterns(values(rank_pattern={EVIL[1]: 8}), BASE, tmp_path)
    assert raised.value.exit_code == Exit.MODEL


@pytest.mark.parametrize("expression", ["(", "(" * 5000 + ")" * 5000, "a**", r"\N{x}"])
def test_an_expression_that_is_none_is_told(expression: str, tmp_path: Path) -> None:
    with pytest.raises(LoratuneError, match="cannot be read") as raised:
        settle_patterns(values(rank_pattern={expression: 8}), BASE, tmp_path)
    assert len(str(raised.value)) < 1000


# --- by every command ---


@pytest.fixture
def adapter(short_run: Path, tmp_path: Path) -> Path:
    """A plain adapter of random_qwen that a test may damage."""
    return shutil.copytree(short_run / "adapter", tmp_path / "adapter")


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refusal(cli: Cli, command: str, adapter: Path, base: Path, tmp_path: Path) -> str:
    """What a command says of an adapter that it refuses within seconds."""
    given = ["--adapter", adapter, "--base-model", base]
    arguments = {
        "infer": ["infer", *given, "--prompt", "x", "--max-new-tokens", 2],
        "merge": ["merge", *given, "--output", tmp_path / "out"],
        "merge --no-logits": ["merge", *given, "--no-logits", "--output", tmp_path / "out"],
        "adapter": ["export", *given, "--format", "adapter", "--output", tmp_path / "out"],
        "gguf": ["export", *given, "--format", "gguf", "--output", tmp_path / "out"],
    }[command]
    start = time.process_time()
    result = cli(*arguments)
    assert result.exit_code == Exit.MODEL, (result.exception, result.stderr)
    assert time.process_time() - start < 30
    assert not (tmp_path / "out").exists()
    return " ".join(result.stderr.split())


TOO_MANY = {f"model.layers.{n}.self_attn.q_proj": 4 for n in range(20_000)}
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "20,000 patterns": ({"rank_pattern": TOO_MANY}, f"at most {MOST_PATTERNS:,}"),
    "20,000 names": ({"target_modules": list(TOO_MANY)}, f"at most {MOST_PATTERNS:,}"),
    "an endless expression": ({"rank_pattern": {"(" + "a" * 30_000: 8}}, "at most 20,000 characters"),
    "alpha beyond all": ({"lora_alpha": 1e308}, "lora_alpha is 1e+308; an alpha is a number from 0"),
    "alpha that no float holds": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "alpha below zero": ({"lora_alpha": -16}, "lora_alpha is -16"),
    "alpha that is none": ({"lora_alpha": float("nan")}, "lora_alpha is NaN"),
    "alpha as text": ({"lora_alpha": "16"}, 'lora_alpha is "16"'),
    "no rank": ({"r": 0}, "r is 0; a rank is a whole number from 1"),
    "a giant rank": ({"r": 10**9}, "r is 1000000000; a rank is a whole number"),
    "a rank like a truth": ({"r": True}, "r is true"),
    "a giant rank of one module": ({"rank_pattern": {"q_proj": 10**9}}, "a rank is a whole number from 1"),
    "an expression to save": ({"modules_to_save": ["(a+)+$"]}, "modules_to_save"),
    "layers without end": ({"layers_to_transform": [10**9]}, "layers_to_transform"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type is"),
    "code of Megatron": ({"megatron_core": "evil.module"}, "megatron_core is"),
    "arrows": ({"arrow_config": {"top_k": 3}}, "arrow_config is set"),
    "an unknown key": ({"zzz": 1}, "zzz is set"),
    "a class of its own": ({"custom_module": "evil.Linear"}, "custom_module is set"),
    "code": ({"auto_map": {"x": "evil.X"}}, "auto_map is set"),
    "a switch as text": ({"use_dora": "yes"}, "use_dora is"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_settings_are_refused(cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path, odd: str) -> None:
    settings, words = ODD[odd]
    edit(adapter, **settings)
    told = refusal(cli, "merge --no-logits", adapter, random_qwen, tmp_path)
    assert words in told
    assert len(told) < 1000


@pytest.mark.parametrize("command", ["infer", "adapter"])
@pytest.mark.parametrize("odd", ["20,000 patterns", "alpha beyond all", "an unknown key", "arrows", "a classifier"])
def test_odd_settings_are_refused_alike_by_other_commands(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path, odd: str, command: str
) -> None:
    settings, words = ODD[odd]
    edit(adapter, **settings)
    assert words in refusal(cli, command, adapter, random_qwen, tmp_path)


@pytest.mark.parametrize("command", ["infer", "merge --no-logits", "adapter"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"peft_type": "LORA", "r": ' + "[" * 100_000, "nested too deeply"),
        ("{}", "not a LoRA adapter"),
        ("5", "not a JSON object"),
        ("", "cannot be read"),
    ],
    ids=["deep", "deep inside", "empty object", "a number", "nothing"],
)
def test_a_config_that_is_none_is_refused(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path, content: str, words: str, command: str
) -> None:
    (adapter / "adapter_config.json").write_text(content)
    assert words in refusal(cli, command, adapter, random_qwen, tmp_path)


def test_a_config_of_more_bytes_than_any_is_not_read(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path
) -> None:
    with (adapter / "adapter_config.json").open("r+b") as file:
        file.truncate(10**9)
    assert "1,000,000,000 bytes" in refusal(cli, "infer", adapter, random_qwen, tmp_path)


@pytest.mark.parametrize("command", ["infer", "merge", "gguf"])
def test_an_expression_that_never_ends_is_refused_by_every_command(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.model.adapter.patterns.SECONDS", 0.5)
    edit(adapter, rank_pattern={EVIL[1]: 8})
    assert "rank_pattern: the expression" in refusal(cli, command, adapter, random_qwen, tmp_path)


def test_a_rank_for_which_there_are_no_tensors_takes_no_memory(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path
) -> None:
    names = ["q_proj", "embed_tokens", "lm_head"]
    edit(adapter, target_modules=names, rank_pattern=dict.fromkeys(names[1:], 65_536))
    told = refusal(cli, "infer", adapter, random_qwen, tmp_path)
    assert "its config and its tensors do not match" in told


def test_an_adapter_with_expressions_answers_as_with_names(random_qwen: Path, adapter: Path) -> None:
    from loratune.model.adapter.attach import load_adapter  # PEFT: seconds

    def logits(folder: Path) -> torch.Tensor:
        model = load_adapter(AutoModelForCausalLM.from_pretrained(random_qwen), folder)
        with torch.inference_mode():
            found: torch.Tensor = model(torch.tensor([[5, 6, 7]])).logits
        return found

    expected = logits(adapter)
    known = read_config_values(adapter)
    names = "|".join(known["target_modules"])
    edit(adapter, target_modules=rf".*\.({names})", rank_pattern={r".*\.\d+\..*": known["r"]})
    assert load_file(adapter / "adapter_model.safetensors")
    torch.testing.assert_close(logits(adapter), expected)
