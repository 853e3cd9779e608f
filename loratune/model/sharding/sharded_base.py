"""Loads a base of which each process holds a part, by torch's FSDP2.

The modules exist without values first. Then each process reads its own rows from the mapped files, so that no process
and no machine holds more than the shards, and nothing is sent but the scales of quantised weights. LoRA matrices that
are attached afterwards belong to no unit: every process has all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.file_layout import FileLayout, file_layout
from loratune.model.architecture.roles import Role
from loratune.model.architecture.structure import decoder_of, output_layer
from loratune.model.files import weight_files
from loratune.model.from_folder import load_empty
from loratune.model.hardware import Hardware
from loratune.model.memory import return_large_blocks
from loratune.model.sharding.quantized_shards import (
    quantised_in,
    read_codes,
    require_whole_blocks,
    sharded_as,
    use_states,
)
from loratune.model.sharding.units import layers_of, require_apart, unfit, units_of
from loratune.model.weights.quantized_rows import Quantised, make_quantized
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sections import ModelSettings

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


def load_sharded(
    folder: Path, hardware: Hardware, dtype: torch.dtype, attention: str, quantised: Quantised | None = None
) -> CausalModel:
    """A causal language model, frozen, whose decoder, embedding and head are sharded over the processes.

    What is beside them, such as the layers that read images, is whole in each process.

    Args:
        folder: model folder.
        hardware: the device of this process.
        dtype: of the weights.
        attention: transformers' name of the implementation.
        quantised: what is in 4 bits; nothing by default.

    Raises:
        LoratuneError: it cannot be loaded, or its layers are not apart from each other.
    """
    return_large_blocks()
    files = TensorFiles(weight_files(folder))
    model, layout = _without_values(folder, files, dtype, attention, quantised)
    mesh = init_device_mesh(hardware.device.type, (hardware.processes,))
    is_tied = _shard(model, mesh)
    shapes = layout.shapes({name: info.shape for name, info in files.infos.items()})
    source = _Source(files, layout, shapes, hardware.device)
    states: dict[str, list[QuantState]] = {}
    for name, module, attribute in _places(model):
        if quantised and name in quantised.matrices | quantised.stacks:
            states[name] = _quantise(module, attribute, name, source, dtype, quantised.double)
        elif name in layout.parts:
            _read(module, attribute, name, source)
        elif attribute in module._buffers:
            module._buffers[attribute] = module._buffers[attribute].to(hardware.device)
        files.release(layout.tensors_of(name) if name in layout.parts else [])
    if quantised:
        use_states(model, states, quantised.compute_dtype)
        model.is_loaded_in_4bit = True  # as transformers says it, so that TRL gives the adapter the same first values
    if is_tied:
        output_layer(model).weight = model.get_input_embeddings().weight
    _require_running(model)
    loaded: CausalModel = model
    return loaded


def with_same_shards(model: CausalModel, folder: Path, attention: str) -> CausalModel:
    """Return another model with the shards of a loaded one; see `with_same_weights`.

    Args:
        model: result of `load_sharded`, without an adapter.
        folder: that it was loaded from.
        attention: with which it was loaded.
    """
    quantised, states = quantised_in(model) or (None, {})
    other, _ = _without_values(folder, TensorFiles(weight_files(folder)), model.dtype, attention, quantised)
    held = next(weight for weight in decoder_of(model).parameters() if isinstance(weight, DTensor))
    _shard(other, held.device_mesh)
    loaded = dict(model.named_modules())
    for name, module, attribute in _places(other):
        own = getattr(loaded[name.rpartition(".")[0]], attribute)
        if attribute in module._buffers:
            module._buffers[attribute] = own
        else:
            setattr(module, attribute, nn.Parameter(own.detach(), requires_grad=False))
    if quantised:
        use_states(other, states, quantised.compute_dtype)
    _require_running(other)
    copied: CausalModel = other
    return copied


def require_shardable(settings: ModelSettings, lora: LoraSettings) -> None:
    """Refuse settings with which weights are trained, not divided by rows, or read outside the forward of their layer.

    Raises:
        LoratuneError: names them all.
    """
    set_to = {
        f"model.quantization {settings.quantization}": settings.quantization == "int8",
        "lora.modules_to_save": bool(lora.modules_to_save),
        f"lora.bias {lora.bias}": lora.bias != "none",
        "lora.use_dora": lora.use_dora,
        f"lora.init {lora.init}": lora.starts_from_base or lora.starts_from_rows,
    }
    if odd := [name for name, is_set in set_to.items() if is_set]:
        raise LoratuneError(
            f"model.sharding fsdp does not go with {' and '.join(odd)}: leave that out, or take model.sharding none",
            Exit.USAGE,
        )


def require_apart_from_vocabulary(roles: Mapping[str, Role]) -> None:
    """Refuse an adapter on the embedding or the head, whose loss is computed while the head is gathered.

    Args:
        roles: name → role of the modules that are to be adapted.

    Raises:
        LoratuneError: names them.
    """
    if names := [name for name, role in roles.items() if role in (Role.EMBEDDING, Role.HEAD)]:
        raise LoratuneError(
            f"model.sharding fsdp: {' and '.join(names)} cannot be adapted; leave them out of lora.target_modules, or "
            "take model.sharding none",
            Exit.USAGE,
        )


def _without_values(
    folder: Path, files: TensorFiles, dtype: torch.dtype, attention: str, quantised: Quantised | None
) -> tuple[Any, FileLayout]:
    """Return a causal language model with nothing in it yet, and where the files have its values."""
    one_by_one = {"experts_implementation": "eager"} if quantised and quantised.stacks else {}
    model = load_empty(folder, dtype, attn_implementation=attention, **one_by_one)
    keep_in_float32(model)
    layout = file_layout(model, files.infos)
    if quantised:
        require_whole_blocks(model, quantised.matrices)
        make_quantized(model, quantised)
    return model, layout


def keep_in_float32(model: Any) -> None:
    """Give a model without values the types with which transformers loads it: some weights are too coarse otherwise."""
    plan = model._get_dtype_plan(model.dtype)
    for name, module, attribute in _places(model):
        kept = [dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), name)]
        tensor = getattr(module, attribute)
        if kept and tensor.is_floating_point():
            tensor.data = tensor.data.to(kept[0])


def _shard(model: CausalModel, mesh: DeviceMesh) -> bool:
    """Make units of a model without values; return whether its head had the weight of its embedding.

    A weight is in one unit alone, so a tied head gets one of its own. It is given the embedding's shard later.
    """
    embedding, head = model.get_input_embeddings(), output_layer(model)
    layers, decoder = layers_of(model), decoder_of(model)
    require_apart(model, layers)
    is_tied = head.weight is embedding.weight
    if is_tied:
        head.weight = nn.Parameter(torch.empty_like(embedding.weight), requires_grad=False)
    scalars = {weight for weight in model.parameters() if not weight.ndim}  # which have no rows
    for unit in units_of(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    # In its backward pass, a layer gathers the unit before it ahead; before the first one that is the embedding, which
    # no gradient is computed with. The decoder's own weights are gathered already.
    layers[0].set_modules_to_backward_prefetch([decoder])
    return is_tied


def _require_running(model: CausalModel) -> None:
    """Run a model for the first time, the decoder ahead: torch takes the unit that runs first for the outermost one.

    A model may read weights outside the forward of their unit, where they are not gathered.

    Raises:
        LoratuneError: names the model.
    """
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            decoder_of(model)(input_ids=ids, use_cache=False)
            model(input_ids=ids, use_cache=False)
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise unfit(model, "it reads weights outside the layer that they belong to") from error


def _places(model: CausalModel) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, module, attribute) of every parameter and buffer."""
    for path, module in model.named_modules():
        for attribute in [*module._parameters, *module._buffers]:
            if getattr(module, attribute) is not None:
                yield f"{path}.{attribute}", module, attribute


