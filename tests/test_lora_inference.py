"""LoRA layers in inference mode, with an adapter per row, against PEFT's own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import give_back_forwards
from operators import OperatorCount
from peft import LoraConfig, get_peft_model
from rounding import assert_same_but_rounding
from torch import nn

from loratune.model.adapter.own_parameters import BASE
from loratune.model.kernels import lora_inference
from loratune.model.kernels.lora_linear import use_fused_lora

IN, OUT, RANK = 24, 40, 5
TERMS = IN + 3 * RANK
NAMES = [["one"], ["one", "two", BASE, "one"], [BASE, "two", "two"], [BASE, "absent"], ["one", "absent"]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.other = nn.Linear(IN, OUT)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def adapted(dtype: torch.dtype, **settings: Any) -> Any:
    """A layer with adapters of different rank and scaling, and an adapter that leaves it out."""
    torch.manual_seed(0)
    made = {"r": RANK, "lora_alpha": 7, "target_modules": ["layer"], "init_lora_weights": False} | settings
    model = get_peft_model(Net().to(dtype), LoraConfig(**made), adapter_name="one")
    model.add_adapter("two", LoraConfig(**(made | {"r": 2, "lora_alpha": 3})))
    model.add_adapter("absent", LoraConfig(**(made | {"target_modules": ["other"]})))
    model.set_adapter("one")
    return model.eval()


def pair(dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    """The model under test, and PEFT's own in float64."""
    model = adapted(dtype, **settings)
    reference = copy.deepcopy(model).double()
    assert use_fused_lora(model) == 1
    give_back_forwards(reference)
    return model, reference


@torch.inference_mode()
def both(model: Any, reference: Any, x: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    how = {"adapter_names": names} if len(set(names)) > 1 else {}
    return model(x, **how), reference(x.double(), **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
def test_each_row_gets_its_own_adapter(dtype: torch.dtype, names: list[str], shape: tuple[int, ...]) -> None:
    model, reference = pair(dtype)
    found, expected = both(model, reference, torch.randn(len(names), *shape, IN).to(dtype), names)
    assert found.dtype == dtype
    assert_same_but_rounding(found, expected, TERMS)


@pytest.mark.parametrize("names", NAMES[:2], ids="-".join)
def test_a_changed_matrix_is_rounded_again(names: list[str]) -> None:
    model, reference = pair(torch.bfloat16)
    x = torch.randn(len(names), IN).bfloat16()
    for change in (
        lambda layer: layer.lora_A["one"].weight.copy_(torch.ones(RANK, IN)),
        lambda layer: layer.lora_B["one"].load_state_dict({"weight": torch.ones(OUT, RANK)}),
        lambda layer: layer.scaling.update({"one": 3.0}),
        lambda layer: setattr(layer.lora_B["one"], "weight", nn.Parameter(torch.full((OUT, RANK), 2.0))),
        lambda layer: None,
    ):
        found, expected = both(model, reference, x, names)
        assert_same_but_rounding(found, expected, TERMS)
        for one in (model, reference):
            with torch.no_grad():
                change(one.base_model.model.layer)
        reference.double()
    assert not torch.equal(both(model, reference, x, names)[0], both(*pair(torch.bfloat16), x, names)[0])


@pytest.mark.parametrize("names", NAMES[:2], ids="-".join)
def test_no_matrix_is_rounded_twice(names: list[str]) -> None:
    model, reference = pair(torch.bfloat16)
    x = torch.randn(len(names), IN).bfloat16()
    both(model, reference, x, names)
    with OperatorCount() as counted, torch.inference_mode():
        model(x, **({"adapter_names": names} if len(names) > 1 else {}))
    assert "_to_copy" not in counted.names
    assert counted.names.total() <= 3 + 2 * (len(names) > 1)


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"use_dora": True}, ["one"]), ({"lora_bias": True}, NAMES[1]), ({"lora_dropout": 0.5}, NAMES[1])],
    ids=str,
)
def test_what_is_not_just_a_branch_is_left_to_peft(settings: dict[str, Any], names: list[str]) -> None:
    model = adapted(torch.float32, **settings)
    reference = copy.deepcopy(model).double()
    use_fused_lora(model)
    found, expected = both(model, reference, torch.randn(len(names), 2, IN), names)
    assert_same_but_rounding(found, expected, 4 * TERMS)


@pytest.mark.filterwarnings("ignore:Already unmerged")  # the layer that has no active adapter
def test_hooks_disabled_and_merged_adapters_are_peft_s_business(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair(torch.float32)
    x = torch.randn(4, IN)

    def fail(*_: Any) -> None:
        raise AssertionError("computed here")

    monkeypatch.setattr(lora_inference, "_stack", fail)
    with model.disable_adapter(), reference.disable_adapter():
        assert_same_but_rounding(*both(model, reference, x, ["one"]), TERMS)
    for one in (model, reference):
        one.merge_adapter()
    assert_same_but_rounding(*both(model, reference, x, ["one"]), TERMS)
    for one in (model, reference):
        one.unmerge_adapter()
    hook = model.base_model.model.layer.lora_B["one"].register_forward_hook(lambda *arguments: arguments[2])
    assert_same_but_rounding(*both(model, reference, x, NAMES[1]), TERMS)
    hook.remove()
    with pytest.raises(AssertionError, match="computed here"):
        both(model, reference, x, NAMES[1])
