"""Decodes sequences of different lengths in one forward pass, over a cache with a slot for each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from loratune.engine.cache_choice import make_cache
from loratune.engine.forward_batch import SLOT_ATTENTION, ForwardBatch, use_slot_attention
from loratune.engine.kv_cache import BatchedKVCache, KVCache
from loratune.engine.paged_cache import PAGE
from loratune.engine.prefix_cache import PrefixCache
from loratune.engine.sampling import Sampling
from loratune.engine.scheduler import Decoder, Reader
from loratune.engine.sequence import RunningSequence
from loratune.model.adapter.own_parameters import BASE
from loratune.model.architecture.layer_memory import has_states
from loratune.model.architecture.structure import causal_model, layer_count, text_config
from loratune.multiples import round_up
from loratune.protocols import CausalModel

KEPT_BYTES = 2 * 2**30
"""Maximum size of an idle KV cache that grows, which is kept for the next request of a conversation."""


class SlotDecoder(Decoder):
    """A decoder whose sequences share forward passes.

    It is not right for every model: `open_decoder` tries it.

    Args:
        model: see `Decoder`; its attention is replaced until `close`.
        slots: see `Decoder`.
        cache_budget_bytes: limit of the KV cache; sequences that could exceed it wait. None for no limit on a CPU, and
            for what is free on a GPU.
        uses_pages: whether the cache on a GPU is one of pages.
    """

    def __init__(
        self,
        model: CausalModel,
        slots: int = 32,
        cache_budget_bytes: float | None = None,
        uses_pages: bool = True,
    ) -> None:
        super().__init__(model, slots)
        base = causal_model(model)
        self.windows: set[int | None] = set()
        """Sliding windows that layers have had in `score`, in tokens; None for no limit."""
        self._attention: str = text_config(base.config)._attn_implementation
        use_slot_attention(base)
        try:
            self._cache = make_cache(base, slots, cache_budget_bytes, self.filled_cache, uses_pages)
        except BaseException:
            self._release()
            raise
        self._prefixes = PrefixCache(self._cache)

    @property
    def room(self) -> int | None:
        return self._cache.tokens

    def reset(self) -> None:
        self._cache.clear()
        self._prefixes.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def score(self, sequences: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read sequences side by side as `step` would, by the base without adapters.

        Args:
            sequences: token ids.
            counts: for each pass, the number of tokens to read of each sequence, which may be 0.

        Returns:
            Logits after what is read: [those of the first pass, of the second …, vocabulary].
        """
        rows = [RunningSequence(list(ids), Sampling(), frozenset(), slot=slot) for slot, ids in enumerate(sequences)]
        lengths, logits = [len(row.prompt) for row in rows], []
        kept, self._cache = self._cache, self._cache.another(sum(round_up(length, PAGE) for length in lengths))
        try:
            for slot in range(len(rows)):
                self._cache.begin(lengths[: slot + 1])
            for numbers in counts:
                read = [(row, count) for row, count in zip(rows, numbers, strict=True) if count]
                parts = [row.prompt[row.read : row.read + count] for row, count in read]
                logits.append(self._forward([row for row, _ in read], parts))
                self.windows |= self._cache.feed.windows if self._cache.feed else set()
                for row, count in read:
                    row.read += count
        finally:
            self._cache = kept
        return torch.cat(logits)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def filled_cache(self) -> BatchedKVCache:
        """Return a cache that holds one token of one sequence."""
        config = causal_model(self.model).config
        cache = BatchedKVCache(layer_count(config), has_states=has_states(config))
        cache.begin([1])
        self._pass(cache, cache.batch([0], [0], [1], self.device), [[0]], [BASE])
        return cache

    def _release(self) -> None:
        super()._release()
        if self._attention != SLOT_ATTENTION:
            causal_model(self.model).set_attn_implementation(self._attention)

    def _enter(self, new: RunningSequence) -> int:
        source, shared = self._prefixes.take(new, self.running[:-1])
        return self._cache.begin([one.longest for one in self.running], source, shared)

    def _leave(self, running: RunningSequence, last: RunningSequence) -> None:
        has_ended = self._cache.end(running.slot, last.slot, last.held)
        left = running if has_ended else last
        self._prefixes.keep(last.slot, left)

    def _fits(self, lengths: Sequence[int]) -> bool:
        return self._cache.fits(lengths)

    def _rest(self) -> None:
        if not self._cache.is_fixed and self._cache.size_bytes > KEPT_BYTES:
            self.reset()

    def _reader(self, length: int, adapter: str) -> Reader:
        cache = self._cache.another(length)
        cache.begin([length])

        def read_on(read: int, part: list[int], wanted: int) -> torch.Tensor:
            feed = cache.batch([0], [read], [len(part)], self.device)
            return self._pass(cache, feed, [part], [adapter], wanted)[0]

        return read_on

    def _pass_of(self, running: RunningSequence, count: int) -> Hashable:
        adapter = running.adapter if self._adapters.is_apart(running.adapter) else None
        return adapter, count if self._cache.has_states else None

    def _logits(self, rows: Sequence[RunningSequence], new: Sequence[Sequence[int]]) -> torch.Tensor:
        counts = [len(tokens) for tokens in new]
        feed = self._cache.batch([row.slot for row in rows], [row.held for row in rows], counts, self.device)
        return self._pass(self._cache, feed, new, [row.adapter for row in rows])[:, -1]

    def _pass(
        self,
        cache: KVCache,
        feed: ForwardBatch,
        new: Sequence[Sequence[int]],
        adapters: list[str],
        keep: int = 1,
    ) -> torch.Tensor:
        """Return logits [rows, keep, vocabulary] of the last positions of a forward pass."""
        filled = [[0] * (feed.width - len(tokens)) + list(tokens) for tokens in new]
        cache.begin_pass(feed)
        output = self.model(
            input_ids=torch.tensor(filled).to(self.device, non_blocking=True),  # without waiting for what runs
            position_ids=feed.positions,
            use_cache=True,
            logits_to_keep=keep,
            feed=feed,
            **{self._cache_argument: cache},
            **self._adapters.select(adapters),
        )
        cache.end_pass()
        feed.require_all_terms()
        logits: torch.Tensor = output.logits
        return logits
