"""The fused LoRA layer against PEFT's own forward and backward, and against explicit formulas."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import give_back_forwards
from operators import count, fake_gpu
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import assert_same_but_rounding
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from loratune.model.kernels import lora_linear
from loratune.model.kernels.lora_linear import _draw_mask, _long_product, use_fused_lora
from loratune.model.weights.dequantised import held_weight, inputs_unrounded
from loratune.model.weights.int8_linear import complete_int8

IN, HIDDEN, OUT = 6, 10, 7
TERMS = 64
"""Of the longest way through a Net's sums: both layers with rank 3 to 16, back again, and up to 10 rows."""


class Net(nn.Module):
    """Two linear layers of different shapes, one with and one without bias, and a table of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, IN)
        self.first = nn.Linear(IN, HIDDEN)
        self.second = nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x: Any) -> Any:
        x = x if x.is_floating_point() else self.table(x)
        return self.second(torch.tanh(self.first(x)))


def net_with(dtype: Any = torch.float32, **settings: Any) -> Any:
    """A Net with an adapter whose matrices are all filled."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], **settings})
    model = get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=True)
    return filled(model)


def filled(model: Any) -> Any:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model


def layer_of(model: Any, name: str = "first") -> Any:
    return model.base_model.model.get_submodule(name)


def pair(**settings: Any) -> tuple[Any, Any]:
    """The same model computed by PEFT and fused."""
    own = net_with(**settings)
    fused = copy.deepcopy(own)
    use_fused_lora(fused)
    return own, fused


