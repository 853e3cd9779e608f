"""Compares a merged or exported folder with its verification.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import require_plain_files
from loratune.runs.file_hashes import FileCheck, Records, compare_files
from loratune.runs.folder import VERIFICATION, file_sha256, sealed
from loratune.runs.remembered import remembered_sha256
from loratune.runs.tokenizer_files import tokenizer_files
from loratune.runs.verification import AnyVerification, read_verification

LOADED = (".safetensors", ".gguf", ".bin", ".json", ".jinja", "vocab.txt", "merges.txt", ".model", ".py", "Modelfile")
"""Name suffixes of files that programs load; model cards, licences, notes and a hub's own files are not loaded."""


ANSWERS_REPORT = ".report.json"
"""Suffix of what `infer` writes beside the answers to a file of rows, which may lie in the folder of their model."""


def is_loaded(name: str) -> bool:
    """Return whether programs load files of this name, so that a change would change the model."""
    return name.endswith(LOADED) and not name.endswith(ANSWERS_REPORT)


def is_idle(name: str) -> bool:
    """Return whether no program loads files of this name."""
    return not is_loaded(name)


def recorded_files(folder: Path) -> Records:
    """Return name → size and sha256 of the files of a folder, for verification.json."""
    return {name: sealed(path) for name, path in sorted(_files(folder))}


def check_files(
    folder: Path, verification: AnyVerification, hash_of: Callable[[Path], str] = file_sha256
) -> FileCheck | None:
    """Compare a folder's files with those that verification.json records.

    Args:
        folder: the folder.
        verification: what its verification.json says.
        hash_of: gives a file's sha256.

    Returns:
        None for a folder of an earlier version, which recorded no hashes.

    Raises:
        LoratuneError: a file cannot be read, is a pipe or a device, or is a link that leads out of the folder.
    """
    require_plain_files(folder)
    if verification.files is None:
        return None
    outside = [
        f"{name}: a link that leads out of the folder, and is not followed"
        for name in verification.files
        if _leads_out(folder, name)
    ]
    if outside:
        raise LoratuneError(
            f"{folder} is not as it was verified:\n{bullet_list(outside)}\nput the file itself there", Exit.MODEL
        )
    # A folder of templates may be a link, which nothing else follows.
    present = {*(name for name, _ in _files(folder)), *tokenizer_files(folder)}
    return compare_files(folder, verification.files, present, hash_of)


def seal_remarks(folder: Path, verification: AnyVerification) -> list[str]:
    """Return a warning about a verification.json without a hash of itself."""
    if verification.is_sealed:
        return []
    return [
        f"{folder}: its {VERIFICATION} carries no seal (an earlier version of loratune wrote it, or the seal was "
        "removed), so whether it has been changed since cannot be told"
    ]


def require_intact(folder: Path, force: bool) -> list[str]:
    """Refuse a merged or exported folder whose files have changed; any other folder passes.

    Hashes are remembered for as long as a file is not touched, unlike those of `loratune verify`.

    Args:
        folder: a model's folder.
        force: warn instead of refusing.

    Returns:
        What was let through, or could not be told.

    Raises:
        LoratuneError: verification.json has been changed, or files that programs load were changed, are missing, or
            have been added.
    """
    verification = read_verification(folder)
    if verification is None:
        has_other = os.path.lexists(folder / VERIFICATION)
        return [f"{folder}: its {VERIFICATION} is not loratune's, so no file was compared"] if has_other else []
    remarks, check = seal_remarks(folder, verification), check_files(folder, verification, remembered_sha256)
    problems = check.lines(is_loaded) if check else []
    if not problems:
        return remarks
    message = f"{folder} is not as it was verified:\n{bullet_list(problems, limit=5)}"
    if force:
        return [*remarks, message]
    raise LoratuneError(f"{message}\nmake it again, or insist with --force", Exit.MODEL)


def _leads_out(folder: Path, name: str) -> bool:
    """Return whether a file lies outside of its folder; a hub's cache keeps those of `snapshots/*` in `blobs`."""
    own = Path(os.path.realpath(folder))
    places = [own, own.parents[1] / "blobs"] if own.parent.name == "snapshots" else [own]
    path = Path(os.path.realpath(folder / name))
    return not any(path.is_relative_to(place) for place in places)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file except verification.json, and hidden files of hubs and editors."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != VERIFICATION and not any(part.startswith(".") for part in name.split("/")):
            yield name, path
