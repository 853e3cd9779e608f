"""manifest.json: what a run says of itself to later commands. It is typed, and read and written here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object
from loratune.runs.file_hashes import are_records
from loratune.runs.folder import ADAPTER, FORMAT_VERSION, MANIFEST, SEALED_BY, has_changed, with_seal
from loratune.runs.record import RunRecord, read_record
from loratune.writing import write_json


@dataclass(frozen=True)
class TrainedBase:
    """The base that a run was trained on."""

    name: str
    """As the recipe named it."""
    path: str
    """The folder in which it lay."""
    hashes: Mapping[str, Any] = field(default_factory=dict)
    """What `fingerprint_base` gives."""


@dataclass(frozen=True)
class TrainedTemplate:
    """The chat template that a run was trained with; what versions before did not note is None."""

    sha256: str | None = None
    end_token_id: int | None = None
    generation_prompt: str | None = None
    """As prompt.generation_prompt."""
    completion: str | None = None
    """The generation prompt where the template writes none and loratune completed it."""
    answer_start: str | None = None
    date: str | None = None
    """The day that prompts name, where the template writes one."""


@dataclass(frozen=True)
class TrainedFile:
    """A file of rows."""

    path: str
    sha256: str
    rows: int
    """That were taken."""
    seen: int
    """That it holds."""
    format: str
    ignored: tuple[str, ...] = ()
    """Columns that nothing is taken from."""


@dataclass(frozen=True)
class Manifest:
    """What a run's manifest says."""

    base: TrainedBase | None = None
    """None where the file doesn't say."""
    template: TrainedTemplate = field(default_factory=TrainedTemplate)
    data: tuple[TrainedFile, ...] = ()
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    """Library → version."""
    record: RunRecord | None = None
    """None in the manifests of versions before; `runs.opening` then makes it of recipe.yaml."""
    created: str = ""
    """When the run began, ISO 8601."""
    files: Mapping[str, Mapping[str, Any]] | None = field(default_factory=dict)
    """File of the run → its `bytes` and `sha256`; None where the file's word cannot be read."""
    is_sealed: bool = False
    """Whether the file has a hash of its own, without which it may say anything; versions before wrote none."""

    def values(self) -> dict[str, Any]:
        """In JSON types, in the file's layout."""
        base = {"base": {"name": self.base.name, "path": self.base.path, **self.base.hashes}} if self.base else {}
        return {
            "format_version": FORMAT_VERSION,
            "created": self.created,
            **base,
            "template": vars(self.template),
            "data": [vars(file) for file in self.data],
            "seed": self.seed,
            "versions": dict(self.versions),
            "files": dict(self.files or {}),
            **({"record": self.record.values()} if self.record else {}),
        }


def write_manifest(run: Path, manifest: Manifest) -> None:
    """Replace a run's manifest, with a hash of its own values in it."""
    write_json(run / MANIFEST, with_seal(manifest.values()))


def write_files(run: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Let a run's manifest say what its files are."""
    write_manifest(run, replace(read_manifest(run), files=files))


def read_manifest(run: Path) -> Manifest:
    """What a run's manifest says.

    Raises:
        LoratuneError: it is missing, damaged, changed, or written by another version of loratune.
    """
    values = read_json_object(run / MANIFEST)
    if values.get("format_version") != FORMAT_VERSION:
        raise LoratuneError(
            f"{run}: made by another version of loratune (format {values.get('format_version')}, this one reads "
            f"{FORMAT_VERSION})",
            Exit.MODEL,
        )
    if has_changed(values):
        raise LoratuneError(
            f"{run / MANIFEST}: has been changed since the run wrote it, so nothing of the run can be checked; restore "
            f"it, or copy {run / ADAPTER} elsewhere and give the copy, which is taken as a plain adapter",
            Exit.MODEL,
        )
    try:
        return _parsed(values)
    except ValueError as error:
        raise LoratuneError(f"{run / MANIFEST}: {error}", Exit.MODEL) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise LoratuneError(f"{run / MANIFEST}: damaged: {type(error).__name__}: {error}", Exit.MODEL) from error


def _parsed(values: dict[str, Any]) -> Manifest:
    files = values.get("files", {})
    return Manifest(
        base=_base(values.get("base")),
        template=_known(TrainedTemplate, values.get("template", {})),
        data=tuple(_file(file) for file in values.get("data", [])),
        seed=values.get("seed", 0),
        versions=dict(values.get("versions", {})),
        record=read_record(values["record"]) if "record" in values else None,
        created=str(values.get("created", "")),
        files=files if are_records(files) else None,
        is_sealed=values.get(SEALED_BY) is not None,
    )


def _base(values: Any) -> TrainedBase | None:
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in ("name", "path")):
        return None
    hashes = {key: value for key, value in values.items() if key not in ("name", "path")}
    return TrainedBase(values["name"], values["path"], hashes)


def _file(values: dict[str, Any]) -> TrainedFile:
    return replace(_known(TrainedFile, values), ignored=tuple(values.get("ignored", ())))


Kind = TypeVar("Kind", TrainedTemplate, TrainedFile)


def _known(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """A dataclass of those values that it has a field for."""
    names = {one.name for one in fields(kind)}
    return kind(**{key: value for key, value in values.items() if key in names})
