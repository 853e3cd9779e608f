"""Fused norms and gated MLPs against transformers' own modules and against double precision."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from loratune.model.kernels.norm_mlp import use_fused_elementwise

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}


def build(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A small model whose norms' weights are not all ones."""
    torch.manual_seed(0)
    config = (CONFIGS | {"gemma": GemmaConfig})[family](**(SIZES | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model.train()


def logits_and_gradients(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and what flows back to the embeddings through everything."""
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    states = states.to(model.dtype).requires_grad_()
    logits = model(inputs_embeds=states, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), states)
    return logits.detach(), gradient


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_are_the_model_s_own(family: str) -> None:
    model = build(family)
    expected = logits_and_gradients(model)
    norms_of_a_layer = 4 if family == "qwen3" else 2
    assert use_fused_elementwise(model) == 2 * (norms_of_a_layer + 1) + 1
    assert use_fused_elementwise(model) == 0
    for mine, theirs in zip(logits_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_modules_that_compute_something_else_are_left_alone() -> None:
    gemma = build("gemma")
    expected = logits_and_gradients(gemma)
    assert use_fused_elementwise(gemma) == 0
    torch.testing.assert_close(logits_and_gradients(gemma), expected)
    assert use_fused_elementwise(build("qwen2", hidden_act="gelu")) == 5
    trained = build("qwen2")
    trained.model.norm.weight.requires_grad_()
    assert use_fused_elementwise(trained) == 6


def test_the_matrices_of_an_mlp_are_told_apart_by_what_it_computes() -> None:
    class OtherNames(torch.nn.Module):
        """The gate comes last, and nothing is called as usual."""

        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.back, self.value, self.opening = mlp.down_proj, mlp.up_proj, mlp.gate_proj
            self.activation = torch.nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.back(self.activation(self.opening(x)) * self.value(x))

    model = build("qwen2")
    expected = logits_and_gradients(model)
    for layer in model.model.layers:
        layer.mlp = OtherNames(layer.mlp)
    assert use_fused_elementwise(model) == 7
    for mine, theirs in zip(logits_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_norm_that_only_looks_alike_is_left_alone() -> None:
    model = build("qwen2")
    norm = model.model.norm
    norm.forward = MethodType(lambda self, x: 2 * x, norm)
    assert use_fused_elementwise(model) == 6
    assert torch.equal(norm(torch.ones(3)), 2 * torch.ones(3))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.sampled_from([1e-3, 1.0, 300.0]), st.integers(0, 99))
def test_in_bfloat16_both_are_as_near_to_the_truth(rows: int, scale: float, seed: int) -> None:
    own, fused = build("qwen2", torch.bfloat16), build("qwen2", torch.bfloat16)
    assert use_fused_elementwise(fused) == 7
    exact = build("qwen2", torch.bfloat16).double()
    torch.manual_seed(seed)
    states = (scale * torch.randn(rows, 32)).bfloat16()
    flowing = torch.randn(rows, 32).bfloat16()

    def results(model: Any, part: str) -> tuple[torch.Tensor, ...]:
        module = model.get_submodule(part)
        given_states = states.to(module.weight.dtype if hasattr(module, "weight") else model.dtype).requires_grad_()
        output = module(given_states)
        return output.double(), torch.autograd.grad(output, given_states, flowing.to(output.dtype))[0].double()

    for part in ("model.norm", "model.layers.0.mlp"):
        truth, theirs, mine = (results(model, part) for model in (exact, own, fused))
        for right, other, here in zip(truth, theirs, mine, strict=True):
            assert (here - right).norm() <= 1.3 * (other - right).norm() + 1e-3 * right.norm()


def test_less_is_kept_for_the_backward_pass() -> None:
    kept = []
    for fuse in (False, True):
        model = build("qwen2", torch.bfloat16, hidden_size=64, intermediate_size=256)
        if fuse:
            use_fused_elementwise(model)
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        states = torch.randn(1, 64, 64, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = model.model.layers[0].mlp(model.model.layers[0].post_attention_layernorm(states))
        assert output.requires_grad
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept.append(sum(size for place, size in storages.items() if place not in weights))
    # In rows of bfloat16: gate, up, their product, the input; without fusion silu(gate), the normed input in float32.
    assert kept[1] < 0.8 * kept[0]
