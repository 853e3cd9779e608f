"""What is said of a finished adapter, against plain arithmetic and against runs that went wrong on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.model.update_size import update_sizes
from loratune.training.health import GradientFlow, examine


@pytest.fixture
def adapted(random_qwen: Path) -> Any:
    """A model with an adapter of random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def losses(**values: list[float]) -> Any:
    """Metrics with these courses."""
    return SimpleNamespace(of=lambda name: list(enumerate(values.get(name, []))))


def test_sizes_are_those_of_the_products(adapted: Any) -> None:
    sizes = update_sizes(adapted)
    assert sizes.keys() == {"q_proj", "down_proj"}
    for name, size in sizes.items():
        expected = []
        for path, module in adapted.named_modules():
            if path.endswith(name):
                update = module.get_delta_weight("default").detach()
                expected.append(float(update.norm() / module.base_layer.weight.norm()))
        assert size.modules == len(expected) == 2
        assert size.largest == pytest.approx(max(expected), rel=1e-5)
        assert size.median == pytest.approx(sorted(expected)[0], rel=1e-5)  # torch's median of two is the lower
        assert (size.unchanged, size.not_finite) == ([], [])


def test_dead_and_broken_modules_are_named(adapted: Any) -> None:
    layers = adapted.base_model.model.model.layers
    layers[0].self_attn.q_proj.lora_B["default"].weight.data.zero_()
    layers[1].mlp.down_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    health = examine(adapted, GradientFlow(), losses())
    assert health.updates["q_proj"].unchanged == ["model.layers.0.self_attn.q_proj"]
    assert health.updates["down_proj"].not_finite == ["model.layers.1.mlp.down_proj"]
    text = "\n".join(health.sentences)
    assert "1 module (model.layers.1.mlp.down_proj) with NaN" in text
    assert "1 module (model.layers.0.self_attn.q_proj) unchanged" in text


def test_an_adapter_that_hardly_changes_anything_is_told(adapted: Any) -> None:
    assert examine(adapted, GradientFlow(), losses()).sentences == []
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(1e-6)
    (sentence,) = examine(adapted, GradientFlow(), losses()).sentences
    assert "hardly changes the model" in sentence


@pytest.mark.parametrize(
    ("training", "validation", "is_told"),
    [
        ([3, 2, 1, 0.5], [3, 2, 2.5], True),
        ([3, 2, 1, 0.5], [3, 2, 2.05], False),
        ([3, 2, 1, 0.5], [3, 2, 1.5], False),
        ([1, 2, 3, 4], [3, 2, 2.5], False),
        ([3, 2, 1, 0.5], [3, 4], False),
    ],
)
def test_validation_that_rises_while_training_falls_is_overfitting(
    adapted: Any, training: list[float], validation: list[float], is_told: bool
) -> None:
    health = examine(adapted, GradientFlow(), losses(loss=training, validation_loss=validation))
    assert any("overfitting" in sentence for sentence in health.sentences) == is_told


def test_modules_that_no_gradient_reaches_are_named(adapted: Any) -> None:
    for _, weight in adapted.named_parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    layers = adapted.base_model.model.model.layers
    layers[0].mlp.down_proj.lora_B["default"].weight.grad = None
    layers[1].mlp.down_proj.lora_B["default"].weight.grad.zero_()
    layers[1].self_attn.q_proj.lora_A["default"].weight.grad.zero_()  # as it is in every first step
    flow = GradientFlow()
    flow.on_pre_optimizer_step(None, None, None, model=adapted)
    assert flow.missing == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_reports_its_health(
    cli: Callable[..., Result], rows_file: Path, tmp_path: Path, quantization: str
) -> None:
    result = cli(
        "sft", "--model.base", "tiny-qwen", "--model.quantization", quantization, "--data.train", rows_file,
        "--training.steps", "3", "--training.learning_rate", "1e-3", "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    health = json.loads((tmp_path / "run" / "report.json").read_text())["health"]
    assert health["without_gradient"] == health["sentences"] == []
    assert set(health["updates"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(0 < size["median"] <= size["largest"] < 0.5 for size in health["updates"].values())
    assert "of the weights' norm" in result.stderr
