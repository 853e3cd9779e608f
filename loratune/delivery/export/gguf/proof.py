"""Compares a GGUF file, loaded as a model, with the model folder that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

from loratune.choices import GgufType
from loratune.delivery.export.comparison import GGUF_BOUNDS, SAME, FileProof, require_same
from loratune.delivery.export.gguf import reference
from loratune.delivery.export.gguf.check import REMOVED
from loratune.delivery.export.gguf.restored import RESTORED, restore
from loratune.delivery.verification.parity import compare_models
from loratune.delivery.verification.place import run_proof
from loratune.delivery.verification.proof import check_parity
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.roles import amplifies_rounding
from loratune.model.architecture.structure import language_parts
from loratune.model.config import empty_model, load_config
from loratune.model.files import weight_files
from loratune.model.from_folder import load_plain
from loratune.model.hardware import Hardware
from loratune.model.weights.mapped import load_mapped
from loratune.protocols import CausalModel
from loratune.runs.probe import ProbeRow
from loratune.runs.verification import Parity

COMPUTED = 2.0**-22
"""Error of a value that is computed in float32 and back, relative to the larger of 1 and itself."""
# Largest error of a stored value, relative to itself; of q8_0, relative to the largest value of its row: half a step of
# the largest block, and the rounding of the block's scale.
OF_ITSELF: dict[GgufType, float] = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11, "q8_0": 0.0}
OF_ROW: dict[GgufType, float] = {"f32": 0.0, "bf16": 0.0, "f16": 2.0**-11, "q8_0": 0.501 / 127 + 2.0**-11}


def needed_bytes(model: Path) -> int:
    """Memory that `compare_logits` takes: models in float32, which is at most twice the size of the files."""
    models = 2 if amplifies_rounding(empty_model(load_config(model))) else 1
    return (2 * models + 1) * sum(path.stat().st_size for path in weight_files(model))


def compare_logits(model: Path, file: Path, quantization: GgufType, rows: Sequence[ProbeRow]) -> FileProof:
    """Load a file as it describes itself, and compare its logits with the merged model's.

    Where a model amplifies rounding, logits of the right file may be far from the merged model's. There each parameter
    is compared instead, and the logits with those of the merged model with the file's parameters.

    Args:
        model: the merged model's folder.
        file: its GGUF file.
        quantization: the type of the file's matrices.
        rows: rows to compare on.

    Raises:
        LoratuneError: the file's model is another.
        Exception: transformers cannot load the file.
    """
    bounds = GGUF_BOUNDS[quantization]
    if gguf.GGUFReader(file).fields["general.architecture"].contents() in RESTORED:
        read_by, written = "loratune", restore(file)
    else:
        read_by, written = "transformers", reference.load_gguf(file)
    if not amplifies_rounding(written):
        (parity,), _ = run_proof(lambda hardware: _compare_on(hardware, model, written, rows))
        require_same(parity, bounds, file.name)
        return FileProof(parity, read_by, 0, [])
    merged = load_plain(model).float()
    pairs = list(_parameter_pairs(merged, written))
    for name, own, other in pairs:
        if not _is_rounded(own, other, quantization):
            raise LoratuneError(f"{file}: {name} is another in the file than in the model; {REMOVED}", Exit.MODEL)
    (parity,) = compare_models(merged, [written], rows)
    for _, own, other in pairs:
        own.data = other.data
    (same,) = compare_models(merged, [written], rows)
    require_same(same, SAME, file.name)
    return FileProof(parity, read_by, len(pairs), check_parity(parity, bounds))


def _compare_on(hardware: Hardware, model: Path, written: Any, rows: Sequence[ProbeRow]) -> list[Parity]:
    return compare_models(load_mapped(model, device=hardware.device), [written.to(hardware.device)], rows)


def _parameter_pairs(merged: CausalModel, written: CausalModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name and values of each parameter of the language model, in both models."""
    found = dict(written.named_parameters())
    parts = list(zip(language_parts(merged), language_parts(written), strict=True))
    for name, own in merged.named_parameters():
        for path, other in parts:
            if name.startswith(path):
                yield name, own, found[f"{other}{name.removeprefix(path)}"]


def _is_rounded(values: torch.Tensor, stored: torch.Tensor, quantization: GgufType) -> bool:
    """Return whether stored values are the given ones, but for the rounding of the type that they may be stored in."""
    size = values.abs()
    allowed = COMPUTED * size.clamp(min=1)
    if values.ndim > 1:  # vectors are float32 in every type
        allowed = allowed + OF_ITSELF[quantization] * size + OF_ROW[quantization] * size.amax(-1, keepdim=True)
    return stored.shape == values.shape and bool(((stored - values).abs() <= allowed).all())