def inputs(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randn(*shape, dtype=dtype)


def run(model: Any, x: torch.Tensor, call: Callable[..., Any] | None = None) -> dict[str, torch.Tensor]:
    """Output and gradients of input and parameters, by name."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = call(model, x) if call else model(x)
    torch.manual_seed(11)
    y.backward(torch.randn(y.shape).to(torch.bfloat16).to(y.dtype))  # the same for every dtype
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_same(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], terms: int = TERMS, dtype: Any = None
) -> None:
    """Up to rounding, or to the bit with no terms."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_but_rounding(got[name], tensor, terms, name, dtype)


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the size of what is expected."""
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"r": 16}], ids=["plain", "rslora", "wide"])
@pytest.mark.parametrize("shape", [(5, IN), (2, 4, IN), (IN,), (0, IN)], ids=str)
def test_output_and_gradients_are_those_of_peft(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    own, fused = pair(**settings)
    expected = run(copy.deepcopy(own).double(), inputs(*shape).double())
    assert len(expected) == 6  # output, input, two matrices of two layers
    assert_same(run(own, inputs(*shape)), expected)
    assert_same(run(fused, inputs(*shape)), expected)


def test_a_strided_input_and_a_spread_gradient_give_the_same() -> None:
    own, fused = pair()
    x = inputs(IN, 5, 2).permute(2, 1, 0)
    assert not x.is_contiguous()
    results = []
    for model in (own, fused):
        model.zero_grad()
        model(x).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(results[1], results[0])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    own, fused = pair(bias="all")
    layer_of(own).lora_A.requires_grad_(False)
    layer_of(fused).lora_A.requires_grad_(False)
    expected = run(own, inputs(3, IN))
    assert any(name.endswith("first.base_layer.bias") for name in expected)
    assert not any("first.lora_A" in name for name in expected)
    assert_same(run(fused, inputs(3, IN)), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_nothing(dropout: float) -> None:
    model = net_with(lora_dropout=dropout).train()
    assert use_fused_lora(model) == 2
    torch.manual_seed(5)
    expected = run(model, inputs(4, IN))
    torch.manual_seed(5)
    assert_same(run(model, inputs(4, IN), lambda m, x: checkpoint(m, x, use_reentrant=False)), expected, terms=0)


def test_gradients_agree_with_differences() -> None:
    model = net_with(dtype=torch.float64, bias="all")
    assert use_fused_lora(model) == 2
    layer = layer_of(model)
    matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.bias]
    x = inputs(2, 3, IN, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *matrices))


def test_dropout_keeps_the_expected_share_and_the_expected_sum() -> None:
    model = net_with(lora_dropout=0.25, target_modules=["first"]).train()
    use_fused_lora(model)
    layer = layer_of(model)
    x = inputs(1, IN).expand(20_000, IN)
    torch.manual_seed(1)
    branch = (layer(x) - layer.base_layer(x)).detach()
    layer.eval()
    exact = (layer(x[:1]) - layer.base_layer(x[:1])).detach()
    torch.testing.assert_close(branch.mean(0, keepdim=True), exact, atol=0.03, rtol=0)
    assert branch.std(0).min() > 0.05


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.9])
def test_every_element_is_dropped_with_just_the_rate(rate: float) -> None:
    torch.manual_seed(2)
    rows = 200_000
    mask = _draw_mask(torch.empty(rows, 10), rate)
    dropped = 1 - mask.double().mean(0)
    assert (dropped - rate).abs().max() < 4.5 * (rate * (1 - rate) / rows) ** 0.5
    # Neighbours know nothing of each other, but for the row's rate of n/256, which is their own to a 256th.
    together = ((1 - mask[:, 0]) & (1 - mask[:, 1])).double().mean()
    assert together == pytest.approx(rate**2, abs=1 / 512**2 + 4.5 * (rate**2 / rows) ** 0.5)


@pytest.mark.parametrize(("way", "mask_dtype"), [("bytes", torch.int8), ("kernel", torch.bool)])
def test_dropout_gives_the_formula_with_its_mask(
    way: str, mask_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_linear, "_dropout", getattr(lora_linear, f"_dropout_by_{way}"))
    rate = 0.375  # far from both ends, so that the mask can be told by its share
    model = net_with(dtype=torch.float64, lora_dropout=rate, target_modules=["first"]).train()
    use_fused_lora(model)
    layer = layer_of(model)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = inputs(2, 50, IN, dtype=torch.float64).requires_grad_()
    y = layer(x)
    mask = next(t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == mask_dtype)
    assert 0.5 < mask.double().mean() < 0.75
    dropped = x * mask.view(x.shape) / (1 - rate)
    formula = layer.base_layer(x) + dropped @ down.t() @ up.t() * layer.scaling["default"]
    wanted = (x, down, up)
    weights = inputs(*y.shape, dtype=torch.float64)
    expected = torch.autograd.grad((formula * weights).sum(), wanted)
    torch.testing.assert_close(y, formula)
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), wanted), expected)


def test_dropout_follows_the_seed_and_ends_with_training() -> None:
    own, fused = pair(lora_dropout=0.5)
    own.eval()
    x = inputs(9, IN)

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        output: torch.Tensor = fused.train()(x)
        return output

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    assert not torch.equal(seeded(1), fused(x))
    torch.testing.assert_close(fused.eval()(x), own(x))


def test_smaller_base_types_lose_no_more_than_with_peft() -> None:
    own = net_with(dtype=torch.bfloat16)
    layer_of(own).lora_B["default"].weight.data.mul_(0.1)  # an update is small beside its base
    fused, reference = copy.deepcopy(own), copy.deepcopy(own).double()
    assert use_fused_lora(fused) == 2
    x = inputs(400, IN, dtype=torch.bfloat16)
    by_peft, by_us = run(layer_of(own), x), run(layer_of(fused), x)
    exact = run(layer_of(reference), x.double())
    assert error_of(by_us["y"], exact["y"]) <= 1.03 * error_of(by_peft["y"], exact["y"])
    assert error_of(by_us["x"], exact["x"]) <= 1.1 * error_of(by_peft["x"], exact["x"])
    for name in exact:
        assert by_us[name].dtype == by_peft[name].dtype
        assert error_of(by_us[name], exact[name]) < 6e-3
    assert by_us["lora_A.default.weight"].dtype == torch.float32


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    own, fused = pair()
    with torch.no_grad():
        y = fused.eval()(inputs(3, IN))
        torch.testing.assert_close(y, own.eval()(inputs(3, IN)))
    assert y.grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(fused(inputs(3, IN)), own(inputs(3, IN)))


def test_autocast_is_left_to_peft() -> None:
    own, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(fused, inputs(4, IN)), run(own, inputs(4, IN)), terms=0)


def quantised(dtype: Any, make: Callable[[nn.Linear], Any], flag: str) -> Any:
    """A Net whose linear layers are quantised, with an adapter.

    Args:
        dtype: of the Net.
        make: makes an empty quantised layer for a plain one.
        flag: by which PEFT sees that a model is quantised.
    """
    torch.manual_seed(0)
    net = Net().to(dtype)
    for name in ("first", "second"):
        old = net.get_submodule(name)
        new = make(old)
        new.load_state_dict(old.state_dict())
        setattr(net, name, new.to("cpu"))
    complete_int8(net)
    setattr(net, flag, True)
    return filled(get_peft_model(net, LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"])))


def four_bit(compute_dtype: Any, double: bool) -> Any:
    """A Net whose linear layers are quantised to nf4, with an adapter."""
    bnb = importlib.import_module("bitsandbytes")

    def make(old: nn.Linear) -> Any:
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, old.bias is not None, compute_dtype, double, "nf4"
        )  # fmt: skip
        new.support_avx512bf16_for_cpu = False
        return new

    return quantised(compute_dtype, make, "is_loaded_in_4bit")


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("dtype", "terms"), [(torch.float32, TERMS), (torch.bfloat16, 4)], ids=str)
def test_four_bit_layers_give_what_peft_gives(dtype: Any, terms: int, double: bool) -> None:
    own = four_bit(dtype, double)
    fused = four_bit(dtype, double)
    assert use_fused_lora(fused) == 2
    expected = run(own, inputs(2, 5, IN, dtype=dtype))
    assert len(expected) == 6
    # Sums are float32 in either dtype; in bfloat16 it is the results of four products that are rounded.
    assert_same(run(fused, inputs(2, 5, IN, dtype=dtype)), expected, terms, dtype)


def test_four_bit_layers_keep_no_dense_weight() -> None:
    model = four_bit(torch.float32, double=False)
    use_fused_lora(model)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_of(model)(inputs(2, IN).requires_grad_())
    assert sorted(t.numel() for t in kept) == [2 * 3, 2 * IN, 3 * IN, 3 * HIDDEN]


def test_four_bit_layers_with_another_compute_dtype_are_left_to_peft() -> None:
    own, fused = four_bit(torch.float32, double=False), four_bit(torch.float32, double=False)
    use_fused_lora(fused)
    x = inputs(4, IN, dtype=torch.bfloat16)
    assert_same(run(layer_of(fused), x), run(layer_of(own), x), terms=0)


def test_four_bit_layers_that_are_repacked_after_the_first_call_are_left_to_peft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bitsandbytes changes the state of a weight in place; its packed form can only be multiplied forwards."""
    model = four_bit(torch.float32, double=False)
    use_fused_lora(model)
    x, fused = inputs(4, IN), list[None]()
    plain = lora_linear._FusedLinear.apply
    monkeypatch.setattr(lora_linear._FusedLinear, "apply", lambda *rest: fused.append(None) or plain(*rest))
    layer_of(model)(x)
    assert len(fused) == 1
    state = layer_of(model).base_layer.weight.quant_state
    monkeypatch.setattr(state, "packing_format_for_cpu", True, raising=False)
    monkeypatch.setattr(type(layer_of(model)), "forward", lambda layer, x: x)
    assert layer_of(model)(x) is x


def eight_bit(dtype: Any) -> Any:
    """A Net whose linear layers are quantised with LLM.int8, with an adapter."""
    bnb = importlib.import_module("bitsandbytes")

    def make(old: nn.Linear) -> Any:
        return bnb.nn.Linear8bitLt(old.in_features, old.out_features, old.bias is not None, False, threshold=6.0)

    return quantised(dtype, make, "is_loaded_in_8bit")


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("dtype", "terms"), [(torch.float32, TERMS), (torch.bfloat16, 4)], ids=str)
def test_eight_bit_layers_give_what_peft_gives(dtype: Any, terms: int, is_training: bool) -> None:
    """bitsandbytes multiplies by the dequantised weight in training, and by codes, with outliers apart, otherwise."""
    own, fused = eight_bit(dtype).train(is_training), eight_bit(dtype).train(is_training)
    assert use_fused_lora(fused) == 2
    x = inputs(2, 5, IN, dtype=dtype)
    x[0, 1, 2] = 20.0  # an outlier
    expected = run(own, x)
    assert len(expected) == 6
    assert_same(run(fused, x), expected, terms, dtype)


