"""verification.json: what a merged or exported folder says of its making, and the hash of every file in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import read_json_object
from loratune.runs.folder import FORMAT_VERSION, PROGRAM, VERIFICATION, file_sha256, sealed
from loratune.runs.remembered import remembered_sha256
from loratune.runs.versions import library_versions
from loratune.writing import write_json

LOADED = (".safetensors", ".gguf", ".bin", ".json", ".jinja", ".txt", ".model", ".py", "Modelfile")
"""How names end of files that programs load; cards, licences and a hub's own files change nothing of a model."""


@dataclass(frozen=True)
class FileCheck:
    """What has become of a folder's files since it was made."""

    files: int
    """How many verification.json knows."""
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """What could make another model of it, a line for each file."""
        kinds = (("changed", self.changed), ("missing", self.missing), ("added", self.added))
        return [f"{name}: {kind}" for kind, names in kinds for name in names if is_loaded(name)]

    @property
    def remarks(self) -> list[str]:
        """What nothing depends on, a line for each file."""
        kinds = (("changed", self.changed), ("missing", self.missing), ("added", self.added))
        return [f"{name}: {kind}" for kind, names in kinds for name in names if not is_loaded(name)]


def is_loaded(name: str) -> bool:
    """Whether programs could load a file of this name."""
    return name.endswith(LOADED)


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
    if not isinstance(known, dict) or not known or not all(isinstance(one, dict) for one in known.values()):
        raise LoratuneError(
            f"{folder / VERIFICATION}: damaged: it does not say what the folder's files were", Exit.MODEL
        )
    found = dict(_files(folder))
    try:
        changed = [
            name
            for name, path in found.items()
            if name in known
            and (path.stat().st_size != known[name].get("bytes") or hash_of(path) != known[name].get("sha256"))
        ]
    except OSError as error:
        raise LoratuneError(f"{error.filename}: cannot be read: {error.strerror}", Exit.MODEL) from error
    missing, added = known.keys() - found.keys(), found.keys() - known.keys()
    return FileCheck(len(known), tuple(sorted(changed)), tuple(sorted(missing)), tuple(sorted(added)))


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
    if check is None or not check.problems:
        return []
    message = f"{folder} is not as it was verified:\n{bullet_list(check.problems, limit=5)}"
    if force:
        return [message]
    raise LoratuneError(f"{message}\nmake it again, or insist with --force", Exit.MODEL)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file but verification.json itself; hidden files and folders are a hub's or an editor's."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != VERIFICATION and not any(part.startswith(".") for part in name.split("/")):
            yield name, path
