"""Implements --push of merge and export: checks the destination before the work, and uploads after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratune import console
from loratune.cli.again import repeated
from loratune.errors import Exit, LoratuneError


@contextmanager
def push(text: str | None, folder: Path, private: bool, dry_run: bool) -> Iterator[None]:
    """Push a folder after the body of the `with` statement has created it.

    Args:
        text: hf:org/name or ms:org/name; None pushes nothing.
        folder: the folder to push.
        private: whether the repository is created private.
        dry_run: only list the files.

    Raises:
        LoratuneError: a push flag is given without --push; or see `parse_push` and `push_folder`.
    """
    if text is None:
        if not (private and dry_run):
            raise LoratuneError("--public and --no-dry-run are for --push", Exit.USAGE)
        yield
        return
    from loratune.delivery.export.hub import parse_push, push_folder

    destination = parse_push(text)
    yield
    result = push_folder(folder, destination, private, dry_run)
    files = [(name, console.memory(size)) for name, size in result.files.items()]
    console.table(files, title=f"{'would push' if dry_run else 'pushed'} to {destination.url}")
    if dry_run:
        console.say("dry run: nothing was uploaded")
        console.next_step(repeated("upload it", {"--no-dry-run", "--overwrite"}))
