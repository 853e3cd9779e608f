"""Matrices are rounded once per optimizer step, and anew after whatever changes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from loratune.model.kernels.rounded_weights import RoundedWeight, watch_optimizers


def weight() -> Any:
    torch.manual_seed(0)
    made = nn.Parameter(torch.randn(70, 70))
    made.grad = torch.randn(70, 70)
    return made


def test_a_weight_is_rounded_once() -> None:
    one = weight()
    rounded = RoundedWeight(one)
    first = rounded.times(1, torch.bfloat16)
    assert torch.equal(first, one.detach().bfloat16())
    assert rounded.times(1, torch.bfloat16) is first
    assert torch.equal(rounded.times(0.3, torch.bfloat16), (one.detach() * 0.3).bfloat16())
    assert torch.equal(rounded.times(1, torch.float16), one.detach().half())
    assert torch.equal(rounded.times(0.3, torch.float32), one.detach() * 0.3)
    assert rounded.times(1, torch.float32) is one


def test_what_validation_has_rounded_can_be_trained_with() -> None:
    rounded = RoundedWeight(weight())
    with torch.inference_mode():
        value = rounded.times(1, torch.bfloat16)
    x = torch.ones(1, 70, dtype=torch.bfloat16, requires_grad=True)
    (x @ value).sum().backward()
    assert not value.requires_grad


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adamw of bitsandbytes": lambda p: bitsandbytes.optim.AdamW32bit(p, lr=0.1),
    "adamw_8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.1),
}


class PastTorch(torch.optim.Optimizer):
    """Writes to the memory of its weights, as kernels of other libraries do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                one.data.sub_(one.grad)


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), lambda p: PastTorch(p)], ids=[*OPTIMIZERS, "past torch"])
def test_every_optimizer_s_step_is_noticed(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    watch_optimizers()
    one = weight()
    rounded, optimizer = RoundedWeight(one), make([one])
    for _ in range(2):
        before = rounded.times(1, torch.bfloat16).clone()
        optimizer.step()
        assert torch.equal(rounded.times(1, torch.bfloat16), one.detach().bfloat16())
        assert not torch.equal(rounded.times(1, torch.bfloat16), before)


def test_loaded_weights_and_copies_are_noticed() -> None:
    layer = nn.Linear(5, 5, bias=False)
    rounded = RoundedWeight(layer.weight)
    rounded.times(1, torch.bfloat16)
    twin = copy.deepcopy(rounded)
    layer.load_state_dict({"weight": torch.ones(5, 5)})
    assert torch.equal(rounded.times(1, torch.bfloat16), torch.ones(5, 5).bfloat16())
    with torch.no_grad():
        twin.weight.fill_(2)
    assert torch.equal(twin.times(1, torch.bfloat16), torch.full((5, 5), 2.0).bfloat16())
    assert torch.equal(rounded.times(1, torch.bfloat16), torch.ones(5, 5).bfloat16())
