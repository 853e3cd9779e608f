"""Reads sizes that users write: 24GB, 80GiB, 900M."""

import re

from loratune.errors import Exit, LoratuneError

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", re.IGNORECASE)
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, flag: str, least: int, most: int, wanted: str) -> int:
    """Return the bytes of a size; units of 1024 have an i (GiB), and a number without a unit counts bytes.

    Args:
        text: as typed.
        flag: that it is of.
        least, most: bounds in bytes.
        wanted: what to give, for the message: `a size such as 5GB`.

    Raises:
        LoratuneError: it is no size, or outside of the bounds.
    """
    match = SIZE.fullmatch(text)
    size = float(match[1]) * (1024 if match[3] else 1000) ** POWERS[match[2].lower()] if match else 0
    if not least <= size <= most:
        raise LoratuneError(f"{flag} {text!r}: give {wanted}", Exit.USAGE)
    return round(size)