class _Source(NamedTuple):
    """Where values come from, and where they go."""

    files: TensorFiles
    layout: FileLayout
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters."""
    device: torch.device

    def rows(self, name: str, empty: DTensor, dtype: torch.dtype) -> torch.Tensor:
        """Return this process's rows of a parameter; with few rows, some processes have none."""
        own = _own_rows(len(empty), empty.device_mesh)
        if own.start == own.stop:
            return torch.empty(0, *self.shapes[name][1:], dtype=dtype, device=self.device)
        return self.layout.rows(name, own, self.files).to(self.device, dtype, copy=True).contiguous()


def _read(module: Any, attribute: str, name: str, source: _Source) -> None:
    """Give a parameter or buffer its values, or this process's rows of them."""
    empty = getattr(module, attribute)
    if not isinstance(empty, DTensor):
        values = source.layout.read(name, source.files).to(source.device, empty.dtype, copy=True)
        if attribute in module._buffers:
            module._buffers[attribute] = values
        else:
            setattr(module, attribute, nn.Parameter(values, requires_grad=False))
        return
    shard = sharded_as(empty, source.rows(name, empty, empty.dtype), empty.shape)
    setattr(module, attribute, nn.Parameter(shard, requires_grad=False))


def _quantise(
    module: Any, attribute: str, name: str, source: _Source, dtype: torch.dtype, double: bool
) -> list[QuantState]:
    """Give a parameter its codes; return the scales of all rows."""
    empty = getattr(module, attribute)
    values = source.rows(name, empty, dtype)
    parameter, states = read_codes(empty, values, torch.Size(source.shapes[name]), double)
    setattr(module, attribute, parameter)
    return states


def _own_rows(rows: int, mesh: DeviceMesh) -> slice:
    """Return this process's part: all have as many rows as the first one, but the last ones."""
    size = -(-rows // mesh.size())
    start = min(rows, size * mesh.get_local_rank())
    return slice(start, min(rows, start + size))
