"""The first line of an answer file: the program that writes it, and the inputs that determine the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import LONGEST_LINE, open_plain
from loratune.runs.folder import PROGRAM

FORMAT = 1
START_ANEW = "start over with --overwrite, or choose another place with --output"

About = dict[str, Any]
"""The inputs that determine the answers: name → JSON value."""


def is_answer_file(part: Path) -> bool:
    """Return whether a file holds results that loratune writes, finished or not."""
    return is_header(header_of(part))


def header_values(about: About) -> dict[str, Any]:
    """Return the first line of results for these inputs."""
    return {"program": PROGRAM, "format": FORMAT, "about": about}


def is_header(known: dict[str, Any]) -> bool:
    """Return whether a first line is one that loratune writes."""
    return known.get("program") == PROGRAM and known.get("format") == FORMAT


def check_same(place: Path, known: Any, about: About) -> None:
    """Make sure that results are those of the same inputs.

    Raises:
        LoratuneError: lists the inputs that differ.
    """
    known = known if isinstance(known, dict) else {}
    names = [name for name in {**known, **about} if known.get(name) != about.get(name)]
    if not names:
        return
    listed = bullet_list([f"{name}: {_shown(known.get(name))} there, {_shown(about.get(name))} now" for name in names])
    raise LoratuneError(f"{place} holds answers to something else:\n{listed}\n{START_ANEW}", Exit.USAGE)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def header_of(part: Path) -> dict[str, Any]:
    """Return the first line of a file; an empty object if it cannot be read."""
    try:
        with open_plain(part) as file:
            return parsed(file.readline(LONGEST_LINE))
    except OSError:
        return {}


def parsed(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; return an empty one for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
