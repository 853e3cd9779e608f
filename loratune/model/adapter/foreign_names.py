"""Matches the names in an adapter's file with the modules of its base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from loratune.errors import Exit, LoratuneError

# PEFT's form is `base_model.model.MODULE.lora_A.weight`. Other files leave out the beginning or the end, or have the
# name of the adapter before the end, as a model's state_dict does.
LORA = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
)


def places_of(base: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return what LoRA can be on: module → shape of its matrix, parameter → shape of its stack, module of stacks → ().

    Args:
        base: parameter name → shape, of the base.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in base.items():
        module, _, attribute = name.rpartition(".")
        if len(shape) == 3:
            found |= {name: tuple(shape), module: ()}
        elif len(shape) == 2 and attribute == "weight":
            found[module] = tuple(shape)
    return found


def renamed_prefix(
    targets: Mapping[str, Sequence[int]], places: Mapping[str, Sequence[int]], place: object
) -> tuple[str, str] | None:
    """Return the beginning of names and what to put there instead, so that all targets are places of the base.

    Args:
        targets: name in the adapter's file → (columns, rows) of its LoRA; -1 if unknown.
        places: result of `places_of`.
        place: the adapter's folder, for messages.

    Returns:
        None if no beginning fits all targets.

    Raises:
        LoratuneError: several fit.
    """
    strange = [name for name in targets if name not in places]
    if not strange:
        return "", ""
    found = [
        pair
        for pair in _candidates(strange[0], places)
        if all(_fits(targets[name], places.get(replaced(name, pair) or "")) for name in strange)
    ]
    if len(found) > 1:
        other = " and ".join(f"{new or 'the beginning'}" for _, new in found)
        raise LoratuneError(
            f"{place}: {strange[0]} fits several modules of the base, those in {other}; rename the adapter's tensors",
            Exit.MODEL,
        )
    return found[0] if found else None


def replaced(name: str, pair: tuple[str, str]) -> str | None:
    """Return a dotted name with another beginning; None if it begins otherwise.

    Args:
        name: the name.
        pair: its beginning and the one to put there, without the dot that follows.
    """
    old, new = pair
    if old and not name.startswith(f"{old}."):
        return None
    rest = name.removeprefix(f"{old}.") if old else name
    return f"{new}.{rest}" if new else rest


def _candidates(name: str, places: Iterable[str]) -> set[tuple[str, str]]:
    """Return the pairs of beginnings that leave the longest common end."""
    longest, found = 1, set[tuple[str, str]]()
    parts = name.split(".")
    for place in places:
        others = place.split(".")
        common = 0
        while common < min(len(parts), len(others)) and parts[-1 - common] == others[-1 - common]:
            common += 1
        if common > longest:
            longest, found = common, set()
        if common == longest:
            found.add((".".join(parts[: len(parts) - common]), ".".join(others[: len(others) - common])))
    return found


def _fits(sizes: Sequence[int], shape: Sequence[int] | None) -> bool:
    """Return whether LoRA of some columns and rows fits a matrix, stored either way."""
    if shape is None:
        return False
    known = {size for size in sizes if size >= 0}
    return len(shape) != 2 or 1 in shape or known <= set(shape)  # a 4-bit matrix is one column of bytes
