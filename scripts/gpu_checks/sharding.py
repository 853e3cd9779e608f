"""Shards a base by FSDP2 in a process group of this process alone, and compares a pass with that of the whole base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tiny_model
from torch import distributed

from gpu_checks.models import relative_error
from gpu_checks.table import Figures, Workplace

SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "head_dim": 64},
}
LENGTH = 64


def sharding(place: Workplace) -> Figures:
    """Return the largest differences of loss and gradients, and how many layers are gathered."""
    folders = {kind: place.folder / f"sharding-{kind}" for kind in SIZES}
    for kind, folder in folders.items():
        if not (folder / "config.json").is_file():
            make_tiny_model(kind, folder, **SIZES[kind])
    backend = "cpu:gloo,cuda:nccl" if place.is_gpu else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        found = {
            f"{kind}, {quantization}": differences(folder, quantization)
            for kind, folder in folders.items()
            for quantization in ("none", "nf4")
        }
    finally:
        distributed.destroy_process_group()
    return {
        **{f"{name}: {figure}": value for name, figures in found.items() for figure, value in figures.items()},
        "largest error": max(max(figures["loss"], figures["gradients"]) for figures in found.values()),
        "fewest units": min(figures["units"] for figures in found.values()),
    }


def differences(folder: Path, quantization: str) -> dict[str, float]:
    """Return the relative differences of a pass with the sharded base from one with the whole base."""
    from loratune.model.sharding.gathering import sharded_units

    whole, of_whole = one_pass(load(folder, quantization, "none"))
    model = load(folder, quantization, "fsdp")
    sharded, of_sharded = one_pass(model)
    apart = [relative_error(of_sharded[name], expected) for name, expected in of_whole.items()]
    return {"loss": abs(sharded - whole) / whole, "gradients": max(apart), "units": len(sharded_units(model))}


def one_pass(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of an adapter whose matrices both have an effect."""
    from loratune.model.adapter.attach import attach_adapter
    from loratune.model.adapter.plain_copy import perturbed
    from loratune.model.kernels.linear_cross_entropy import add_labelled_loss
    from loratune.model.kernels.lora_linear import use_fused_lora
    from loratune.model.sharding.gathering import with_weights
    from loratune.recipe.method_sections import LoraSettings

    adapted: Any = attach_adapter(model, LoraSettings(rank=4, dropout=0), "base", 0)
    with_weights(adapted, use_fused_lora)
    add_labelled_loss(model)
    ids = torch.arange(LENGTH, device=model.device)[None]
    with perturbed(adapted):
        loss = adapted(input_ids=ids, labels=ids, summed_loss=True).loss_sum
        loss.backward()
    return float(loss.detach()), {name: one.grad for name, one in adapted.named_parameters() if one.grad is not None}


def load(folder: Path, quantization: str, kind: str) -> Any:
    """Return a base in float32, sharded although there is one process, if that is asked for."""
    from loratune.model import base
    from loratune.model.hardware import detect_hardware
    from loratune.model.weights.unpacked import keep_unpacked
    from loratune.recipe.sections import ModelSettings

    settings = ModelSettings(base=str(folder), dtype="float32", compute_dtype="float32", quantization=quantization)
    base.is_to_be_sharded = lambda asked, _: asked.sharding == "fsdp"
    model = base.load_base(settings.model_copy(update={"sharding": kind}), folder, detect_hardware())
    keep_unpacked(model)
    return model
