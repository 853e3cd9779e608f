"""Products of few rows against float64, and what is left to torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_same_but_rounding
from torch.nn import functional
from transformers import AutoModelForCausalLM

from loratune.model import few_rows
from loratune.model.decoder import Decoder, Running
from loratune.model.few_rows import BLOCK, MOST_ROWS, FewRowProducts
from loratune.model.sampling import Sampling

WIDTH = 40


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Small matrices are served too; the shapes of those that were."""
    served: list[tuple[int, ...]] = []
    product = few_rows._linear

    def noted(x: Any, weight: Any, *others: Any) -> Any:
        served.append(tuple(weight.shape))
        return product(x, weight, *others)

    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(few_rows, "_linear", noted)
    return served


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1,), (2,), (MOST_ROWS,), (1, 1), (8, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("width_out", [BLOCK, 3 * BLOCK, 3 * BLOCK + 5, 7])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_a_product_is_that_of_float64_but_for_rounding(
    taken: list[Any], shape: tuple[int, ...], width_out: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, WIDTH), torch.randn(width_out, WIDTH)
    bias = torch.randn(width_out) if has_bias else None
    with FewRowProducts():
        y = functional.linear(x, weight, bias)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert taken == [(width_out, WIDTH)]
    assert y.is_contiguous()
    assert_same_but_rounding(y, exact, WIDTH)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(MOST_ROWS + 1, WIDTH), torch.randn(64, WIDTH)),
        (torch.randn(3, WIDTH, dtype=torch.bfloat16), torch.randn(64, WIDTH, dtype=torch.bfloat16)),
        (torch.randn(3, WIDTH), torch.randn(WIDTH, 64).t()),
    ],
    ids=["many rows", "bfloat16", "strided"],
)
def test_other_products_are_left_to_torch(taken: list[Any], x: Any, weight: Any) -> None:
    with torch.no_grad(), FewRowProducts():
        assert torch.equal(functional.linear(x, weight), x @ weight.t())
    assert taken == []


def test_so_are_those_with_gradients_and_small_matrices() -> None:
    x, weight = torch.randn(3, WIDTH), torch.randn(64, WIDTH, requires_grad=True)
    with FewRowProducts():
        assert functional.linear(x, weight).requires_grad
        with torch.no_grad():
            assert torch.equal(functional.linear(x, weight), x @ weight.t())


def test_a_decoder_says_the_same_with_them(
    taken: list[Any], random_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32).eval()

    def said() -> list[list[int]]:
        decoder = Decoder(model, slots=3)
        rows = [Running([5, 6, 7][: count + 1], Sampling(max_new_tokens=12), frozenset()) for count in range(3)]
        for row in rows:
            decoder.add(row)
        while not decoder.is_idle:
            decoder.step()
        decoder.close()
        return [row.tokens for row in rows]

    with_blocks = said()
    assert (model.config.vocab_size, model.config.hidden_size) in taken
    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1 << 60)
    assert said() == with_blocks
