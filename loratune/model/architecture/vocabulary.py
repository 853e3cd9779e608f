"""The two parameters that have a row for each token: the embedding and the output head, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Headers of files and tensors of an adapter are read before any model is there to be asked. What stands before these
# modules' names differs, as in models that read images too; the names themselves do not.
EMBEDDING_MODULE, HEAD_MODULE = "embed_tokens", "lm_head"

# What an adapter's names alone tell: vLLM serves these projections of every dense model, while what it does with
# others depends on the model, which may not be on this machine.
USUAL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Vocabulary(NamedTuple):
    """Names of parameters in memory, or of tensors in files."""

    embedding: str
    head: str

    @property
    def modules(self) -> tuple[str, str]:
        """Names of the modules that hold them."""
        return self.embedding.removesuffix(".weight"), self.head.removesuffix(".weight")


def vocabulary_of(names: Iterable[str]) -> Vocabulary:
    """Embedding and head among the names of a model's parameters, or of its files' tensors.

    Args:
        names: of all. A head that is the embedding may be missing among them, and an adapter may reach neither; the
            name is then the one that it would have.
    """
    found = sorted(names, key=lambda name: (name.count("."), name))
    return Vocabulary(
        next((name for name in found if _is_weight_of(EMBEDDING_MODULE, name)), f"model.{EMBEDDING_MODULE}.weight"),
        next((name for name in found if _is_weight_of(HEAD_MODULE, name)), f"{HEAD_MODULE}.weight"),
    )


def _is_weight_of(module: str, name: str) -> bool:
    return name.split(".")[-2:] == [module, "weight"]
