"""Decodes each sequence by itself, over the cache that transformers makes for the model.

It takes as many forward passes per token as there are sequences, and is right for every model that `generate` is right
for.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from transformers import DynamicCache

from loratune.engine.scheduler import Decoder, Reader
from loratune.engine.sequence import RunningSequence
from loratune.model.architecture.structure import causal_model
from loratune.protocols import CausalModel


class PlainDecoder(Decoder):
    """A decoder whose sequences share nothing.

    Args:
        model: see `Decoder`.
        slots: see `Decoder`.
        reason: why sequences cannot share a forward pass, as a clause.
    """

    def __init__(self, model: CausalModel, slots: int = 32, reason: str | None = None) -> None:
        super().__init__(model, slots)
        if reason:
            self.notice = f"answers of this model are computed one by one, which is slower for several: {reason}"
        self._caches: list[DynamicCache] = []
        """The cache of each running sequence."""

    @property
    def room(self) -> int | None:
        return None

    def reset(self) -> None:
        self._caches = [self._new_cache() for _ in self.running]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _enter(self, new: RunningSequence) -> int:
        self._caches.append(self._new_cache())
        return 0

    def _leave(self, running: RunningSequence, last: RunningSequence) -> None:
        self._caches[running.slot] = self._caches[last.slot]
        self._caches.pop()

    def _fits(self, lengths: Sequence[int]) -> bool:
        return True

    def _rest(self) -> None:
        """Do nothing: the caches have left with their sequences."""

    def _reader(self, length: int, adapter: str) -> Reader:
        cache = self._new_cache()

        def read_on(read: int, part: list[int], wanted: int) -> torch.Tensor:
            return self._pass(cache, read, part, adapter, wanted)

        return read_on

    def _pass_of(self, running: RunningSequence, count: int) -> Hashable:
        return running.slot

    def _logits(self, rows: Sequence[RunningSequence], new: Sequence[Sequence[int]]) -> torch.Tensor:
        (row,), (tokens,) = rows, new
        return self._pass(self._caches[row.slot], row.held, tokens, row.adapter, 1)

    def _pass(self, cache: DynamicCache, read: int, tokens: Sequence[int], adapter: str, wanted: int) -> torch.Tensor:
        """Return logits [wanted, vocabulary] of the last positions of new tokens."""
        output = self.model(
            input_ids=torch.tensor([list(tokens)], device=self.device),
            position_ids=torch.arange(read, read + len(tokens), device=self.device)[None],
            use_cache=True,
            logits_to_keep=wanted,
            **{self._cache_argument: cache},
            **self._adapters.select([adapter]),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=causal_model(self.model).config)
