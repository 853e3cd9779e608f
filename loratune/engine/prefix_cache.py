"""What slots still hold of ended answers, so that a conversation's next question does not read everything again."""

from __future__ import annotations

from loratune.engine.kv_cache import SlotCache


class Prefixes:
    """Token ids whose keys and values lie in slots that nobody uses.

    Args:
        cache: has the slots.
    """

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._kept: dict[int, tuple[str, list[int]]] = {}
        """Slot → adapter and token ids."""

    def keep(self, slot: int, adapter: str, ids: list[int]) -> None:
        """Remember what a slot holds that is no longer used."""
        self._kept[slot] = (adapter, ids)

    def take(self, slot: int, adapter: str, prompt: list[int]) -> int:
        """Bring the longest beginning of a prompt that some slot holds into the prompt's own slot.

        Args:
            slot: of the prompt, within the cache's room.
            adapter: whose keys are wanted.
            prompt: token ids; the last one is always read anew, since its logits are needed.

        Returns:
            How many of its tokens the slot holds now.
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
        """Nothing is held any more."""
        self._kept.clear()


def _common(one: list[int], other: list[int]) -> int:
    """Length of what two lists begin with."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
