"""Lists the adapters in a folder by name, each with a version that changes with its files."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import LoratuneError
from loratune.plain_files import is_folder
from loratune.runs.checkpoint import SEAL
from loratune.runs.folder import ADAPTER, MANIFEST, RECIPE, STATUS, VERIFICATION
from loratune.runs.opening import is_run
from loratune.runs.remembered import identity_of
from loratune.runs.seals import ADAPTER_CONFIG, READ_IF_THERE
from loratune.runs.status import read_status
from loratune.runs.tokenizer_files import NAMED_TEMPLATES, TOKENIZER_FILES
from loratune.safetensors_header import read_header

SCAN_SECONDS = 1.0
"""A folder is listed again at most this often; a known adapter's own files are looked at for each request."""
WEIGHTS = "adapter_model.safetensors"
OF_RUN = (MANIFEST, RECIPE, STATUS)
OF_ADAPTER = frozenset({*READ_IF_THERE, *TOKENIZER_FILES, NAMED_TEMPLATES, SEAL, VERIFICATION})


@dataclass(frozen=True)
class FoundAdapter:
    """A whole adapter, as its files are now."""

    name: str
    path: Path
    """Run folder, checkpoint or plain PEFT folder."""
    version: str
    """Hash of path, and of size, times and inode of each file that is read."""
    changed: int
    """When its weights were written, in seconds since 1970."""


@dataclass(frozen=True)
class _Seen:
    """What was found out about a folder as long as its version stays."""

    version: str
    adapter: FoundAdapter | None
    """None if it is not whole."""


class AdapterFolders:
    """The runs and PEFT folders directly in a folder, by their own names.

    A folder is offered when it is whole: a run that has finished, and weights as long as their header says. Links are
    followed. Names that begin with a dot, are not text, or are taken are left out.

    Args:
        folder: the folder.
        taken: names that mean something else.
    """

    def __init__(self, folder: Path, taken: Collection[str] = ()) -> None:
        self.folder = folder
        self._taken = frozenset(taken)
        self._seen: dict[str, _Seen] = {}
        self._next_scan = 0.0
        self._lock = threading.Lock()

    def all(self) -> Mapping[str, FoundAdapter]:
        """Return the adapters by name, as of at most `SCAN_SECONDS` ago."""
        with self._lock:
            self._scan()
            return {name: seen.adapter for name, seen in sorted(self._seen.items()) if seen.adapter}

    def find(self, name: str) -> FoundAdapter | None:
        """Return an adapter as its files are now; None if there is none.

        The name may come from a client: it is compared with names in the folder, and never becomes a path before.
        """
        with self._lock:
            if name not in self._seen:
                self._scan()
            if name in self._seen:
                self._look_at(name)
            seen = self._seen.get(name)
            return seen.adapter if seen else None

    def _scan(self) -> None:
        if time.monotonic() < self._next_scan:
            return
        try:
            names = {entry.name for entry in os.scandir(self.folder)}
        except OSError:  # such as a share that is not mounted now
            names = set()
        for name in self._seen.keys() - names:
            del self._seen[name]
        for name in names:
            if not name.startswith(".") and name.isprintable() and name not in self._taken:
                self._look_at(name)
        self._next_scan = time.monotonic() + SCAN_SECONDS

    def _look_at(self, name: str) -> None:
        """Find out about a folder anew if a file has changed."""
        path = self.folder / name
        version = version_of(path)
        if version is None:
            self._seen.pop(name, None)
        elif name not in self._seen or self._seen[name].version != version:
            self._seen[name] = _Seen(version, _whole(name, path, version))


def version_of(path: Path) -> str | None:
    """Return what changes with the files that are read of an adapter; None if a path is no adapter's folder."""
    places = [(path, OF_ADAPTER), (path / ADAPTER, OF_ADAPTER)] if is_run(path) else [(path, OF_ADAPTER)]
    digest, count = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")), 0
    try:
        files = [path / name for name in OF_RUN if (path / name).exists()] if len(places) > 1 else []
        files += [Path(entry.path) for place, names in places for entry in _entries(place) if entry.name in names]
        for file in sorted(files):
            digest.update(f"{file.name} {identity_of(file)}\n".encode())
            count += file.name in (ADAPTER_CONFIG, MANIFEST)
    except OSError:  # it vanishes just now, or may not be read
        return None
    return digest.hexdigest() if count else None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder)) if is_folder(folder) else []


def _whole(name: str, path: Path, version: str) -> FoundAdapter | None:
    """Return an adapter if nothing of it is still being written, without reading its values."""
    folder = path / ADAPTER if is_run(path) else path
    weights = folder / WEIGHTS
    try:
        if (path / STATUS).is_file() and is_run(path) and read_status(path).state != "finished":
            return None
        if not (folder / ADAPTER_CONFIG).is_file():
            return None
        read_header(weights)
        return FoundAdapter(name, path, version, int(weights.stat().st_mtime))
    except (LoratuneError, OSError):
        return None
