"""Sizes brought to multiples of a unit, so that few shapes are computed with."""


def round_up(count: int, unit: int) -> int:
    """The next multiple of a unit: the count itself, or more."""
    return -(-count // unit) * unit
