"""Writes a merged model folder as a GGUF file, tensor by tensor, and verifies the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from loratune.choices import GgufType
from loratune.delivery.export.gguf.layout import (
    PlannedTensor,
    architecture_of,
    describe,
    pair_rotated_rows,
    plan_tensors,
    read_config,
)
from loratune.delivery.export.gguf.vocabulary import describe_vocabulary
from loratune.errors import Exit, LoratuneError
from loratune.extras import required
from loratune.model.architecture.file_layout import FileLayout, file_layout
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import empty_model
from loratune.model.files import weight_files
from loratune.model.tying import head_is_tied
from loratune.model.weights.tensor_files import TensorFiles
from loratune.runs.exported import GgufReadBack

with required("GGUF", "export"):
    import gguf
    from gguf import GGMLQuantizationType as Kind

_FILE_TYPES: dict[GgufType, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_DTYPES = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_BLOCK = gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]
_STEPS = 127  # a q8_0 block is a float16 scale and integers up to this value
_LARGEST = {kind: torch.finfo(dtype).max for kind, dtype in _DTYPES.items()}
_LARGEST[Kind.Q8_0] = _LARGEST[Kind.F16] * _STEPS
REMOVED = (
    "it is not kept. See that the disk is well; if a second export ends so too, please report it with the versions "
    "that `loratune --version` and pip list show"
)
_PIECE_ELEMENTS = 2**22
"""Number of tensor elements in memory at once; 16 MiB as float32."""


@dataclass(frozen=True)
class FilePlan:
    """The content of a file, known from a model folder's small files and the shapes of its tensors."""

    architecture: str
    keys: dict[str, Any]
    tensors: list[PlannedTensor]
    layout: FileLayout
    """Maps the planned tensors to tensors of the model's files."""

    def nbytes(self, quantization: GgufType) -> int:
        """Size of all tensors in bytes."""
        return sum(_stored_bytes(tensor, _choose_kind(tensor, quantization)) for tensor in self.tensors)


def plan_file(folder: Path, shapes: Mapping[str, tuple[int, ...]], is_tied: bool) -> FilePlan:
    """Plan the file of a model whose weights may not exist yet.

    Args:
        folder: folder with config, tokenizer and template.
        shapes: tensor name → shape, of the model's files.
        is_tied: whether embedding and head are tied.

    Raises:
        NotForGgufError: GGUF cannot represent the model.
        LoratuneError: the tensors are not exactly those of the architecture.
    """
    config = read_config(folder)
    config.tie_word_embeddings = is_tied
    layout = file_layout(empty_model(config), shapes)
    held = layout.shapes(shapes)
    keys: dict[str, Any] = describe(config) | describe_vocabulary(folder, config.vocab_size)
    tensors = plan_tensors(config)
    planned = {tensor.source: tensor.shape for tensor in tensors if tensor.values is None}
    for name, shape in planned.items():
        if held.get(name) != shape:
            raise LoratuneError(
                f"{folder}: {name} is {held.get(name, 'missing')} where config.json asks for {shape}", Exit.MODEL
            )
    # Computed from the config, but present in old checkpoints.
    extra = [name for name in held if name not in planned and not name.endswith("rotary_emb.inv_freq")]
    if extra and not (is_tied and extra == [vocabulary_of(planned).head]):
        raise LoratuneError(f"{folder}: {extra[0]} is no part of the architecture of config.json", Exit.MODEL)
    return FilePlan(architecture_of(config), keys, tensors, layout)