def test_checks_that_leave_the_inputs_unrounded_run_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = eight_bit(torch.float32).eval(), inputs(4, IN)
    layer = layer_of(model)
    weight = held_weight(layer.base_layer).double() + layer.get_delta_weight("default").detach().double()
    expected = x.double() @ weight.t() + layer.base_layer.bias.detach().double()
    use_fused_lora(model)
    fused, plain = list[None](), lora_linear._FusedLinear.apply
    monkeypatch.setattr(lora_linear._FusedLinear, "apply", lambda *rest: fused.append(None) or plain(*rest))
    with inputs_unrounded(model):
        assert_same_but_rounding(layer(x).detach(), expected, TERMS)
    assert len(fused) == 1
    assert error_of(layer(x).detach(), expected) > 1e-3  # with inputs rounded to 8 bits


def test_eight_bit_layers_keep_what_the_backward_pass_needs() -> None:
    """bitsandbytes keeps the input too, out of the sight of hooks, and PEFT keeps it in the adapter's dtype."""
    model = eight_bit(torch.bfloat16).train()
    use_fused_lora(model)
    x, kept = inputs(2, IN, dtype=torch.bfloat16).requires_grad_().mul(2), list[torch.Tensor]()
    input_of_layer = weakref.ref(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach().clone()), lambda t: t):
        y = layer_of(model)(x)
    assert sorted(t.numel() for t in kept) == [2 * 3, 2 * IN, 3 * IN, 3 * HIDDEN]
    del x
    gc.collect()
    assert y.grad_fn is not None
    assert input_of_layer() is None


