"""Hashes each tensor of a model over all its bytes, in background threads, with a cache."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError
from loratune.runs.remembered import identity_of, recall, remember
from loratune.safetensors_header import read_header

PIECE_BYTES = 1 << 20
MAX_THREADS = 4
"""With more threads, disk or memory bandwidth is the limit."""
KIND = "bases"


class TensorHashes:
    """Hashes of the tensors in some files, computed in background threads after `start`.

    Args:
        paths: safetensors files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._found: dict[Path, dict[str, str]] = {}
        self._work: Iterator[tuple[Path, str, dict[str, Any], int]] = iter(())
        self._stats: dict[Path, tuple[int, ...]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._started = False

    def start(self) -> None:
        """Start hashing, once; cached files need no thread."""
        if self._started:
            return
        self._started = True
        left = []
        for path in self.paths:
            self._stats[path] = identity_of(path)
            known = recall(KIND, path, self._stats[path])
            self._found[path] = known or {}
            left += [] if known else [path]
        if not left:
            return
        self._work = _tensors(left)
        count = min(MAX_THREADS, os.cpu_count() or 1)
        # Threads of a pool would block the end of the process after Ctrl-C until everything is hashed.
        self._threads = [threading.Thread(target=self._hash, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def result(self) -> dict[str, str]:
        """Wait, and return tensor name → sha256 of dtype, shape and bytes, in order.

        Raises:
            LoratuneError: a file cannot be read.
        """
        self.start()
        for thread in self._threads:
            thread.join()
        if isinstance(self._error, LoratuneError):
            raise self._error
        if self._error:
            raise LoratuneError(f"{self.paths[0].parent}: cannot be read: {self._error}", Exit.MODEL) from self._error
        if self._threads:
            for path in self.paths:
                remember(KIND, path, self._stats[path], self._found[path])
            self._threads = []
        return {name: value for found in self._found.values() for name, value in sorted(found.items())}

    def _hash(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        try:
            while True:
                with self._lock:
                    path, name, entry, start = next(self._work)
                digest = _digest(path, entry, start, buffer)
                with self._lock:
                    self._found[path][name] = digest
        except StopIteration:
            return
        except Exception as error:  # raised by `result`
            self._error = error


def _tensors(paths: Sequence[Path]) -> Iterator[tuple[Path, str, dict[str, Any], int]]:
    for path in paths:
        start, header = read_header(path)
        # In file order, so that a disk reads sequentially.
        for name, entry in sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0])):
            yield path, name, entry, start


def _digest(path: Path, entry: dict[str, Any], start: int, buffer: memoryview) -> str:
    digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
    place, end = (start + offset for offset in entry["data_offsets"])
    with path.open("rb", buffering=0) as file:
        file.seek(place)
        while place < end:
            count = file.readinto(buffer[: min(len(buffer), end - place)])
            if not count:
                raise OSError(f"{path}: ends before its tensors do")
            digest.update(buffer[:count])
            place += count
    return digest.hexdigest()
