"""Parses entries of data.train and data.validation: file or hub dataset, sample size, repeats."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import is_file, is_folder, nearest_told
from loratune.recipe.data_sections import SourceSettings

# At least one character must precede the extension, so that a file named `.json` has none.
ENDING = re.compile(
    r"[^/]\.(?:(?P<kind>json|jsonl|csv)(?:\.(?P<compression>gz|zst))?|(?P<parquet>parquet))", re.IGNORECASE
)
# Greedy, so a mark before the last extension is part of the file name.
FILE = re.compile(rf"(?P<name>.*{ENDING.pattern})(?P<marks>(?:#.*)?)", re.IGNORECASE | re.DOTALL)
HUB_NAME = re.compile(
    r"(?P<hub>hf|ms):(?P<dataset>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[^:\s]+)(?=:))?(?::(?P<split>\w[\w.-]*))?"
)
SAMPLE_MARK = re.compile("0*([1-9][0-9]{0,17})")
REPEAT_MARK = re.compile("0*([1-9][0-9]{0,2})x")
SPREADSHEET = re.compile(r"\.(xlsx?|xlsm|xlsb|ods|numbers)$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.validation."""

    name: str
    """A path, or the name of a hub dataset."""
    sample: int | None = None
    """Number of rows to draw; None takes all."""
    repeat: int = 1
    """How often each row is used."""
    system: str | None = None
    """System prompt for rows without one."""
    weight: float | None = None
    """Share of the training rows, relative to the weights of the other sources."""


class FileKind(NamedTuple):
    """File type and compression, from the file's name."""

    kind: str
    """json, jsonl, csv or parquet."""
    compression: str | None
    """gz or zst."""


class HubName(NamedTuple):
    """The parts of `hf:org/name:config:split`."""

    hub: str
    """hf or ms."""
    dataset: str
    config: str | None
    split: str


def parse_source(entry: str | SourceSettings) -> Source:
    """Parse `path`, `path#500` (draw 500 rows) or `path#2x` (use each row twice), with or without other settings.

    Raises:
        LoratuneError: the entry is a URL, has an invalid count, or names an unsupported file type.
    """
    if isinstance(entry, str):
        entry = SourceSettings(path=entry)
    name, marks = _split_marks(entry.path)
    sample, repeat = _parse_marks(entry.path, marks)
    return Source(name, sample, repeat, entry.system, entry.weight)


def file_kind(name: str) -> FileKind | None:
    """Return the type of a supported file; None for other files."""
    match = FILE.fullmatch(name)
    if not match or match["marks"]:
        return None
    return FileKind((match["kind"] or match["parquet"]).lower(), (match["compression"] or "").lower() or None)


def hub_name(name: str) -> HubName | None:
    """Return the parts of a hub dataset's name; None for files."""
    match = HUB_NAME.fullmatch(name)
    return HubName(match["hub"], match["dataset"], match["config"], match["split"] or "train") if match else None


def _split_marks(path: str) -> tuple[str, list[str]]:
    """Split a path into the name and the marks after each #."""
    if "://" in path:
        raise LoratuneError(
            f"{path}: nothing is fetched from the network; download the file first, "
            "or name a data set of the Hugging Face hub as hf:org/name:split",
            Exit.DATA,
        )
    if path.startswith(("hf:", "ms:")):
        name, *marks = path.split("#")
        if not hub_name(name):
            raise LoratuneError(
                f"{path}: a data set of a hub is written {path[:3]}org/name:split or {path[:3]}org/name:config:split",
                Exit.DATA,
            )
        return name, marks
    match = FILE.fullmatch(path)
    if not match:
        if is_folder(path):
            raise LoratuneError(f"{path}: is a folder; name the file of rows in it", Exit.DATA)
        plain = path.partition("#")[0]
        near = "" if is_file(plain) else nearest_told(Path(plain), is_file)
        advice = "; save it as CSV UTF-8" if SPREADSHEET.search(plain) else near
        raise LoratuneError(
            f"{path}: not a .json, .jsonl, .csv or .parquet file, nor one of the first three with .gz or .zst{advice}",
            Exit.DATA,
        )
    return match["name"], match["marks"].split("#")[1:]


def _parse_marks(path: str, marks: list[str]) -> tuple[int | None, int]:
    """Return the sample size and the number of repeats."""
    samples = [int(match[1]) for mark in marks if (match := SAMPLE_MARK.fullmatch(mark))]
    repeats = [int(match[1]) for mark in marks if (match := REPEAT_MARK.fullmatch(mark))]
    if len(samples) + len(repeats) < len(marks) or len(samples) > 1 or len(repeats) > 1:
        raise LoratuneError(
            f"{path}: after # a number of rows is expected, such as rows.json#500, "
            "or how often to take each, such as rows.json#2x; each of them once",
            Exit.DATA,
        )
    return (samples[0] if samples else None), (repeats[0] if repeats else 1)
