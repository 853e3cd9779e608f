"""Compares the logits of a GGUF file's model with those of the model folder that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import gguf
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

from loratune.choices import GgufType
from loratune.delivery.export.comparison import GGUF_BOUNDS, SAME, FileProof, require_same
from loratune.delivery.export.gguf import reference
from loratune.delivery.export.gguf.architectures import letters
from loratune.delivery.export.gguf.keys import read_config
from loratune.delivery.export.gguf.restored import restore, stated_config
from loratune.delivery.verification.parity import compare_models, compare_pairs
from loratune.delivery.verification.proof import check_parity
from loratune.model.architecture.roles import amplifies_rounding
from loratune.model.config import empty_model, load_config
from loratune.model.files import weight_files
from loratune.model.from_folder import load_plain
from loratune.model.weights.mapped import load_mapped
from loratune.runs.probe import ProbeRow


def needed_bytes(model: Path) -> int:
    """Memory that `compare_logits` takes: models in float32, which is at most twice the size of the files."""
    models = 3 if amplifies_rounding(empty_model(load_config(model))) else 1
    return (2 * models + 1) * sum(path.stat().st_size for path in weight_files(model))


def compare_logits(model: Path, file: Path, quantization: GgufType, rows: Sequence[ProbeRow]) -> FileProof:
    """Load a file as it describes itself, and compare its logits with the merged model's.

    Where a model amplifies rounding, logits of the right file may be far from the merged model's. They then have to
    equal those of a model with the folder's config and the file's weights, which `check_gguf` has compared.

    Args:
        model: the merged model's folder.
        file: its GGUF file.
        quantization: the type of the file's matrices.
        rows: rows to compare on.

    Raises:
        LoratuneError: the file's model is another.
        Exception: transformers cannot load the file.
    """
    read_by, bounds = _reader_of(file), GGUF_BOUNDS[quantization]
    written = reference.load_gguf(file) if read_by == "transformers" else restore(file, stated_config(file))
    if not amplifies_rounding(written):
        (parity,) = compare_models(load_mapped(model), [written], rows)
        require_same(parity, bounds, file.name)
        return FileProof(parity, read_by, [])
    merged, restored = load_plain(model).float(), restore(file, read_config(model))
    parity, same = compare_pairs([merged, restored, written], [(0, 2), (1, 2)], rows)
    require_same(same, SAME, file.name)
    if quantization == "f32":  # which rounds nothing
        require_same(parity, bounds, file.name)
    return FileProof(parity, read_by, check_parity(parity, bounds))


def _reader_of(file: Path) -> Literal["transformers", "loratune"]:
    """Return what can read a file's architecture."""
    architecture = gguf.GGUFReader(file).fields["general.architecture"].contents()
    known = {letters(name) for name in (*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS)}
    return "transformers" if letters(architecture) in known else "loratune"