def test_the_graph_of_a_step_is_freed() -> None:
    model = net_with()
    use_fused_lora(model)
    x = inputs(3, IN).requires_grad_()
    kept = weakref.ref(x)
    model(x).sum().backward()
    del x
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["first"]},
        {"target_modules": ["table"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_kinds_of_layer_are_left_to_peft(settings: dict[str, Any]) -> None:
    own, fused = net_with(**settings), net_with(**settings)
    assert use_fused_lora(fused) == 0
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(fused(ids), own(ids))


def test_modules_trained_in_full_are_left_to_peft() -> None:
    settings: dict[str, Any] = {"target_modules": ["first"], "modules_to_save": ["second"]}
    own, fused = pair(**settings)
    assert use_fused_lora(fused) == 1
    expected = run(own, inputs(4, IN))
    assert any("modules_to_save" in name for name in expected)
    assert_same(run(fused, inputs(4, IN)), expected)


def hook_base(model: Any) -> None:
    layer_of(model).base_layer.register_forward_hook(lambda module, args, output: output * 2)


def thaw_base(model: Any) -> None:
    layer_of(model).base_layer.weight.requires_grad_(True)


def test_layers_of_derived_classes_are_left_to_peft() -> None:
    """From the first call on, where nothing has been decided yet."""
    for change in (derive_base, derive_matrix):
        own = net_with()
        change(own)
        fused = copy.deepcopy(own)
        assert use_fused_lora(fused) == 1
        assert_same(run(fused, inputs(4, IN)), run(own, inputs(4, IN)))


@pytest.mark.parametrize("change", [hook_base, thaw_base], ids=["hook", "trained base"])
def test_a_base_that_does_more_is_left_to_peft(change: Callable[[Any], None]) -> None:
    own = net_with()
    change(own)
    fused = copy.deepcopy(own)
    assert use_fused_lora(fused) == 1
    assert_same(run(fused, inputs(4, IN)), run(own, inputs(4, IN)))


def activate_two(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    filled(model).base_model.set_adapter(["default", "second"])


def activate_missing(model: Any) -> None:
    """The first layer has no part in the adapter that is made active."""
    model.add_adapter("second", LoraConfig(r=2, target_modules=["second"]))
    filled(model).set_adapter("second")


@pytest.mark.parametrize(
    "change",
    [activate_two, activate_missing, lambda m: m.merge_adapter(), lambda m: m.base_model.disable_adapter_layers()],
    ids=["two active", "not in this layer", "merged", "disabled"],
)
def test_a_state_that_is_not_plain_goes_back_to_peft(change: Callable[[Any], None]) -> None:
    own, fused = pair()
    change(own)
    change(fused)
    x = inputs(4, IN)
    assert torch.equal(layer_of(fused)(x), layer_of(own)(x))


def replace_base(model: Any) -> None:
    layer = layer_of(model)
    torch.manual_seed(9)
    layer.base_layer = nn.Linear(IN, HIDDEN).requires_grad_(False)


class OtherLinear(nn.Linear):
    """As other libraries derive them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def derive_base(model: Any) -> None:
    layer_of(model).base_layer.__class__ = OtherLinear


def derive_matrix(model: Any) -> None:
    layer_of(model).lora_A["default"].__class__ = OtherLinear


def replace_matrix(model: Any) -> None:
    torch.manual_seed(9)
    layer_of(model).lora_B["default"].weight = nn.Parameter(torch.randn(HIDDEN, 3))


def bias_branch(model: Any) -> None:
    layer_of(model).lora_B["default"].bias = nn.Parameter(torch.ones(HIDDEN))


def hook_branch(model: Any) -> None:
    layer_of(model).lora_A["default"].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def wrap_branch(model: Any) -> None:
    down = layer_of(model).lora_A["default"]
    down.forward = lambda x: nn.Linear.forward(down, x) + 1


def switch_adapter(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    filled(model).set_adapter("second")


def switch_to_dora(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"], use_dora=True))
    filled(model).set_adapter("second")


def scale_branch(model: Any) -> None:
    layer_of(model).set_scale("default", 7)


def change_dropout(model: Any) -> None:
    torch.manual_seed(4)
    layer_of(model).lora_dropout["default"] = nn.Dropout(1.0)
    model.train()


def narrow(model: Any) -> None:
    """A and B are rounded in place."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()


@pytest.mark.parametrize(
    "change",
    [
        hook_base, thaw_base, activate_two, activate_missing, replace_base, replace_matrix, bias_branch, hook_branch,
        derive_base, derive_matrix,
        wrap_branch, switch_adapter, switch_to_dora, scale_branch, change_dropout, narrow,
    ],
)  # fmt: skip
def test_a_change_after_the_first_call_is_noticed(change: Callable[[Any], None]) -> None:
    own, fused = pair()
    x = inputs(4, IN)
    before = fused(x)
    for model in (own, fused):
        change(model)
    after = run(layer_of(fused), x)
    assert_same(after, run(layer_of(own), x))
    assert change is thaw_base or not torch.equal(layer_of(fused)(x), before[:, :HIDDEN])


def test_leaving_the_state_is_noticed_and_so_is_coming_back() -> None:
    own, fused = pair()
    x = inputs(4, IN)
    adapted = fused(x)
    with fused.disable_adapter(), own.disable_adapter():
        assert torch.equal(fused(x), own(x))
        assert not torch.allclose(fused(x), adapted)
    assert torch.equal(fused(x), adapted)
    fused.merge_adapter()
    fused.unmerge_adapter()
    torch.testing.assert_close(fused(x), adapted)


def test_adapters_named_per_row_go_back_to_peft() -> None:
    own, fused = pair()
    names = ["default", "__base__", "default"]
    x = inputs(3, IN)
    results = [model.eval()(x, adapter_names=names) for model in (own, fused)]
    assert torch.equal(*results)


def test_taking_over_twice_and_giving_back() -> None:
    own, fused = pair()
    assert use_fused_lora(fused) == 2
    give_back_forwards(fused)
    assert all("forward" not in vars(module) for module in fused.modules())
    assert_same(run(fused, inputs(4, IN)), run(own, inputs(4, IN)), terms=0)


def test_a_copy_computes_with_its_own_weights() -> None:
    _, fused = pair()
    twin = copy.deepcopy(fused)
    before = fused(inputs(4, IN))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(fused(inputs(4, IN)), before)
    assert not twin(inputs(4, IN)).any()


def test_saved_files_are_those_of_peft(tmp_path: Path) -> None:
    own, fused = pair()
    assert own.state_dict().keys() == fused.state_dict().keys()
    own.save_pretrained(tmp_path / "own")
    fused.save_pretrained(tmp_path / "fused")
    folders = (tmp_path / "own", tmp_path / "fused")
    own_weights, fused_weights = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert own_weights == fused_weights
    # PEFT writes a set of targets in any order.
    own_config, fused_config = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    for config in (own_config, fused_config):
        config["target_modules"].sort()
    assert own_config == fused_config


def test_a_whole_model_trains_as_with_peft(random_qwen: Path) -> None:
    def adapted() -> PeftModel:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
        return filled(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))

    own, fused = adapted(), adapted()
    assert use_fused_lora(fused) == 2 * 7
    ids = torch.arange(5, 29).view(2, 12)
    results = []
    for model in (own, fused):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **gradients})
    assert len(results[0]) == 1 + 2 * 7 * 2
    config = own.config
    widest = max(config.hidden_size, config.intermediate_size)
    assert_same(results[1], results[0], terms=2 * 2 * 7 * widest + ids.numel())  # there and back, of each layer


