"""tags.json: a user's names for a run. It is read and written here alone, and no seal covers it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object
from loratune.runs.folder import TAGS
from loratune.runs.status import require_run
from loratune.runs.typed_json import require_version
from loratune.writing import disk_errors_explained, write_json

TAGS_VERSION = 1
TAG = re.compile(r"[^\W_][\w.+:/@-]{0,39}")
"""Letters of any script, digits and a few signs, so that tags stand beside each other without quotes."""
KEY = "tags"


def read_tags(run: Path) -> tuple[str, ...]:
    """Return a run's tags, sorted; none without a file.

    Raises:
        LoratuneError: the file is damaged, or written by a later version of loratune.
    """
    path = run / TAGS
    if not path.is_file():
        return ()
    values = read_json_object(path)
    require_version(values, TAGS_VERSION, path)
    tags = values.get(KEY)
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise LoratuneError(f"{path}: damaged: it holds no list of tags; delete it, and tag the run again", Exit.MODEL)
    return tuple(sorted(set(tags)))


def change_tags(run: Path, add: Iterable[str] = (), remove: Iterable[str] = ()) -> tuple[str, ...]:
    """Add and remove tags, and return all that the run has then.

    Raises:
        LoratuneError: the folder is no run, a new tag is not well formed, or one to remove is not there.
    """
    require_run(run)
    known, added, removed = set(read_tags(run)), set(add), set(remove)
    if unfit := sorted(tag for tag in added if not TAG.fullmatch(tag)):
        raise LoratuneError(
            f"{', '.join(map(repr, unfit))}: a tag begins with a letter or digit, and has at most 40 letters, digits "
            "and . _ + : / @ -",
            Exit.USAGE,
        )
    if missing := sorted(removed - known):
        told = f"its tags are {', '.join(sorted(known))}" if known else "it has no tags"
        raise LoratuneError(f"{run} is not tagged {', '.join(missing)}; {told}", Exit.USAGE)
    tags = sorted((known | added) - removed)
    with disk_errors_explained(run / TAGS, "make room, or allow writing there"):
        write_json(run / TAGS, {"format_version": TAGS_VERSION, KEY: tags})
    return tuple(tags)
