"""What vLLM cannot serve, on adapters that PEFT has written, and the command that serves the rest."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratune.delivery.export.servers.plan import ServerAdvice, check_for, require_servable, serve_command
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.completeness import tensor_shapes
from loratune.runs.opening import open_adapter

# PEFT warns of merging where embeddings and head share one matrix; that is not what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.fixture
def adapter(random_qwen: Path, tmp_path: Path) -> Callable[..., Path]:
    """Have PEFT write an adapter of the random model."""

    def write(**settings: Any) -> Path:
        trained = {"init_lora_weights": False}  # else it would change nothing, which no merge takes
        settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], **trained, **settings}
        model = AutoModelForCausalLM.from_pretrained(random_qwen)
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=False
        )
        return tmp_path / "adapter"

    return write


@pytest.mark.parametrize(
    ("settings", "max_lora_rank"),
    [
        ({}, 8),
        ({"r": 1}, 8),
        ({"r": 16}, 16),
        ({"r": 24}, 32),
        ({"r": 500}, 512),
        ({"r": 24, "use_rslora": True}, 32),
        ({"target_modules": "all-linear"}, 8),
        ({"layers_to_transform": [1]}, 8),
        ({"rank_pattern": {"down_proj": 40}, "alpha_pattern": {"down_proj": 80}}, 64),
    ],
)
def test_plain_adapters_are_served_with_the_next_allowed_rank(
    adapter: Callable[..., Path], settings: dict[str, Any], max_lora_rank: int
) -> None:
    found = require_servable("vllm", open_adapter(adapter(**settings)), Path("out"))
    assert found == ServerAdvice("vllm", max_lora_rank, [], [])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"trained in full \(modules_to_save: lm_head\)"),
        ({"bias": "lora_only"}, r"bias: lora_only"),
        ({"r": 513}, "rank 513, where 512 is the most"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "LoRA on lm_head"),
        ({"rank_pattern": {"down_proj": 40}}, r"2 modules with another alpha / rank.*model\.layers\.0\.mlp\.down_proj"),
        ({"alpha_pattern": {r"layers\.1\..*q_proj": 64}}, r"1 modules with another.*layers\.1\.self_attn\.q_proj"),
    ],
)
def test_what_cannot_be_served_is_told(adapter: Callable[..., Path], settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(LoratuneError, match=problem) as raised:
        require_servable("vllm", open_adapter(adapter(**settings)), Path("out"))
    assert raised.value.exit_code == Exit.MODEL
    assert "loratune merge" in str(raised.value)
    assert len(check_for("vllm", adapter(**settings)).problems) == 1


def test_all_problems_are_told_at_once(adapter: Callable[..., Path]) -> None:
    folder = adapter(use_dora=True, bias="all", r=600, target_modules=["embed_tokens", "q_proj"])
    assert len(check_for("vllm", folder).problems) == 4


def test_tensors_of_an_unknown_kind_are_a_problem(adapter: Callable[..., Path]) -> None:
    folder = adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file(tensors | {name: next(iter(tensors.values())).clone()}, folder / "adapter_model.safetensors")
    assert check_for("vllm", folder).problems == [f"1 tensor not of LoRA, first {name}"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_a_config_alone_tells_is_a_problem(
    adapter: Callable[..., Path], settings: dict[str, Any], problem: str
) -> None:
    folder = adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    assert [problem in told for told in check_for("vllm", folder).problems] == [True]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"lora_alpha": None}, "lora_alpha is null"), ({"r": "eight"}, 'r is "eight"'), ({"r": 0}, "r is 0; a rank is")],
)
def test_a_config_without_rank_or_alpha_is_an_error(
    adapter: Callable[..., Path], settings: dict[str, Any], problem: str
) -> None:
    folder = adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(LoratuneError, match=problem):
        check_for("vllm", folder)


def test_modules_of_other_architectures_are_warned_of(adapter: Callable[..., Path]) -> None:
    folder = adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "query_key_value"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    advice = check_for("vllm", folder)
    assert not advice.problems
    assert "query_key_value" in advice.warnings[0]


def test_a_damaged_adapter_is_an_error(adapter: Callable[..., Path]) -> None:
    folder = adapter()
    (folder / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(LoratuneError, match="damaged: Error while deserializing header"):
        check_for("vllm", folder)


def test_the_command_is_quoted_for_a_shell() -> None:
    command = serve_command("Qwen/Qwen2.5-7B-Instruct", "faq", Path("out/my faq"), ServerAdvice("vllm", 32, [], []))
    assert shlex.split(command.line) == [
        "vllm", "serve", "Qwen/Qwen2.5-7B-Instruct", "--enable-lora", "--lora-modules", "faq=out/my faq",
        "--max-lora-rank", "32",
    ]  # fmt: skip


def test_the_command_takes_a_template_and_paths_with_signs_of_its_own() -> None:
    template = Path("out/chat_template.jinja")
    words = shlex.split(serve_command("base", "faq", Path("out/a=1,b"), ServerAdvice("vllm", 8, [], []), template).line)
    assert json.loads(words[5]) == {"name": "faq", "path": "out/a=1,b"}
    assert words[-2:] == ["--chat-template", "out/chat_template.jinja"]


def test_a_pipe_in_the_place_of_the_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoratuneError, match=r"no adapter_model\.safetensors in it"):
        tensor_shapes(tmp_path)
