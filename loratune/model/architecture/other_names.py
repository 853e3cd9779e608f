"""What other programs call the matrices of a model in their adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from loratune.model.architecture.vocabulary import HEAD_MODULE

RENAMED = {"unembed_tokens": HEAD_MODULE}
"""Tinker's name of a module → transformers'."""


class Share(NamedTuple):
    """A matrix that is some rows of a larger one in transformers."""

    whole: str
    """Last part of the larger one's name."""
    place: int
    """Its position among the matrices that the larger one consists of."""


SPLIT = {name: Share("in_proj_qkv", place) for place, name in enumerate(("in_proj_q", "in_proj_k", "in_proj_v"))}
"""Queries, keys and values of a gated delta net, which Tinker adapts separately."""
STACKED = {
    "gate_proj": Share("gate_up_proj", 0),
    "up_proj": Share("gate_up_proj", 1),
    "down_proj": Share("down_proj", 0),
    "w1": Share("gate_up_proj", 0),
    "w3": Share("gate_up_proj", 1),
    "w2": Share("down_proj", 0),
}
"""Matrices of an expert, which transformers stacks; w1 to w3 are Mixtral's and Tinker's names."""
SHARES = {"in_proj_qkv": 3, "gate_up_proj": 2, "down_proj": 1}
"""Number of matrices that a larger one consists of."""
_EXPERT = re.compile(r"(?P<stack>(?:.*\.)?experts)\.(?:(?P<number>\d+)\.)?(?P<matrix>\w+)")
# In checkpoints of Megatron itself, whose matrices are cut as it distributes them.
MEGATRON = re.compile(r"\.(linear_in|linear_out|linear_qkv|linear_fc1|linear_fc2)\.")


class Matrix(NamedTuple):
    """A matrix with LoRA, as an adapter's file names it."""

    target: str
    """transformers' name of the module, or of the parameter with a stack of matrices."""
    place: int = 0
    """Position among the matrices that the target consists of."""
    number: int | None = None
    """Number in the stack; None for no stack, or all of it."""
    is_share: bool = False
    """Whether the target has more than this matrix."""


def matrix_of(module: str) -> Matrix:
    """Return what a module's name in a file of another program stands for.

    Args:
        module: dotted name, without PEFT's prefix.
    """
    match = _EXPERT.fullmatch(module)
    if match and match["matrix"] in STACKED:
        share, number = STACKED[match["matrix"]], match["number"]
        return Matrix(f"{match['stack']}.{share.whole}", share.place, None if number is None else int(number), True)
    parent, dot, last = module.rpartition(".")
    if last in SPLIT:
        return Matrix(f"{parent}{dot}{SPLIT[last].whole}", SPLIT[last].place, is_share=True)
    if last in RENAMED:
        return Matrix(RENAMED[last])
    return Matrix(module)


def sides_of(stack: str, shape: Sequence[int], hidden: int) -> tuple[int, int] | None:
    """Return the inputs and outputs of the matrices in a stack (number, outputs, inputs).

    Args:
        stack: name of the parameter.
        shape: its shape.
        hidden: width of the model.

    Returns:
        None for a stack that is stored the other way round, or is none of a gated MLP's.
    """
    _, rows, columns = shape
    last = stack.rpartition(".")[2]
    is_known = last in SHARES and hidden == (columns if SHARES[last] > 1 else rows)
    return (columns, rows) if is_known else None
