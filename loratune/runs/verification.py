"""verification.json: what a merged or exported folder says of its making, and the hash of every file in it."""

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
"""How names end of files that programs load; cards, licences and a hub's own files change nothing of a model."""


def is_loaded(name: str) -> bool:
    """Whether programs could load a file of this name, so that a change of it could make another model."""
    return name.endswith(LOADED)


def is_idle(name: str) -> bool:
    """Whether nothing depends on a file of this name."""
    return not is_loaded(name)


def write_verification(folder: Path, kind: str, report: dict[str, Any], hashes: bool = True) -> dict[str, Any]:
    """Write verification.json, the last file of a folder.

    Args:
        folder: with everything else in it.
        kind: "merged model" or "export".
        report: what was proved.
        hashes: of every file; a folder that goes away again needs none.

    Returns:
        What the file holds.
    """
    values = {"program": PROGRAM, "format_version": FORMAT_VERSION, "versions": library_versions(), "kind": kind}
    values |= report
    if hashes:
        values["files"] = {name: sealed(path) for name, path in sorted(_files(folder))}
    write_json(folder / VERIFICATION, values)
    return values


def read_verification(folder: Path) -> dict[str, Any] | None:
    """What a folder's verification.json holds; None where there is none, or it is another program's.

    Raises:
        LoratuneError: it cannot be read.
    """
    if not (folder / VERIFICATION).is_file():
        return None
    values = read_json_object(folder / VERIFICATION)
    return values if values.get("program") == PROGRAM else None


def check_files(folder: Path, values: dict[str, Any], hash_of: Callable[[Path], str] = file_sha256) -> FileCheck | None:
    """Compare a folder's files with what verification.json says of them.

    Args:
        folder: the folder.
        values: what its verification.json holds.
        hash_of: gives a file's sha256.

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
    """Refuse a merged or exported folder whose files are not as they were made; any other folder passes.

    Hashes are remembered for as long as a file is not touched, unlike those of `loratune verify`.

    Args:
        folder: a model's folder.
        force: warn instead of refusing.

    Returns:
        What was let through.

    Raises:
        LoratuneError: files that programs load were changed, are missing, or have been added.
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
    """Name and path of every file but verification.json itself; hidden files and folders are a hub's or an editor's."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != VERIFICATION and not any(part.startswith(".") for part in name.split("/")):
            yield name, path
