"""Loads a mixture with its experts in nf4: bytes, and a pass beside the dequantised matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tiny_model

from gpu_checks import machine
from gpu_checks.models import random_rows, relative_error
from gpu_checks.table import Figures, Workplace

KIND = "qwen3_moe"
A3B: dict[str, Any] = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 2,
}  # fmt: skip
"""Two layers of Qwen3-30B-A3B."""
SMALL: dict[str, Any] = {
    "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32,
    "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
LENGTH = 256


def nf4_mixture(place: Workplace) -> Figures:
    """Return bytes in nf4 beside those in bfloat16, and errors of logits and gradients in float32 and bfloat16."""
    folder = place.folder / "nf4-mixture"
    if not (folder / "config.json").is_file():
        make_tiny_model(KIND, folder, torch.bfloat16, **(A3B if place.is_gpu else SMALL))
    before = machine.memory_now()
    model = quantised(folder, "bfloat16")
    figures: dict[str, Any] = stack_bytes(model)
    if place.is_gpu:
        figures["allocated / counted"] = (machine.memory_now() - before) / counted_bytes(model)
    del model
    for dtype in ("float32", "bfloat16"):
        figures |= errors(folder, dtype)
    return figures


def quantised(folder: Path, dtype: str) -> Any:
    from loratune.model.base import load_base
    from loratune.model.hardware import detect_hardware
    from loratune.model.weights.unpacked import keep_unpacked
    from loratune.recipe.sections import ModelSettings

    settings = ModelSettings(base=str(folder), dtype=dtype, compute_dtype=dtype, quantization="nf4")
    model = load_base(settings, folder, detect_hardware())
    keep_unpacked(model)
    return model.eval()


def stacks_of(model: Any) -> dict[str, Any]:
    """Return the parameters with a stack of quantised matrices."""
    return {name: one for name, one in model.named_parameters() if len(getattr(one, "states", ())) == len(one)}


def stack_bytes(model: Any) -> dict[str, Any]:
    """Return what the stacks take, scales included, for each byte in bfloat16."""
    stacks = stacks_of(model)
    if not stacks:
        raise RuntimeError("no stack of experts is quantised")
    taken = sum(one.nbytes + sum(map(state_bytes, one.states)) for one in stacks.values())
    values = sum(math.prod(state.shape) for one in stacks.values() for state in one.states)
    return {"stacks": len(stacks), "stack bytes / bfloat16": taken / (2 * values)}


def state_bytes(state: Any) -> int:
    """Return the bytes of a matrix's scales, without the tables of codes, which are the same for all."""
    inner = state.state2
    return int(state.absmax.nbytes + (inner.absmax.nbytes + state.offset.nbytes if inner is not None else 0))


def counted_bytes(model: Any) -> int:
    """Return what the parameters and the scales of stacks and linear layers take."""
    scales = [state for one in stacks_of(model).values() for state in one.states]
    scales += [one.quant_state for one in model.parameters() if getattr(one, "quant_state", None) is not None]
    return sum(one.nbytes for one in model.parameters()) + sum(map(state_bytes, scales))


def errors(folder: Path, dtype: str) -> dict[str, Any]:
    """Return how far a pass of the quantised model is from one with the matrices that bitsandbytes dequantises.

    In float32 the reference is exact. In bfloat16 it is the same float32 pass, beside the error of a bfloat16 pass
    with those matrices by transformers alone.
    """
    model = quantised(folder, dtype)
    exact = dequantised(folder, model, torch.float32)
    found, right = outcome(model), outcome(exact)
    own = [relative_error(*pair) for pair in zip(found, right, strict=True)]
    if dtype == "float32":
        return {"float32 error": max(own)}
    plain = outcome(dequantised(folder, model, torch.bfloat16))
    of_plain = [relative_error(*pair) for pair in zip(plain, right, strict=True)]
    return {"bfloat16 error / plain": max(one / other for one, other in zip(own, of_plain, strict=True)),
            "bfloat16 error": max(own)}  # fmt: skip


def dequantised(folder: Path, model: Any, dtype: torch.dtype) -> Any:
    """Return the model as transformers loads it, with bitsandbytes' values of the quantised matrices."""
    import bitsandbytes.functional as bnb
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(model.device).eval()
    for name, own in model.named_parameters():
        target = plain.get_parameter(name)
        if states := getattr(own, "states", None):
            for number, state in enumerate(states):
                target.data[number] = bnb.dequantize_4bit(own.data[number], state)
        elif (state := getattr(own, "quant_state", None)) is not None:
            target.data = bnb.dequantize_4bit(own.data, state).to(dtype)
        else:
            target.data = own.data.to(dtype)
    return plain


def outcome(model: Any) -> tuple[Any, Any]:
    """Return the logits of a row, and the gradient of its embeddings for a random sum of them."""
    ids = torch.tensor([random_rows(3000, [LENGTH])[0][0]], device=model.device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (grad,) = torch.autograd.grad(logits, embedded, direction)
    return logits.detach(), grad
