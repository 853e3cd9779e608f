"""verification.json of merged and exported folders: how they were made and verified, and a hash of every file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import read_json_object
from loratune.runs.file_hashes import FileCheck, are_records, compare_files
from loratune.runs.folder import FORMAT_VERSION, PROGRAM, VERIFICATION, file_sha256, sealed
from loratune.runs.remembered import remembered_sha256
from loratune.runs.versions import library_versions
from loratune.writing import write_json

LOADED = (".safetensors", ".gguf", ".bin", ".json", ".jinja", ".txt", ".model", ".py", "Modelfile")
"""Suffixes of files that programs load; model cards, licences and a hub's files do not affect a model."""


def is_loaded(name: str) -> bool:
    """Return whether programs could load a file of this name, so that a change could change the model."""
    return name.endswith(LOADED)


def is_idle(name: str) -> bool:
    """Return whether no program loads a file of this name."""
    return not is_loaded(name)


def write_verification(folder: Path, kind: str, report: dict[str, Any], hashes: bool = True) -> dict[str, Any]:
    """Write verification.json, the last file of a folder.

    Args:
        folder: folder with all other files.
        kind: "merged model" or "export".
        report: results of the verification.
        hashes: whether to record hashes of all files; temporary folders need none.

    Returns:
        The content of the file.
    """
    values = {"program": PROGRAM, "format_version": FORMAT_VERSION, "versions": library_versions(), "kind": kind}
    values |= report
    if hashes:
        values["files"] = {name: sealed(path) for name, path in sorted(_files(folder))}
    write_json(folder / VERIFICATION, values)
    return values


def read_verification(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's verification.json; None if it is missing or another program's.

    Raises:
        LoratuneError: it cannot be read.
    """
    if not (folder / VERIFICATION).is_file():
        return None
    values = read_json_object(folder / VERIFICATION)
    return values if values.get("program") == PROGRAM else None


def check_files(folder: Path, values: dict[str, Any], hash_of: Callable[[Path], str] = file_sha256) -> FileCheck | None:
    """Compare a folder's files with its verification.json.

    Args:
        folder: the folder.
        values: content of its verification.json.
        hash_of: returns a file's sha256.

    Returns:
        None for a folder of an earlier version, which recorded no hashes.

    Raises:
        LoratuneError: verification.json is damaged, or a file cannot be read.
    """
    if "files" not in values:
        return None
    known = values["files"]
    if not known or not are_records(known):
        raise LoratuneError(
            f"{folder / VERIFICATION}: damaged: it does not say what the folder's files were", Exit.MODEL
        )
    return compare_files(folder, known, dict(_files(folder)), hash_of)


def require_intact(folder: Path, force: bool) -> list[str]:
    """Raise if files of a merged or exported folder have changed; other folders pass.

    Unlike in `loratune verify`, hashes are cached until a file is changed.

    Args:
        folder: a model's folder.
        force: warn instead of raising.

    Returns:
        The forced problems.

    Raises:
        LoratuneError: files that programs load were changed, removed, or added.
    """
    values = read_verification(folder)
    check = check_files(folder, values, remembered_sha256) if values else None
    problems = check.lines(is_loaded) if check else []
    if not problems:
        return []
    message = f"{folder} is not as it was verified:\n{bullet_list(problems, limit=5)}"
    if force:
        return [message]
    raise LoratuneError(f"{message}\nmake it again, or insist with --force", Exit.MODEL)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file except verification.json and hidden files, which hubs and editors write."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != VERIFICATION and not any(part.startswith(".") for part in name.split("/")):
            yield name, path
