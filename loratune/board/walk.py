"""Finds runs, models and evaluations below a folder by the names of their files, without opening any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loratune.evaluation.result import RESULT, RESULTS
from loratune.evaluation.tasks.result import TASKS_RESULT
from loratune.runs.folder import CONTENTS, MANIFEST, STATUS, VERIFICATION

Kind = Literal["run", "model", "evaluation"]
DEPTH = 4
"""Of folders below the searched one: `out/sweep/trials/00-…` is the third below the one that holds `out`."""
MOST_FOLDERS = 50_000
"""That are looked into, where somebody gives a folder of everything."""


@dataclass(frozen=True)
class Place:
    """A folder of loratune's."""

    folder: Path
    name: str
    """Its path below the searched folder, or the folder's own name."""
    kind: Kind


@dataclass
class Walk:
    """What is below a folder."""

    root: Path
    depth: int = DEPTH
    """Number of levels of folders that are looked into."""
    places: list[Place] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Names of the folders directly below that hold nothing of loratune's, or cannot be read."""
    is_cut: bool = False
    """Whether there were more than `MOST_FOLDERS`."""

    def __post_init__(self) -> None:
        about = self.root.stat()
        self._seen = {(about.st_dev, about.st_ino)}
        self._enter(self.root, self.depth)
        self.places.sort(key=lambda place: place.name)

    def _enter(self, folder: Path, depth: int) -> bool:
        """Take up what a folder holds, and return whether anything of loratune's is in it."""
        names, folders = self._listed(folder)
        kind = _kind_of(names)
        if kind:
            self.places.append(Place(folder, self._name(folder), kind))
            folders = [name for name in folders if name not in CONTENTS] if kind == "run" else []
            depth = min(depth, 1)
        found = [(name, self._enter(folder / name, depth - 1)) for name in folders if depth]
        if folder == self.root and not kind:
            self.foreign = sorted(name for name, has_any in found if not has_any)
        return kind is not None or any(has_any for _, has_any in found)

    def _listed(self, folder: Path) -> tuple[set[str], list[str]]:
        """Return the names of files and, once for each folder whatever links lead to it, of folders."""
        names, folders = set[str](), list[str]()
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if not _is_folder(entry):
                    names.add(entry.name)
                elif not entry.name.startswith(".") and self._is_new(entry):
                    folders.append(entry.name)
        return names, folders

    def _is_new(self, entry: os.DirEntry[str]) -> bool:
        about = entry.stat()
        identity = about.st_dev, about.st_ino
        if identity in self._seen or len(self._seen) >= MOST_FOLDERS:
            self.is_cut |= identity not in self._seen
            return False
        self._seen.add(identity)
        return True

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix() if folder != self.root else folder.absolute().name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kind_of(names: set[str]) -> Kind | None:
    if STATUS in names or {MANIFEST, "recipe.yaml"} <= names:
        return "run"
    if VERIFICATION in names:
        return "model"
    return "evaluation" if names & {RESULT, RESULTS, TASKS_RESULT} else None


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder; links count nothing."""
    return sum(_sizes(folder))


def _sizes(folder: Path | str) -> Iterator[int]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    yield from _sizes(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry.stat(follow_symlinks=False).st_size
