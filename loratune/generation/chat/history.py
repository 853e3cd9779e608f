"""The history of the chat's input line, in a file that only its owner can read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import History

from loratune import console
from loratune.writing import write_text

MOST_ENTRIES = 1000
MOST_CHARACTERS = 10_000
"""Longer entries are not stored."""
_MOST_BYTES = 4 * 2**20
_OWNER_ONLY = 0o600


def history_path() -> Path:
    """Return the history's path: in $XDG_STATE_HOME if that is absolute, otherwise in ~/.local/state."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():
        return given / "loratune" / "chat_history"
    try:
        return Path.home() / ".local" / "state" / "loratune" / "chat_history"
    except RuntimeError:  # no home folder, as in many containers
        return Path(os.devnull, "chat_history")


class ChatHistory(History):
    """One entry per line, as a JSON string, newest last. If the file is unusable, it warns once and keeps no history.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._earlier: list[str] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._append(b"")
            self._earlier = [entry for line in self._read_lines() if (entry := _entry_of(line)) is not None]
            self._is_usable = True
        except OSError as error:
            console.warn(f"{path}: what you type is not kept for later chats: {error.strerror}")
            self._is_usable = False

    def load_history_strings(self) -> Iterable[str]:
        """Return the entries of earlier chats, newest first."""
        return self._earlier[::-1]

    def store_string(self, string: str) -> None:
        if self._is_usable and len(string) <= MOST_CHARACTERS:
            # The disk may be full, and a warning would disturb the line editor.
            with suppress(OSError):
                self._append(json.dumps(string).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        # Without O_NONBLOCK, opening a named pipe would wait for a reader.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, _OWNER_ONLY)
        try:
            os.fchmod(handle, _OWNER_ONLY)
            os.write(handle, line)
        finally:
            os.close(handle)

    def _read_lines(self) -> list[str]:
        """Return the newest lines, and truncate a long file to them."""
        if not self.path.is_file():
            raise OSError(errno.EINVAL, "it is not a file")
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(max(0, size - _MOST_BYTES))
            lines = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
        newest = lines[-MOST_ENTRIES:]
        if size > _MOST_BYTES or len(lines) > 2 * MOST_ENTRIES:
            write_text(self.path, "\n".join(newest) + "\n")
            self._append(b"")
        return newest


def _entry_of(line: str) -> str | None:
    """Parse the entry of a line; None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, str) else None
