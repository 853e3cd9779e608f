"""Compares files with their recorded hashes; all seals use this comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import is_file
from loratune.printable import shortened
from loratune.runs.folder import file_sha256

Records = Mapping[str, Mapping[str, Any]]
"""Name of a file, relative to its folder → its `bytes` and `sha256`."""


LONGEST_NAME = 255
"""That file systems take, in bytes."""


@dataclass(frozen=True)
class FileCheck:
    """Differences between files and their records."""

    files: int
    """Number of recorded files."""
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def unchanged(self) -> int:
        """Number of recorded files that equal their records."""
        return self.files - len(self.changed) - len(self.missing)

    def lines(self, wanted: Callable[[str], bool] = lambda _: True) -> list[str]:
        """Return a line for each difference in files whose names are wanted."""
        kinds = (("changed", self.changed), ("missing", self.missing), ("added", self.added))
        return [f"{shortened(name, LONGEST_NAME)}: {kind}" for kind, names in kinds for name in names if wanted(name)]


def are_records(values: Any) -> bool:
    """Return whether a JSON value has the form of file records, whose names stay inside their folder."""
    return isinstance(values, dict) and all(
        isinstance(record, dict) and _is_inside(name) for name, record in values.items()
    )


def _is_inside(name: str) -> bool:
    """Return whether a name can be that of a file below a folder."""
    try:
        path = PurePosixPath(os.fsdecode(os.fsencode(name)))
    except UnicodeEncodeError:
        return False
    return "\0" not in name and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def compare_files(
    folder: Path, records: Records, present: Iterable[str] = (), hash_of: Callable[[Path], str] = file_sha256
) -> FileCheck:
    """Compare files with their records. Each file is hashed, unless its size already differs.

    Args:
        folder: folder of the files.
        records: records of the expected files.
        present: names of existing files that would be read; those without a record count as added.
        hash_of: returns a file's sha256.

    Raises:
        LoratuneError: a file cannot be read.
    """
    missing = {name for name in records if not is_file(folder / name)}
    try:
        changed = [name for name in records if name not in missing and _differs(folder / name, records[name], hash_of)]
    except OSError as error:
        raise LoratuneError(f"{error.filename}: cannot be read: {error.strerror}", Exit.MODEL) from error
    added = set(present) - records.keys()
    return FileCheck(len(records), tuple(sorted(changed)), tuple(sorted(missing)), tuple(sorted(added)))


def _differs(path: Path, record: Mapping[str, Any], hash_of: Callable[[Path], str]) -> bool:
    size = path.stat().st_size
    return size != record.get("bytes", size) or hash_of(path) != record.get("sha256")
