"""One process of several: loads a sharded base, makes a pass, and writes down what was sent and held."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from loratune.model.adapter.attach import attach_adapter
from loratune.model.architecture.structure import decoder_of
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.model.kernels.linear_cross_entropy import add_labelled_loss
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.sharding.gathering import gathered_bytes, with_weights
from loratune.model.weights.held import own_bytes
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sections import ModelSettings

GATHER = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
"""torch's name of the operation that FSDP gathers with."""


def resident_bytes(field: str) -> int:
    """Return a figure of /proc/self/status: VmRSS, or VmHWM for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def make_pass(folder: Path, quantization: str) -> dict[str, int]:
    """Return bytes gathered in a pass, the bytes of the base, and by how much the memory grew at its peak."""
    gather, sent = getattr(distributed, GATHER), list[int]()

    def counted(output: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        sent.append(output.nbytes)
        return gather(output, *arguments, **settings)

    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    settings = {"dtype": "float32", "compute_dtype": "float32", "sharding": "fsdp", "quantization": quantization}
    model = load_base(ModelSettings(base=str(folder), **settings), folder, detect_hardware())
    adapted = attach_adapter(model, LoraSettings(rank=1, dropout=0), "base", 0)
    with_weights(adapted, use_fused_lora)
    add_labelled_loss(model)
    ids = torch.arange(16)[None]
    setattr(distributed, GATHER, counted)
    try:
        adapted(input_ids=ids, labels=ids, summed_loss=True).loss_sum.backward()
    finally:
        setattr(distributed, GATHER, gather)
    decoder: Any = decoder_of(model)
    return {
        "sent": sum(sent),
        "base": _frozen_bytes(model),
        "own": sum(own_bytes(weight) for weight in model.parameters() if not weight.requires_grad),
        "layers": _frozen_bytes(decoder.layers),
        "embedding": _frozen_bytes(model.get_input_embeddings()),
        "norm": _frozen_bytes(decoder.norm),
        "peak": resident_bytes("VmHWM") - before,
        "gathered": gathered_bytes(model),
    }


def _frozen_bytes(module: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters() if not weight.requires_grad)


if __name__ == "__main__":
    quantization, *paths = sys.argv[1:]
    first, measured, target = map(Path, paths)
    distributed.init_process_group("gloo")
    make_pass(first, quantization)  # imports, and allocates what stays
    result = make_pass(measured, quantization)
    (target / f"{distributed.get_rank()}.json").write_text(json.dumps(result), encoding="utf-8")
    distributed.destroy_process_group()
