"""Earlier names of settings, and dropped settings; both keep working."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loratune import console
from loratune.errors import Exit, LoratuneError

RENAMED = {
    "model.attention": "model.attn_implementation",
    "lora.targets": "lora.target_modules",
    "data.train_on": "data.train_on_turns",
    "data.too_long": "data.truncation_strategy",
    "data.levels": "data.severity",
    "data.clean": "data.remove",
    "prompt.thinking": "prompt.enable_thinking",
    "training.steps": "training.max_steps",
    "training.max_gradient_norm": "training.max_grad_norm",
    "training.tokens_per_batch": "training.tokens_per_pass",
}
"""Old dotted name → present name. A name may be a prefix of others (`data.levels.short`)."""

BATCH_SIZE, ACCUMULATION = "training.batch_size", "training.gradient_accumulation"
EARLIER_BATCH_SIZE = 4
"""Default of training.batch_size when it was the rows of a micro-batch on one device."""

EARLIER_DEFAULTS: dict[str, float] = {
    "lora.rank": 8,
    "lora.alpha": 16,
    "lora.dropout": 0.05,
    "training.learning_rate": 1e-4,
    "training.max_length": 1024,
}
"""A run that began with these goes on with them, where its recipe leaves them out."""

DROPPED: dict[str, str] = {
    ACCUMULATION: "training.batch_size is now the rows of a whole optimizer step, over all devices",
    "evaluation.batch_size": "a validation pass holds as many tokens as a training pass",
}
"""Dropped setting, an integer → what makes it unnecessary. It is still read, with a notice."""


def current_name(name: str) -> str | None:
    """Return the present name of a dotted setting, or of a key within one; None if it was dropped."""
    for old in _itself_and_above(name):
        if old in DROPPED:
            return None
        if old in RENAMED:
            return RENAMED[old] + name[len(old) :]
    return name


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of an earlier version, by dotted name, under their present names."""
    named = ((current_name(name), value) for name, value in values.items())
    present = {name: value for name, value in named if name is not None}
    if ACCUMULATION in values:
        present[BATCH_SIZE] = values.get(BATCH_SIZE, EARLIER_BATCH_SIZE) * values[ACCUMULATION]
    return present


def rename_keys(values: dict[str, Any], lines: dict[str, int], note: Callable[[str, str], None]) -> dict[str, int]:
    """Rename the keys of a recipe's nested values in place.

    Args:
        values: the recipe's values by section; changed in place.
        lines: dotted name → line in the file.
        note: called with the old and new name of each renamed setting.

    Returns:
        The lines by present names.

    Raises:
        ValueError: a setting is given under both names.
    """
    both = []
    for old, new in RENAMED.items():
        place, name = _section_of(values, old)
        if place is None or name not in place:
            continue
        target, new_name = _section_of(values, new)
        if target is None or new_name in target:
            both.append(f"{old} is now called {new}, and both are given; remove {old}")
            continue
        target[new_name] = place.pop(name)
        note(old, new)
    if both:
        raise ValueError("\n".join(both))
    return {current_name(name) or name: line for name, line in lines.items()}


def drop_keys(values: dict[str, Any], note: Callable[[str], None]) -> None:
    """Remove dropped settings from the nested values of a recipe, with flags laid over them.

    Args:
        values: the recipe's values by section; changed in place.
        note: called with a sentence for each dropped setting.

    Raises:
        ValueError: the value that another setting takes in is not a positive integer.
    """
    for name, reason in DROPPED.items():
        place, key = _section_of(values, name)
        if place is None or key not in place:
            continue
        value = place.pop(key)
        if name == ACCUMULATION:
            note(_join_accumulation(place, value, reason))
        else:
            note(f"{name} is ignored: {reason}")


def _join_accumulation(training: dict[str, Any], accumulation: Any, reason: str) -> str:
    """Multiply the micro-batch of an earlier version by its gradient accumulation; return the notice."""
    rows = training.get("batch_size", EARLIER_BATCH_SIZE)
    if type(rows) is not int or type(accumulation) is not int or rows < 1 or accumulation < 1:
        raise ValueError(f"{ACCUMULATION}: {reason}; write that number there instead")
    training["batch_size"] = rows * accumulation
    return f"{reason}: batch_size {rows} × gradient_accumulation {accumulation} is read as {rows * accumulation}"


def _itself_and_above(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _section_of(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any] | None, str]:
    """Return the values of a setting's section, and its name in them; None if there is no such section."""
    section, _, name = dotted.rpartition(".")
    place = values.get(section) if section else values
    return (place if isinstance(place, dict) else None), name


def renamed_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return flags under their present names, with a notice for each renamed one.

    Raises:
        LoratuneError: a setting is given under both names.
    """
    present: dict[str, Any] = {}
    for name, value in flags.items():
        now = current_name(name) or name
        if now in present or (now != name and now in flags):
            raise LoratuneError(f"--{name} is now called --{now}, and both are given; remove --{name}", Exit.USAGE)
        if now != name:
            console.say(f"--{name} is now --{now} (the old name still works)")
        present[now] = value
    return present
