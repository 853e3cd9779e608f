"""The layout of verification.json, for its JSON Schema."""

from __future__ import annotations

from typing import Annotated, Literal

from typing_extensions import NotRequired, TypedDict

from loratune.runs.typed_json import WRITTEN_BESIDE
from loratune.runs.verification import ExportedFolder, MergedModel


class FileRecord(TypedDict):
    """What a file was when the folder was made."""

    bytes: int
    sha256: str


class _VerificationFile(TypedDict):
    program: str
    format_version: int
    versions: dict[str, str]
    """Library → version."""
    files: NotRequired[dict[str, FileRecord]]
    """Every other file of the folder; `verify` leaves them out."""
    sha256: NotRequired[str]
    """Of all the other values; `verify` leaves it out."""


class MergedFile(_VerificationFile):
    """verification.json of a merged model."""

    kind: Literal["merged model"]
    proved: Annotated[MergedModel, WRITTEN_BESIDE]


class ExportedFile(_VerificationFile):
    """verification.json of an export."""

    kind: Literal["export"]
    proved: Annotated[ExportedFolder, WRITTEN_BESIDE]


class PrintedExport(ExportedFile):
    """verification.json of an export, and how to go on."""

    next: str
    """The command that serves, loads or shares the export."""
