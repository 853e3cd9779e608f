"""Finds the keys and values of ended and running requests that begin like a new prompt."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.engine.kv_cache import KVCache
from loratune.engine.sequence import RunningSequence


class PrefixCache:
    """The token ids whose keys and values free slots still hold.

    Args:
        cache: the cache with the slots.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._kept: dict[int, tuple[tuple[str, str], list[int]]] = {}
        """Slot → `shares_with` and token ids."""

    def keep(self, slot: int, left: RunningSequence) -> None:
        """Record the contents of a slot that is now free: those of a sequence."""
        self._kept[slot] = (left.shares_with, left.ids[: left.held])

    def take(self, new: RunningSequence, running: Sequence[RunningSequence]) -> tuple[int, int]:
        """Find the longest cached prefix of a prompt; what its slot held is not known to other prompts any more.

        Args:
            new: the prompt, with its slot and the adapter whose keys and values are needed.
            running: the other sequences that run.

        Returns:
            A slot, and the number of the prompt's tokens that it holds, 0 if none does. The last token of a prompt is
            always computed, because its logits are needed. A slot with states is of use only if the prompt begins with
            all of its tokens.
        """
        self._kept = {place: known for place, known in self._kept.items() if self._cache.holds(place, len(known[1]))}
        known = self._kept | {one.slot: (one.shares_with, one.ids[: one.held]) for one in running}
        lengths = {
            place: self._usable(new.prompt, ids) for place, (key, ids) in known.items() if key == new.shares_with
        }
        source = max(lengths, key=lambda place: (lengths[place], place == new.slot), default=new.slot)
        self._kept.pop(new.slot, None)
        return source, lengths.get(source, 0)

    def _usable(self, prompt: list[int], ids: list[int]) -> int:
        """Return how many tokens of a prompt need not be read where a slot holds others."""
        length = min(_common(prompt, ids), len(prompt) - 1)
        return length if length == len(ids) or not self._cache.has_states else 0

    def forget(self) -> None:
        self._kept.clear()


def _common(one: list[int], other: list[int]) -> int:
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
