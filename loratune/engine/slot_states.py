"""The states of layers without keys, such as linear attention and convolutions: one of each per slot.

A state stands for all tokens that were read. It cannot go back to fewer of them, and it takes in whatever a row is
filled up with. So the rows of a pass have equal lengths, and a sequence begins with another one's state only if it
begins with all of that one's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from loratune.engine.forward_batch import ForwardBatch
from loratune.multiples import round_up

SLOTS_UNIT = 4
"""Slots after the first are made so many at a time, so that not every new answer copies those that run."""


class StateName(NamedTuple):
    """Which of a model's states."""

    kind: str
    """"conv" or "recurrent"."""
    layer: int
    number: int
    """Of several states of this kind in the layer."""


class SlotStates:
    """The states as [slots, …] each, 0 where nothing was read."""

    def __init__(self) -> None:
        self._kept: dict[StateName, torch.Tensor] = {}
        self._lent: dict[StateName, torch.Tensor] = {}
        """Copies for the current pass, which a layer may change in place."""
        self._slots = 0

    def begin(self, slot: int, source: int | None) -> None:
        """Give a slot the states of another one, or those of a sequence of which nothing was read.

        Args:
            slot: it may be one more than there are.
            source: the other one, or the slot itself; None for no other.
        """
        if slot >= self._slots:
            count = rounded_slots(slot + 1)
            for name, states in self._kept.items():
                more = states.new_zeros(count - len(states), *states.shape[1:])
                self._kept[name] = torch.cat([states, more])
            self._slots = count
        for states in self._kept.values():
            if source is None:
                states[slot] = 0
            elif source != slot:
                states[slot] = states[source]

    def move(self, source: int, target: int, has_swapped: bool) -> None:
        """Copy the states of one slot to another, or have the two swap theirs."""
        for states in self._kept.values():
            if source >= len(states):  # there was no memory for it
                states[target] = 0
            elif source != target:
                states[[source, target]] = states[[target, source] if has_swapped else [source, source]]

    def lend(self, name: StateName, feed: ForwardBatch) -> torch.Tensor | None:
        """Return a state of the rows of a pass, [rows, …], which may be changed in place; None before the first."""
        if name not in self._kept:
            return None
        run = feed.run
        if run is not None:
            return self._kept[name][run]
        self._lent[name] = self._kept[name][feed.places[0]]
        return self._lent[name]

    def write(self, name: StateName, states: torch.Tensor, feed: ForwardBatch) -> None:
        """Replace a state of the rows of a pass: [rows, …]."""
        if name not in self._kept:
            self._kept[name] = states.new_zeros(self._slots, *states.shape[1:])
        self._lent.pop(name, None)
        if feed.run is not None:
            self._kept[name][feed.run] = states
        else:
            self._kept[name][feed.places[0]] = states

    def take_back(self, feed: ForwardBatch) -> None:
        """Write what was lent in copies, at the end of a pass."""
        for name in list(self._lent):
            self.write(name, self._lent[name], feed)

    def forget_lent(self) -> None:
        self._lent.clear()

    def clear(self) -> None:
        """Free the memory."""
        self._kept, self._lent, self._slots = {}, {}, 0

    @property
    def slot_bytes(self) -> int:
        """What the states of one slot take."""
        return sum(states[0].nbytes for states in self._kept.values())

    def tensors(self) -> Iterable[torch.Tensor]:
        return self._kept.values()


class StateCache(Cache):
    """A cache whose states are in slots, with transformers' interface to them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.feed: ForwardBatch | None = None
        """The input of the current forward pass."""
        self.states = SlotStates()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the last inputs of a convolution, [rows, channels, inputs], which may be changed in place."""
        return self.states.lend(StateName("conv", layer_idx, state_idx), self._fed)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Keep the last inputs of a convolution.

        Args:
            conv_states: the new inputs, [rows, channels, width].
            layer_idx: index of the layer.
            state_idx: which convolution of the layer.
            conv_kernel_size: number of inputs that are kept; None for as many as there are new ones.

        Returns:
            What was kept with what is new, [rows, channels, kept + width].
        """
        name, size = StateName("conv", layer_idx, state_idx), conv_kernel_size or conv_states.shape[-1]
        before = self.states.lend(name, self._fed)
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:-1], size)
        inputs = torch.cat([before, conv_states], dim=-1)
        self.states.write(name, inputs[..., -before.shape[-1] :], self._fed)
        return inputs

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a state, [rows, …], which may be changed in place."""
        return self.states.lend(StateName("recurrent", layer_idx, state_idx), self._fed)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Replace a state, [rows, …]."""
        self.states.write(StateName("recurrent", layer_idx, state_idx), recurrent_states, self._fed)
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.states.slot_bytes > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def begin_pass(self, feed: ForwardBatch) -> None:
        self.feed = feed
        self.states.forget_lent()  # of a pass that has failed

    def end_pass(self) -> None:
        """Keep what layers have changed in place."""
        self.states.take_back(self._fed)

    @property
    def _fed(self) -> ForwardBatch:
        if self.feed is None:
            raise RuntimeError("a pass over the slots without a feed")
        return self.feed


def rounded_slots(count: int) -> int:
    """One alone, as most chats are, or several at a time."""
    return count if count <= 1 else round_up(count, SLOTS_UNIT)
