"""Atomic writes: a name refers to either the complete new content or the old one, and links are not followed.

Temporary files and folders have unguessable names next to the final one:

.loratune-<32 hexadecimal digits>.tmp    a file
.loratune-<32 hexadecimal digits>/       the staging folder of a new folder, removed at the end
  owner.json                             its target; locked while the process lives
  made/                                  the new content
  earlier/                               the previous content
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError

TORCH_WRITER_ERRORS = ("iostream error", "unexpected pos", "PytorchStreamWriter failed")
"""Messages of torch.save for a failed write."""
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
DISK_ERRORS = (*FULL_DISK_ERRORS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
TEMPORARY = ".loratune-"
"""Prefix of temporary names."""
TEMPORARY_NAME = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]{32}(\.tmp)?")
OWNER, MADE, EARLIER = "owner.json", "made", "earlier"
PROGRAM = "loratune"
NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def current_umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def apply_umask(folder: Path) -> None:
    """Give files the mode of the umask; safetensors 0.8 always writes 0600 (safetensors#782)."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~current_umask())


def check_new_file(path: Path, overwrite: bool) -> None:
    """Check the place of a file that a command is to write, as its flags --file and --overwrite give it.

    Raises:
        LoratuneError: there is no such folder, the name is that of a folder, or the file exists and is to be kept.
    """
    if path.is_dir():
        raise LoratuneError(f"{path} is a folder; give --file a name in it", Exit.USAGE)
    if not path.parent.is_dir():
        raise LoratuneError(f"{path.parent}: no such folder; make it, or choose another --file", Exit.IO)
    if path.exists() and not overwrite:
        raise LoratuneError(f"{path} exists already; choose another --file, or replace it with --overwrite", Exit.USAGE)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text atomically and durably."""
    write_pieces(path, [text.encode()])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace a file's content atomically and durably, from pieces.

    If the name is a link, the link itself is replaced.
    """
    temporary = path.with_name(f"{_unguessable_name()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | NEW_FILE, 0o666), "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_text(path: Path, text: str) -> None:
    """Append to a file, or create it.

    Raises:
        OSError: the name is a link, among other reasons.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb") as file:
        file.write(text.encode())


def try_to_write(folder: Path) -> None:
    """Create and remove a file in a folder; permission bits do not cover root, quotas, or read-only disks.

    Raises:
        OSError: the file cannot be created.
    """
    trial = folder / f"{_unguessable_name()}.tmp"
    os.close(os.open(trial, os.O_WRONLY | NEW_FILE, 0o666))
    trial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _unguessable_name() -> str:
    return f"{TEMPORARY}{secrets.token_hex(16)}"


def write_json(path: Path, value: Any) -> None:
    """Replace a file with a value as JSON."""
    try:
        write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
    except UnicodeEncodeError:  # a file name that is not UTF-8: its bytes have to be escaped
        write_text(path, json.dumps(value, indent=2) + "\n")


ELSEWHERE = "make room, or choose another folder with --output"
"""What to do where a command cannot write its result."""


@contextmanager
def disk_errors_explained(output: Path, remedy: str = ELSEWHERE) -> Iterator[None]:
    """Turn disk errors into one message.

    Args:
        output: what is written.
        remedy: what to do.

    Raises:
        LoratuneError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        is_of_writing = error.errno in FULL_DISK_ERRORS or (error.filename and _belongs_to(error.filename, output))
        if not is_of_writing and not (error.errno in DISK_ERRORS and error.filename is None):
            raise
        is_unreadable = error.filename and os.path.lexists(error.filename) and not os.access(error.filename, os.R_OK)
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise LoratuneError(
            f"{error.filename or output}: cannot be {'read' if is_unreadable else 'written'}: {reason}. What had been "
            f"saved before is untouched; {remedy}",
            Exit.IO,
        ) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in TORCH_WRITER_ERRORS):
            raise
        raise LoratuneError(
            f"{output}: a file cannot be written: the disk is full, or the file-size limit (ulimit -f) was "
            f"reached. What had been saved before is untouched; {remedy}",
            Exit.IO,
        ) from error


def _belongs_to(place: str | bytes, output: Path) -> bool:
    """Return whether a path belongs to an output or its temporary files."""
    try:
        name, *_ = Path(os.fsdecode(place)).absolute().relative_to(output.absolute().parent).parts
    except (ValueError, OSError):  # outside, or the working folder is gone
        return False
    return name == output.name or name.startswith((f"{output.name}.", TEMPORARY))


@contextmanager
def folder_in_one_step(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the target's name on success, and is removed after an error."""
    remove_unfinished(target.parent, target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _staging_folder(target) as place:
        made = place / MADE
        made.mkdir()
        yield made
        apply_umask(made)
        for path in made.rglob("*"):
            if path.is_file():
                _sync_file(path)
        sync_folder(made)
        if os.path.lexists(target):
            target.rename(place / EARLIER)
        made.rename(target)
    sync_folder(target.parent)


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """Create a folder next to the target that later processes may remove once this one has ended."""
    place = target.with_name(_unguessable_name())
    place.mkdir()
    owner = os.open(place / OWNER, os.O_RDWR | NEW_FILE, 0o666)
    try:
        with suppress(OSError):  # a file system without locks: leftovers are never removed
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(owner, json.dumps({"program": PROGRAM, "target": target.name}).encode())
        yield place
    finally:
        _clear(place, target)
        os.close(owner)


def remove_unfinished(folder: Path, name: str | None = None) -> list[Path]:
    """Remove leftovers of killed processes in a folder, and only those that are verifiably theirs.

    Args:
        folder: the folder to search.
        name: target of the leftovers; None for all, if no other process can be running.

    Returns:
        The removed paths.
    """
    left = [path for path in folder.glob(f"{TEMPORARY}*") if TEMPORARY_NAME.fullmatch(path.name)]
    removed = []
    for path in left:
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and name is None and _is_hardly_begun(path):
            shutil.rmtree(path)
        elif is_folder:
            with _owned(path) as target:
                if target is None or (name is not None and target != name):
                    continue
                _clear(path, folder / target)
        elif name is None and path.suffix == ".tmp":
            path.unlink(missing_ok=True)
        else:
            continue
        removed.append(path)
    return removed


def _is_hardly_begun(place: Path) -> bool:
    """Return whether a process was killed before it wrote owner.json, or after it had emptied its staging folder."""
    return all(path.name == OWNER and path.lstat().st_size == 0 for path in place.iterdir())


@contextmanager
def _owned(place: Path) -> Iterator[str | None]:
    """Yield the target of a staging folder; None if its process may be alive, or if it is not a staging folder."""
    try:
        owner = os.open(place / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        yield _target_of(owner)
    finally:
        os.close(owner)


def _target_of(owner: int) -> str | None:
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = json.loads(os.read(owner, 10_000))
        name = str(content["target"])
        return name if content["program"] == PROGRAM and Path(name).name == name != "" else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _clear(place: Path, target: Path) -> None:
    """Remove a staging folder, owner.json last; restore the previous content if the target's name is free."""
    with suppress(OSError):
        if not os.path.lexists(target) and os.path.lexists(place / EARLIER):
            (place / EARLIER).rename(target)
        for path in place.iterdir():
            if path.name != OWNER:
                remove(path)
        (place / OWNER).unlink()
        place.rmdir()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
