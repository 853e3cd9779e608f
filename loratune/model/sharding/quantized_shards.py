"""Quantises a sharded base: each process its own rows, with the scales of all.

The codes are sharded. The scales are sent once, while the base is loaded, so that every process has all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.weights.quantized_rows import BLOCK, Quantised, QuantizedLinear, quantise, state_of_scales
from loratune.model.weights.quantized_stack import QuantizedStack, compute_with_stacks
from loratune.model.weights.stack import stacks_of
from loratune.protocols import CausalModel

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

States: TypeAlias = "Mapping[str, list[QuantState]]"
"""Parameter → scales of the matrix, or of each matrix of a stack."""


def require_whole_blocks(model: CausalModel, matrices: set[str]) -> None:
    """Refuse matrices whose rows cannot be quantised by themselves.

    Raises:
        LoratuneError: names them.
    """
    shapes = {name: weight.shape for name, weight in model.named_parameters() if name in matrices}
    if odd := [f"{name}: {list(shape)}" for name, shape in shapes.items() if shape[1] % BLOCK]:
        raise LoratuneError(
            f"model.sharding fsdp with model.quantization nf4 needs rows of a multiple of {BLOCK} values, and some "
            f"matrices have others:\n{bullet_list(odd, limit=5)}\ntake model.sharding none or model.quantization none",
            Exit.USAGE,
        )


def read_codes(
    empty: DTensor, values: torch.Tensor, shape: torch.Size, double: bool
) -> tuple[nn.Parameter, list[QuantState]]:
    """Quantise this process's part of a weight; each process has to call this.

    Args:
        empty: the sharded codes, without values.
        values: the rows of the matrix, or the matrices of the stack, that this process has codes of.
        shape: of the whole weight.
        double: quantise the scales too.

    Returns:
        The sharded codes, and the scales of the whole.
    """
    codes, own = quantise(values)
    sizes = torch.Size((shape[0], -(-shape[1:].numel() // BLOCK)))
    scales = sharded_as(empty, own.view(len(values), sizes[1]), sizes).full_tensor()
    shard = sharded_as(empty, codes.view(len(values), *empty.shape[1:]), empty.shape)
    matrices = [(scales.flatten(), shape)] if len(shape) == 2 else [(one, shape[1:]) for one in scales]
    return nn.Parameter(shard, requires_grad=False), [
        state_of_scales(one.contiguous(), size, values.dtype, double) for one, size in matrices
    ]


def use_states(model: Any, states: States, compute_dtype: torch.dtype) -> None:
    """Give quantised layers and stacks their scales."""
    stacks: dict[nn.Module, dict[str, QuantizedStack]] = defaultdict(dict)
    for name, found in states.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        module._parameters[attribute].states = found  # with which its bytes and values are counted
        if isinstance(module, QuantizedLinear):
            (module.quant_state,) = found
        else:
            stacks[module][attribute] = QuantizedStack(None, found, compute_dtype)
    for module, own in stacks.items():
        compute_with_stacks(module, own)


def quantised_in(model: CausalModel) -> tuple[Quantised, States] | None:
    """Return what of a sharded base is quantised, and its scales; None if nothing is."""
    matrices: dict[str, list[QuantState]] = {}
    stacks: dict[str, list[QuantState]] = {}
    types = set()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            matrices[f"{path}.weight"] = [module.quant_state]
            types.add(module.compute_dtype)
        for attribute, stack in stacks_of(module).items():
            if isinstance(stack, QuantizedStack):
                stacks[f"{path}.{attribute}"] = stack.states
                types.add(stack.compute_dtype)
    if not types:
        return None
    states = matrices | stacks
    double = next(iter(states.values()))[0].nested
    return Quantised(set(matrices), set(stacks), types.pop(), double), states


def sharded_as(other: DTensor, part: torch.Tensor, shape: torch.Size) -> DTensor:
    """Return a tensor of a shape of which this process has a part, with as many rows as it has of another."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, other.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
