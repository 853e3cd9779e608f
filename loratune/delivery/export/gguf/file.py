"""Writes a merged model folder as a GGUF file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from loratune.choices import GgufType
from loratune.delivery.export.gguf.architectures import architecture_name
from loratune.delivery.export.gguf.keys import describe, read_config
from loratune.delivery.export.gguf.layout import PlannedTensor, plan_tensors
from loratune.delivery.export.gguf.vocabulary import describe_vocabulary
from loratune.errors import Exit, LoratuneError
from loratune.extras import required
from loratune.model.architecture.file_layout import FileLayout, file_layout
from loratune.model.architecture.structure import tensors_apart, text_config
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import empty_model
from loratune.model.files import weight_files
from loratune.model.tying import head_is_tied
from loratune.model.weights.tensor_files import TensorFiles

with required("GGUF", "export"):
    import gguf
    from gguf import GGMLQuantizationType as Kind

FILE_TYPES: dict[GgufType, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
DTYPES = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
BLOCK = gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]
STEPS = 127  # a q8_0 block is a float16 scale and integers up to this value
_LARGEST = {kind: torch.finfo(dtype).max for kind, dtype in DTYPES.items()}
_LARGEST[Kind.Q8_0] = _LARGEST[Kind.F16] * STEPS
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
    left_out: tuple[str, ...]
    """Tensors of the model that do not take part in writing text, such as those that read images."""
    reads_images: bool
    """Whether some of these do, or read something else than text."""

    def nbytes(self, quantization: GgufType) -> int:
        """Size of all tensors in bytes."""
        return sum(_stored_bytes(tensor, choose_kind(tensor, quantization)) for tensor in self.tensors)


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
    config.tie_word_embeddings = text_config(config).tie_word_embeddings = is_tied
    model, tensors = empty_model(config), plan_tensors(config)
    layout = file_layout(model, shapes)
    held = layout.shapes(shapes)
    keys: dict[str, Any] = describe(config, tensors) | describe_vocabulary(folder, text_config(config).vocab_size)
    planned = {tensor.source: tensor.source_shape for tensor in tensors if tensor.values is None}
    for name, shape in planned.items():
        if held.get(name) != shape:
            raise LoratuneError(
                f"{folder}: {name} is {held.get(name, 'missing')} where config.json asks for {shape}", Exit.MODEL
            )
    others = [name for name in held if name not in planned]
    if is_tied:
        others = [name for name in others if name != vocabulary_of(planned).head]
    left_out = tensors_apart(model, others)
    # Computed from the config, but present in old checkpoints.
    extra = [name for name in others if name not in left_out and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise LoratuneError(f"{folder}: {extra[0]} is no part of the architecture of config.json", Exit.MODEL)
    return FilePlan(
        architecture_name(config), keys, tensors, layout, tuple(left_out), text_config(config) is not config
    )


class ModelToWrite:
    """A model folder: the keys for the file, and its tensors with rows in the file's order."""

    def __init__(self, folder: Path) -> None:
        self._files = TensorFiles(weight_files(folder))
        shapes = {name: info.shape for name, info in self._files.infos.items()}
        plan = plan_file(folder, shapes, head_is_tied(folder))
        self.architecture, self.keys, self.tensors = plan.architecture, plan.keys, plan.tensors
        self._layout = plan.layout

    def rows(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        """Yield the tensor in pieces: (some rows, row length), in the dtype of the model's files."""
        for values in self._values(tensor):
            rows = tensor.change.apply(values).reshape(-1, tensor.shape[-1])
            yield from rows.split(max(1, _PIECE_ELEMENTS // tensor.shape[-1]))
        if tensor.source:
            self._files.release(self._layout.tensors_of(tensor.source))

    def _values(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        """Yield the model's values of a tensor: its matrices if it is a stack, else all."""
        if tensor.is_stack:
            for number in range(tensor.source_shape[0]):
                yield self._layout.matrix(tensor.source, number, self._files)
        else:
            yield self._layout.read(tensor.source, self._files) if tensor.values is None else tensor.values


class _StoredTensor:
    """A tensor with the interface that the writer expects: its size, and a method that writes it."""

    def __init__(self, model: ModelToWrite, tensor: PlannedTensor, kind: Kind) -> None:
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
    if quantization not in FILE_TYPES:
        raise LoratuneError(f"quantization {quantization!r} is unknown; {', '.join(FILE_TYPES)} are", Exit.USAGE)
    source = ModelToWrite(model)
    writer = gguf.GGUFWriter(target, source.architecture)
    writer.add_type("model")
    writer.add_name(target.stem)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in source.keys.items():
        writer.add_key_value(key, value, _value_type(value))
    stored = [_StoredTensor(source, tensor, choose_kind(tensor, quantization)) for tensor in source.tensors]
    for tensor, data in zip(source.tensors, stored, strict=True):
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), data.nbytes, raw_dtype=choose_kind(tensor, quantization)
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


def choose_kind(tensor: PlannedTensor, quantization: GgufType) -> Kind:
    """How a tensor is stored: vectors and the like as F32, and what q8_0 cannot divide into blocks as F16."""
    if tensor.in_float32:
        return Kind.F32
    if quantization == "q8_0" and tensor.shape[-1] % BLOCK:
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
    stored = rows.to(DTYPES[kind])
    return stored.view(torch.int16).numpy() if kind == Kind.BF16 else stored.numpy()
