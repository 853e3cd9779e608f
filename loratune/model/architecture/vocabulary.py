"""The names of the two parameters with a row per token: embedding and output head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Headers of files and adapters are read before there is a model to ask. The path to these modules varies, as in
# multimodal models; their own names do not, except for GPT-2's.
EMBEDDING_MODULE, HEAD_MODULE = "embed_tokens", "lm_head"
EMBEDDING_MODULES = (EMBEDDING_MODULE, "wte")

# For code that only has an adapter's names: vLLM supports these projections of every dense model. Support for others
# depends on the model, which may not be on this machine.
USUAL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