class _Model:
    """A model folder: the keys for the file, and its tensors with rows in the file's order."""

    def __init__(self, folder: Path) -> None:
        self._files = TensorFiles(weight_files(folder))
        shapes = {name: info.shape for name, info in self._files.infos.items()}
        plan = plan_file(folder, shapes, head_is_tied(folder))
        self.architecture, self.keys, self.tensors = plan.architecture, plan.keys, plan.tensors
        self._layout = plan.layout

    def rows(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        """Yield the tensor in pieces: (some rows, row length), in the dtype of the model's files."""
        values = self._layout.read(tensor.source, self._files) if tensor.values is None else tensor.values
        if tensor.rope_heads:
            values = pair_rotated_rows(values, tensor.rope_heads)
        matrix = values.reshape(-1, tensor.shape[-1])
        yield from matrix.split(max(1, _PIECE_ELEMENTS // tensor.shape[-1]))
        if tensor.source:
            self._files.release(self._layout.tensors_of(tensor.source))


class _StoredTensor:
    """A tensor with the interface that the writer expects: its size, and a method that writes it."""

    def __init__(self, model: _Model, tensor: PlannedTensor, kind: Kind) -> None:
        self._model, self._tensor, self._kind = model, tensor, kind
        self.nbytes = _stored_bytes(tensor, kind)

    def tofile(self, file: BinaryIO) -> None:
        """Write the values as stored in the file."""
        for rows in self._model.rows(self._tensor):
            _encode(rows, self._kind, self._tensor.name).tofile(file)


def write_gguf(model: Path, target: Path, quantization: GgufType) -> None:
    """Write a model folder as a GGUF file, with memory for a piece of a tensor.

    Args:
        model: merged Hugging Face folder of full-precision weights.
        target: the file; what stands there is replaced, and after an error something unfinished may stand there.
        quantization: the type of matrices. Vectors are float32 whatever it is.

    Raises:
        LoratuneError: the model is not supported, or has values outside the type's range.
    """
    if quantization not in _FILE_TYPES:
        raise LoratuneError(f"quantization {quantization!r} is unknown; {', '.join(_FILE_TYPES)} are", Exit.USAGE)
    source = _Model(model)
    writer = gguf.GGUFWriter(target, source.architecture)
    writer.add_type("model")
    writer.add_name(target.stem)
    writer.add_file_type(_FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in source.keys.items():
        writer.add_key_value(key, value, _value_type(value))
    stored = [_StoredTensor(source, tensor, _choose_kind(tensor, quantization)) for tensor in source.tensors]
    for tensor, data in zip(source.tensors, stored, strict=True):
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), data.nbytes, raw_dtype=_choose_kind(tensor, quantization)
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in stored:
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _stored_bytes(tensor: PlannedTensor, kind: Kind) -> int:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(tensor.shape)) // int(block_elements) * int(block_bytes)


def _value_type(value: Any) -> Any:
    types = gguf.GGUFValueType
    by_type = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    return by_type[type(value)]


def _choose_kind(tensor: PlannedTensor, quantization: GgufType) -> Kind:
    """How a tensor is stored: vectors as F32, and what q8_0 cannot divide into blocks as F16."""
    if len(tensor.shape) < 2:
        return Kind.F32
    if quantization == "q8_0" and tensor.shape[-1] % _BLOCK:
        return Kind.F16
    return Kind[quantization.upper()]


def _encode(rows: torch.Tensor, kind: Kind, name: str) -> Any:
    """Convert (rows, row length) values to a numpy array of the stored type."""
    largest = float(rows.abs().max())
    if not largest <= _LARGEST[kind]:  # also true for NaN
        raise LoratuneError(
            f"{name}: its largest value is {largest:g}, and {kind.name} holds up to {_LARGEST[kind]:g}; "
            + ("--quantization bf16 or f32 holds it" if largest < float("inf") else "the model's weights are broken"),
            Exit.MODEL,
        )
    if kind == Kind.Q8_0:
        return gguf.quantize(rows.float().numpy(), kind)
    stored = rows.to(_DTYPES[kind])
    return stored.view(torch.int16).numpy() if kind == Kind.BF16 else stored.numpy()


def check_gguf(model: Path, file: Path) -> GgufReadBack:
    """Read a file back and compare it with the model folder that it was made from.

    Args:
        model: the folder.
        file: the GGUF file.

    Raises:
        LoratuneError: the file cannot be read, or differs from the folder.
    """
    source = _Model(model)
    try:
        reader = gguf.GGUFReader(file)
        found = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, LookupError, OverflowError, OSError) as error:
        raise LoratuneError(f"{file}: cannot be read as GGUF ({error}); {REMOVED}", Exit.MODEL) from error
    quantization = _compare_keys(source, file, reader)
    planned = {tensor.name for tensor in source.tensors}
    if planned != set(found):
        raise _difference(file, min(planned ^ set(found)), "is in only one of file and model")
    sizes: Counter[str] = Counter()
    fallbacks: list[str] = []
    largest = 0.0
    for tensor in source.tensors:
        stored = found[tensor.name]
        kind = _choose_kind(tensor, quantization)
        if stored.tensor_type != kind or tuple(reversed(stored.shape.tolist())) != tensor.shape:
            raise _difference(file, tensor.name, f"is {stored.tensor_type.name} {stored.shape.tolist()} in the file")
        largest = max(largest, _compare_values(source, file, tensor, stored))
        sizes[kind.name] += int(stored.n_bytes)
        if quantization == "q8_0" and kind == Kind.F16:
            fallbacks.append(tensor.name)
    tokens = len(source.keys["tokenizer.ggml.tokens"])
    return GgufReadBack(len(found), tokens, dict(sizes), tuple(fallbacks), largest)


def _compare_keys(source: _Model, file: Path, reader: Any) -> GgufType:
    """Make sure that every key has its value; return the file's quantization."""
    contents = {key: field.contents() for key, field in reader.fields.items() if key != "general.name"}
    for key, value in (source.keys | {"general.architecture": source.architecture}).items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if contents.get(key) != expected:
            raise _difference(file, key, "has another value in the file than in the model")
    by_type = {int(file_type): name for name, file_type in _FILE_TYPES.items()}
    file_type = contents.get("general.file_type")
    if file_type not in by_type:
        raise _difference(file, "general.file_type", f"is {file_type} in the file")
    return by_type[file_type]


def _compare_values(source: _Model, file: Path, tensor: PlannedTensor, stored: Any) -> float:
    """Return the largest difference between a tensor's values and the file's; raise if rounding does not explain it."""
    data = stored.data.reshape(-1, stored.data.shape[-1])
    largest, start = 0.0, 0
    for rows in source.rows(tensor):
        # Copied, since float32 values are a read-only view of the file, which torch warns about.
        values = torch.from_numpy(np.array(gguf.dequantize(data[start : start + len(rows)], stored.tensor_type)))
        start += len(rows)
        if not _are_stored(rows, values, stored.tensor_type):
            raise _difference(file, tensor.name, "has other values in the file than in the model")
        largest = max(largest, float((values - rows.float()).abs().max()))
    return largest


def _are_stored(rows: torch.Tensor, values: torch.Tensor, kind: Kind) -> bool:
    """Return whether (rows, row length) values from a file are the given ones with no more than the type's rounding."""
    if kind != Kind.Q8_0:
        return bool(torch.equal(values, rows.to(_DTYPES[kind]).float()))
    blocks = rows.float().unflatten(-1, (-1, _BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / _STEPS
    # Half a step, with a margin for the float32 division, and the rounding of the scale.
    allowed = 0.501 * scales + _STEPS * (scales.half().float() - scales).abs()
    return bool(((values.view_as(blocks) - blocks).abs() <= allowed).all())


def _difference(file: Path, what: str, how: str) -> LoratuneError:
    return LoratuneError(f"{file}: {what} {how}; {REMOVED}", Exit.MODEL)