def test_on_a_gpu_a_layer_takes_few_kernels() -> None:
    """Besides, A and B are rounded once for both passes, and gradients are in their dtype at once."""
    with fake_gpu():
        net = nn.Sequential(nn.Linear(IN, HIDDEN, dtype=torch.bfloat16))
        model = get_peft_model(net, LoraConfig(r=3, lora_dropout=0.25, target_modules=["0"])).train()
        assert use_fused_lora(model) == 1
        layer, outputs = layer_of(model, "0"), list[Any]()
        x = torch.randn(40, IN, dtype=torch.bfloat16).requires_grad_()
        upstream = torch.ones(40, HIDDEN, dtype=torch.bfloat16)
        counts = [
            (count(lambda: outputs.append(layer(x))), count(lambda: outputs.pop().backward(upstream))) for _ in range(2)
        ]
    (first_forward, first_backward), (forward, backward) = counts
    assert forward.names == {"addmm": 1, "native_dropout": 1, "mm": 1, "addmm_": 1}
    assert first_forward.names - forward.names == {"_to_copy": 2, "mul": 1}
    # For A: the dropped input, the product. For B: the product. For x: three products, of which one is dropped.
    assert first_backward.names == {"mm": 5, "native_dropout_backward": 1, "addcmul_": 1}
    assert backward.names - first_backward.names == {"add_": 3}  # of further passes of a step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_long_sums_are_float32_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    left, right = torch.randn(300, 5).to(dtype), torch.randn(300, 4).to(dtype)
    found = _long_product(left, right, torch.float32)
    assert found.dtype == torch.float32
    # A CPU sums in float32 and rounds once.
    assert_same_but_rounding(
        found, left.double().t() @ right.double(), 2 if dtype != torch.float32 else 300, dtype=dtype
    )
    with fake_gpu():
        gpu = [torch.empty(300, features, dtype=dtype) for features in (5, 4)]
        (arguments,) = count(lambda: _long_product(*gpu, torch.float32), watched="mm").arguments
    assert (torch.float32 in arguments[2:]) is (dtype != torch.float32)
