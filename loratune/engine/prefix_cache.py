"""Reuses the keys and values of finished requests that share a prefix with a new prompt."""

from __future__ import annotations

from loratune.engine.kv_cache import BatchedKVCache


class PrefixCache:
    """The token ids whose keys and values free slots still hold.

    Args:
        cache: the cache with the slots.
    """

    def __init__(self, cache: BatchedKVCache) -> None:
        self._cache = cache
        self._kept: dict[int, tuple[str, list[int]]] = {}
        """Slot → adapter and token ids."""

    def keep(self, slot: int, adapter: str, ids: list[int]) -> None:
        """Record the contents of a slot that is now free."""
        self._kept[slot] = (adapter, ids)

    def take(self, slot: int, adapter: str, prompt: list[int]) -> int:
        """Copy the longest cached prefix of a prompt into the prompt's slot.

        Args:
            slot: slot of the prompt.
            adapter: adapter whose keys and values are needed.
            prompt: token ids; the last one is always computed, because its logits are needed.

        Returns:
            Number of the prompt's tokens that the slot now holds.
        """
        self._kept = {place: known for place, known in self._kept.items() if self._cache.holds(place, len(known[1]))}
        lengths = {place: _common(prompt, ids) for place, (other, ids) in self._kept.items() if other == adapter}
        source = max(lengths, key=lambda place: (lengths[place], place == slot), default=slot)
        length = min(lengths.get(source, 0), len(prompt) - 1)
        if length and source != slot:
            self._cache.move(source, slot, length)
        self._kept.pop(slot, None)
        return length

    def forget(self) -> None:
        self._kept.clear()


def _common(one: list[int], other: list[int]) -> int:
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
