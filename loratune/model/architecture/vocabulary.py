"""The names of the two parameters with a row per token: embedding and output head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

# Headers of files and adapters are read before there is a model to ask. The path to these modules varies, as in
# multimodal models; their own names do not, except for GPT-2's.
EMBEDDING_MODULE, HEAD_MODULE = "embed_tokens", "lm_head"
EMBEDDING_MODULES = (EMBEDDING_MODULE, "wte")


class Projection(Enum):
    """What a module is, as far as its name tells; see `projection_of`."""

    USUAL = "a projection of attention or of an MLP"
    RECURRENT = "a projection of a gated delta net"
    DECAY = "a decay or β gate of a gated delta net"
    STACK = "the matrices of several experts"
    ROUTER = "a router"
    EMBEDDING = "the embedding or the head"
    OTHER = "something else"


# For code that only has an adapter's names: servers recognise modules by theirs, and the base may not be on this
# machine. The usual projections are those of every dense model.
PROJECTIONS = {
    Projection.USUAL: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    Projection.RECURRENT: ("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "out_proj"),
    Projection.DECAY: ("in_proj_a", "in_proj_b", "in_proj_ba"),
    Projection.ROUTER: ("gate", "router", "shared_expert_gate"),
    Projection.EMBEDDING: (*EMBEDDING_MODULES, HEAD_MODULE),
}


def projection_of(module: str) -> Projection:
    """Return what a module is, by its name.

    Args:
        module: dotted name.
    """
    if re.search(r"(^|\.)experts$", module):
        return Projection.STACK
    last = module.rpartition(".")[2]
    return next((kind for kind, names in PROJECTIONS.items() if last in names), Projection.OTHER)


class Vocabulary(NamedTuple):
    """Names of parameters in memory, or of tensors in files."""

    embedding: str
    head: str

    @property
    def modules(self) -> tuple[str, str]:
        """Names of their modules."""
        return self.embedding.removesuffix(".weight"), self.head.removesuffix(".weight")


def vocabulary_of(names: Iterable[str]) -> Vocabulary:
    """Return embedding and head among the names of a model's parameters or tensors.

    Args:
        names: all names. A tied head may be missing, and an adapter may have neither; the default names are used then.
    """
    found = sorted(names, key=lambda name: (name.count("."), name))
    return Vocabulary(
        next((name for name in found if _is_weight_of(EMBEDDING_MODULES, name)), f"model.{EMBEDDING_MODULE}.weight"),
        next((name for name in found if _is_weight_of((HEAD_MODULE,), name)), f"{HEAD_MODULE}.weight"),
    )


def _is_weight_of(modules: tuple[str, ...], name: str) -> bool:
    *_, module, kind = ("", *name.split("."))
    return module in modules and kind == "weight"
