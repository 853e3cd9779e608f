"""Products of few rows against float64, and what is left to torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rounding import assert_same_but_rounding
from torch import nn
from transformers import AutoModelForCausalLM

from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder
from loratune.model.kernels import few_rows
from loratune.model.kernels.few_rows import BLOCK, MOST_ROWS, give_up_few_row_products, use_few_row_products
from loratune.model.kernels.lora_linear import _Branch, use_fused_lora

WIDTH = 40


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Small matrices are served too; the shapes of those that were."""
    served: list[tuple[int, ...]] = []
    product = few_rows._linear

    def noted(x: Any, weight: Any, bias: Any) -> Any:
        served.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(few_rows, "_linear", noted)
    return served


def layer_of(width_out: int, has_bias: bool = False) -> Any:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, width_out, bias=has_bias)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1,), (2,), (MOST_ROWS,), (1, 1), (8, 1), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("width_out", [BLOCK, 3 * BLOCK, 3 * BLOCK + 5, 7])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_a_product_is_that_of_float64_but_for_rounding(
    taken: list[Any], shape: tuple[int, ...], width_out: int, has_bias: bool
) -> None:
    layer, x = layer_of(width_out, has_bias), torch.randn(*shape, WIDTH)
    assert use_few_row_products(layer) == [layer]
    y = layer(x)
    give_up_few_row_products([layer])
    assert taken == [(width_out, WIDTH)]
    assert y.is_contiguous()
    assert_same_but_rounding(y, layer.double()(x.double()), WIDTH)
    assert len(taken) == 1


@torch.no_grad()
def test_other_products_are_left_to_torch(taken: list[Any]) -> None:
    layer, strided = layer_of(64), layer_of(64)
    strided.weight = nn.Parameter(torch.randn(WIDTH, 64).t())
    many, few = torch.randn(MOST_ROWS + 1, WIDTH), torch.randn(3, WIDTH)
    for one, x in ((layer, many), (strided, few)):
        expected = one(x)
        assert use_few_row_products(one)
        assert torch.equal(one(x), expected)
    with torch.enable_grad():
        assert layer(few).requires_grad
    assert taken == []
    assert use_few_row_products(layer_of(64).bfloat16()) == []


def test_small_matrices_are_left_to_torch() -> None:
    assert use_few_row_products(layer_of(64)) == []


def test_a_decoder_says_the_same_with_them(
    taken: list[Any], random_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32).eval()

    def said() -> list[list[int]]:
        decoder = SlotDecoder(model, slots=3)
        rows = [RunningSequence([5, 6, 7][: count + 1], Sampling(max_new_tokens=12), frozenset()) for count in range(3)]
        for row in rows:
            decoder.add(row)
        while not decoder.is_idle:
            decoder.step()
        decoder.close()
        return [row.tokens for row in rows]

    with_blocks = said()
    assert (model.config.vocab_size, model.config.hidden_size) in taken
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1 << 60)
    assert said() == with_blocks


@torch.inference_mode()
def test_an_adapter_s_branch_is_still_part_of_its_layer(
    taken: list[Any], random_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).eval()
    assert use_fused_lora(model) == 2 * 7
    use_few_row_products(base)
    fused: list[None] = []
    plain = _Branch.output
    monkeypatch.setattr(_Branch, "output", lambda *arguments: fused.append(None) or plain(*arguments))
    model(input_ids=torch.tensor([[5, 6]]))
    assert len(fused) == 2 * 7
    assert len([shape for shape in taken if 4 not in shape]) == 2 * 7 + 1
