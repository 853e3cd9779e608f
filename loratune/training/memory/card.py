"""Reads the memory of a card as `loratune plan --gpu` takes it; imports nothing that takes long."""

import re

from loratune.errors import Exit, LoratuneError

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 24GB or 80GiB.

    Raises:
        LoratuneError: it has no unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", text, re.IGNORECASE)
    size = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if not size:
        raise LoratuneError(
            f"--gpu {text}: write the memory of a card with its unit, such as 24GB or 80GiB", Exit.USAGE
        )
    return size
