"""What lora.target_modules adapts in every family, against names found by hand and by PEFT alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from pydantic import ValidationError
from tiny_models import CONFIGS, make_tiny_model, tiny_config
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.errors import LoratuneError
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.targets import check_attached, resolve_targets
from loratune.model.adapter.update_size import update_sizes
from loratune.model.architecture.roles import Role, expert_stacks
from loratune.model.config import empty_model
from loratune.model.from_folder import load_plain
from loratune.recipe.method_sections import LoraSettings
from loratune.training.reporting.expert_use import ExpertCounter

# Parts of names that are gates, routers, heads, or outside of the language model; found by reading the architectures.
NOT_ADAPTED = (
    "in_proj_a",
    "in_proj_b",
    "in_proj_ba",
    "shared_expert_gate",
    "lm_head",
    "router",
    "visual",
    "vision",
)
ATTENDING = ("self_attn", "linear_attn", "attn.", ".conv.", ".mamba.")
# PEFT turns these names into those of experts, for architectures that were converted between versions of transformers.
IN_MLP = ("gate_proj", "up_proj", "down_proj")
CONVERTED = {
    **dict.fromkeys(("qwen3_moe", "qwen3_next", "glm4_moe", "deepseek_v3"), IN_MLP),
    "mixtral": ("w1", "w2", "w3"),
}
WITH_EXPERTS = ("qwen3_moe", "qwen3_5_moe", "gpt_oss", "deepseek_v3")
IDS = torch.arange(40, 70)[None]


def linear_names(kind: str) -> list[str]:
    """All linear modules that all-linear should adapt, by their names."""
    model = empty_model(tiny_config(kind))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not any(part in name for part in NOT_ADAPTED)
        and not name.endswith(("mlp.gate", "multi_modal_projector"))
        and name.rpartition(".")[2] not in CONVERTED.get(kind, ())
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_linear_is_all_of_the_decoder_but_gates_routers_and_head(kind: str) -> None:
    targets = resolve_targets(empty_model(tiny_config(kind)), LoraSettings())
    assert sorted(targets.modules) == sorted(linear_names(kind))
    assert targets.parameters == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_has_the_projections_of_recurrent_layers_too(kind: str) -> None:
    targets = resolve_targets(empty_model(tiny_config(kind)), LoraSettings(target_modules="attention"))
    expected = [name for name in linear_names(kind) if any(part in name for part in ATTENDING)]
    assert sorted(targets.modules) == sorted(expected)
    assert {int(part) for name in targets.modules for part in name.split(".") if part.isdigit()} == {0, 1}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_attaches_is_what_was_asked_for(kind: str) -> None:
    model = empty_model(tiny_config(kind))
    asked = {*resolve_targets(model, LoraSettings()).roles}
    attached = attach_adapter(model, LoraSettings(), "base", 0)
    found = {name.partition(".lora_A")[0] for name, _ in attached.named_parameters() if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.") for name in found} == asked


@pytest.mark.parametrize("kind", WITH_EXPERTS)
def test_the_size_of_an_update_of_experts_is_that_of_peft_s_merge(kind: str, tiny_model: TinyModel) -> None:
    base, stack = tiny_model(kind), expert_stacks(empty_model(tiny_config(kind)))[0]
    settings = LoraSettings(target_modules=["attention", "experts"], rank=4)
    assert settings.dropout == 0
    model = attach_adapter(load_plain(base), settings, "base", 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    size = update_sizes(model)[stack.rpartition(".")[2]][stack]
    original = load_plain(base).get_parameter(stack).double()
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    changed = merged.get_parameter(stack).double()
    assert size == pytest.approx(float((changed - original).norm() / original.norm()), rel=1e-5)


def test_layers_restrict_full_names_and_stacks_too() -> None:
    model = empty_model(tiny_config("qwen3_moe"))
    settings = LoraSettings(target_modules=["attention", "experts"], layers="last 1")
    attached = attach_adapter(model, settings, "base", 0)
    adapted = {name for name, _ in attached.named_parameters() if "lora_A" in name}
    assert adapted
    assert all(".layers.1." in name for name in adapted)


def test_a_pattern_selects_by_full_name() -> None:
    model = empty_model(tiny_config("qwen3_5"))
    targets = resolve_targets(model, LoraSettings(target_modules=[r".*linear_attn\.in_proj_(qkv|z)"]))
    assert targets.modules == ["model.layers.0.linear_attn.in_proj_qkv", "model.layers.0.linear_attn.in_proj_z"]
    gates = resolve_targets(model, LoraSettings(target_modules=["in_proj_a"]))
    assert {*gates.roles.values()} == {Role.GATE}  # a name alone selects what groups leave out


@pytest.mark.parametrize(
    ("kind", "target", "told"),
    [
        ("qwen3", "experts", "no experts, or its class does not declare them; it has all-linear, attention, mlp"),
        ("qwen3_moe", "shared-experts", "the model has no shared-experts"),
        ("qwen3_moe", "gate", "no module is called gate; the model has q_proj"),
        ("qwen3_next", "up_proj", "PEFT takes up_proj for the matrices of all experts"),
        ("qwen3", "[", "is not a regular expression"),
    ],
)  # fmt: skip
def test_targets_that_match_nothing_or_something_else_are_refused(kind: str, target: str, told: str) -> None:
    with pytest.raises(LoratuneError) as raised:
        resolve_targets(empty_model(tiny_config(kind)), LoraSettings(target_modules=[target]))
    assert told in str(raised.value)


def test_all_targets_that_cannot_be_are_told_together() -> None:
    with pytest.raises(LoratuneError) as raised:
        resolve_targets(empty_model(tiny_config("qwen3")), LoraSettings(target_modules=["[", "ffn", "q_proj"]))
    title, expression, name = str(raised.value).splitlines()
    assert title == "lora.target_modules:"
    assert "'[' is not a regular expression: unterminated character set at position 0" in expression
    assert "no module is called ffn" in name


def test_dora_is_refused_where_no_merge_has_it() -> None:
    model = empty_model(tiny_config("gpt2"))
    with pytest.raises(LoratuneError, match=r"lora\.use_dora: gpt2 holds its matrices as"):
        resolve_targets(model, LoraSettings(use_dora=True))
    assert resolve_targets(model, LoraSettings()).is_transposed


def test_what_is_left_out_is_told() -> None:
    targets = resolve_targets(empty_model(tiny_config("qwen3_next")), LoraSettings())
    assert targets.left_out == (
        "down_proj, gate_proj, up_proj, which PEFT takes for experts of this architecture",
        "routed experts (add experts to lora.target_modules)",
        "routers",
        "gates",
    )
    assert resolve_targets(empty_model(tiny_config("qwen3")), LoraSettings()).left_out == ()


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"use_dora": True}])
def test_what_an_adapter_of_experts_cannot_have_is_refused_with_the_recipe(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"leave {next(iter(settings))} out, or experts out of target_modules"):
        LoraSettings(target_modules=["experts"], **settings)


def test_a_target_without_an_adapter_is_seen() -> None:
    model = empty_model(tiny_config("qwen3_moe"))
    targets = resolve_targets(model, LoraSettings())
    attached = attach_adapter(model, LoraSettings(), "base", 0)
    check_attached(attached, targets)
    attention = attached.base_model.model.model.layers[1].self_attn
    attention.q_proj = attention.q_proj.base_layer
    with pytest.raises(LoratuneError, match="q_proj has no adapter"):
        check_attached(attached, targets)


def test_experts_that_get_tokens_are_counted(tmp_path: Path) -> None:
    model = load_plain(make_tiny_model("qwen3_moe", tmp_path / "base", num_experts=16))
    counter = ExpertCounter(model)  # type: ignore[arg-type]
    assert counter.use is None
    counter.on_train_begin()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:  # type: ignore[attr-defined]
        layer.mlp.gate.register_forward_hook(lambda *seen: chosen.append(seen[2][-1]))
    with torch.no_grad():
        model(input_ids=IDS[:, :3])
    counter.on_train_end()
    assert counter.use is not None
    assert counter.use.all == 32
    assert counter.use.used == sum(len(set(numbers.flatten().tolist())) for numbers in chosen) < 32
