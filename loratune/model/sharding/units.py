"""The units whose weights are gathered together, and what each process would hold of them."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import decoder_of, output_layer
from loratune.model.weights.held import held_bytes
from loratune.protocols import CausalModel


def layers_of(model: CausalModel) -> list[Any]:
    decoder: Any = decoder_of(model)
    return [layer for part in decoder.children() if isinstance(part, nn.ModuleList) for layer in part]


def units_of(model: CausalModel) -> list[Any]:
    """Return the modules whose weights are gathered together; one within another comes first."""
    return [*layers_of(model), model.get_input_embeddings(), decoder_of(model), output_layer(model)]


class Shares(NamedTuple):
    """What each process would hold of a base."""

    processes: int
    divided: set[int]
    """Identities of the parameters that are."""
    gathered_bytes: int
    """Of a unit, and of the one that is gathered next."""

    def own_bytes(self, parameter: Any) -> int:
        """Return the bytes that the first process holds of a parameter: some rows and all scales."""
        if id(parameter) not in self.divided:
            return held_bytes(parameter)
        rows = -(-len(parameter) // self.processes)
        elsewhere = (len(parameter) - rows) * parameter[0].numel() * parameter.element_size()
        return held_bytes(parameter) - int(elsewhere)


def shares_of(model: CausalModel, processes: int) -> Shares:
    """Compute how a base would be divided.

    Args:
        model: without an adapter; it needs no values.
        processes: that share it.

    Raises:
        LoratuneError: its layers are not apart from each other.
    """
    require_apart(model, layers_of(model))
    divided: set[int] = set()
    sizes = []
    for unit in units_of(model):
        own = {id(one): one for one in unit.parameters() if one.ndim and id(one) not in divided}
        divided |= own.keys()
        sizes.append(sum(one.numel() * one.element_size() for one in own.values()))
    return Shares(processes, divided, 2 * max(sizes))


def require_apart(model: CausalModel, layers: list[Any]) -> None:
    """Refuse a model whose layers cannot be gathered one after the other.

    Raises:
        LoratuneError: says why.
    """
    weights = Counter(id(weight) for layer in layers for weight in layer.parameters())
    if layers and max(weights.values(), default=1) == 1:
        return
    raise unfit(model, "its layers share weights" if layers else "no list of layers is found in its decoder")


def unfit(model: CausalModel, reason: str) -> LoratuneError:
    return LoratuneError(
        f"model.sharding fsdp does not fit {type(model).__name__}: {reason}; take model.sharding none", Exit.USAGE
    )
