"""gguf's names of a model's parameters, from its own table of each architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf

from loratune.model.architecture.structure import language_parts, layer_count
from loratune.protocols import CausalModel

SPLIT = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that transformers joins along the rows and that gguf names apart."""


class GgufName(NamedTuple):
    """A name in a GGUF file."""

    name: str
    kind: str
    """gguf's name of this kind of tensor, such as ATTN_Q; the same in all layers."""
    part: int = 0
    """Which of the matrices joined in the parameter this is."""
    parts: int = 1
    """Number of these matrices."""

    def as_kind(self, kind: str) -> str:
        """Return the name of another kind of tensor of the same layer."""
        own, other = (gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[each]].rpartition(".")[2] for each in (self.kind, kind))
        return self.name.replace(f".{own}", f".{other}")


def gguf_names(model: CausalModel, architecture: str) -> dict[str, list[GgufName]]:
    """Return the names of each parameter of the language model; none for one that the architecture does not have.

    Parameters outside of the language model, such as those that read images, are left out.

    Args:
        model: a model with or without values.
        architecture: gguf's name of the architecture.
    """
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], layer_count(model.config))
    return {parameter: _names(table, parameter, usual) for parameter, usual in _usual_names(model)}


def _usual_names(model: CausalModel) -> Iterator[tuple[str, str]]:
    """Yield the language model's parameters, and their names if it were loaded without anything else."""
    inner, last = language_parts(model)
    for name in model.state_dict():
        if name.startswith(inner):
            yield name, f"model.{name.removeprefix(inner)}"
        elif name.startswith(last):
            yield name, name


def _names(table: Any, parameter: str, usual: str) -> list[GgufName]:
    for name in (parameter, usual):
        stem, _, matrix = name.rpartition(".")
        parts = SPLIT.get(matrix, ())
        apart = [found for part in parts if (found := _found(table, f"{stem}.{part}"))]
        if apart and len(apart) == len(parts):
            return [one._replace(part=number, parts=len(parts)) for number, one in enumerate(apart)]
        if found := _found(table, name):
            return [found]
    return []


def _found(table: Any, name: str) -> GgufName | None:
    """Look up a parameter by its own name, or by its module's and how it ends."""
    module, _, kind = name.rpartition(".")
    tries = {
        name: ".weight" if kind.endswith("_proj") else "",  # a stack of matrices has no module of its own
        module: f".{kind}",
        f"{module}.{kind.removesuffix('_bias')}_proj": ".bias",
    }
    for key, ending in tries.items():
        if found := table.get_type_and_name(key):
            return GgufName(found[1] + ending, found[0].name)
    return None
