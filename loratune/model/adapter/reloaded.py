"""Loads an adapter's folder as other programs do, and computes logits with and without it."""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loratune.errors import Exit, LoratuneError, reason_of
from loratune.model.adapter.attach import load_adapter
from loratune.model.architecture.structure import causal_model, text_config
from loratune.model.from_folder import load_from_folder, load_plain
from loratune.protocols import CausalModel

ROWS, TOKENS = 2, 24
ROUNDING = 8
"""Units in the last place of the largest logit by which two computations of the same model may differ."""


@dataclass(frozen=True)
class Logits:
    """Logits of the same tokens."""

    base: torch.Tensor
    """Without the adapter (rows, tokens, vocabulary), in float32."""
    adapted: torch.Tensor
    """With it, of the same shape."""
    dtype: torch.dtype
    """Of the computation."""

    @property
    def change(self) -> float:
        """Largest difference that the adapter makes."""
        return _largest_difference(self.adapted, self.base)

    def difference(self, other: Logits) -> float:
        """Return the largest difference from another model with an adapter."""
        return _largest_difference(self.adapted, other.adapted)

    @property
    def rounding(self) -> float:
        """Largest difference that rounding may make."""
        return float(ROUNDING * torch.finfo(self.dtype).eps * self.adapted.abs().max())


def own_logits(base: Path, adapter: Path) -> Logits:
    """Return the logits of an adapter as loratune loads it.

    Args:
        base: folder of its base.
        adapter: PEFT folder.

    Raises:
        LoratuneError: the base cannot be loaded, or the adapter does not fit it.
    """
    model = load_plain(base)
    before = _of(model)
    logits = Logits(before, _of(load_adapter(model, adapter)), model.dtype)
    gc.collect()  # a model with hooks refers to itself, and another one needs its memory
    return logits


def reloaded_logits(base: Path, adapter: Path, auto: Any) -> Logits:
    """Return the logits of an adapter as transformers and PEFT load it.

    Args:
        base: folder of its base.
        adapter: PEFT folder; its config has been checked.
        auto: transformers' class that loads the base.

    Raises:
        LoratuneError: transformers cannot load the base, or PEFT the adapter.
    """
    model = load_from_folder(base, auto=auto, dtype="auto", attn_implementation="sdpa").eval()
    before = _of(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of missing tensors, which the logits tell
            adapted: Any = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    except (RuntimeError, ValueError, KeyError) as error:
        raise LoratuneError(f"PEFT cannot load it on {type(model).__name__}: {reason_of(error)}", Exit.MODEL) from error
    return Logits(before, _of(adapted.eval()), model.dtype)


def _of(model: CausalModel) -> torch.Tensor:
    """Return the logits of random tokens in float32."""
    # The tokens of images are at the end of a vocabulary.
    vocabulary = text_config(causal_model(model).config).vocab_size // 2
    ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
