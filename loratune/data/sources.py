"""The entries of data.train and data.validation: which file or data set, how many of its rows, how often."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import is_folder
from loratune.recipe.data_sections import SourceSettings

# At least one character before the ending, so that `.json` alone is a name and not an ending.
ENDING = re.compile(
    r"[^/]\.(?:(?P<kind>json|jsonl|csv)(?:\.(?P<compression>gz|zst))?|(?P<parquet>parquet))", re.IGNORECASE
)
# The longest name that ends so: a # before the ending belongs to the name.
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
    """A file, or a data set of a hub."""
    sample: int | None = None
    """How many rows to draw; None takes all."""
    repeat: int = 1
    """How often every row is taken."""
    system: str | None = None
    """System prompt for its rows without one."""
    weight: float | None = None
    """Its share of the training rows, relative to the other sources' weights."""


class FileKind(NamedTuple):
    """What the name of a file says of it."""

    kind: str
    """json, jsonl, csv or parquet."""
    compression: str | None
    """gz or zst."""


class HubName(NamedTuple):
    """`hf:org/name:config:split`, taken apart."""

    hub: str
    """hf or ms."""
    dataset: str
    config: str | None
    split: str


def parse_source(entry: str | SourceSettings) -> Source:
    """Read `path`, `path#500` (draw 500 rows), `path#2x` (take each twice), alone or with settings of its own.

    Raises:
        LoratuneError: an address, an odd count, or a kind of file that is not read.
    """
    if isinstance(entry, str):
        entry = SourceSettings(path=entry)
    name, marks = _split_marks(entry.path)
    sample, repeat = _parse_marks(entry.path, marks)
    return Source(name, sample, repeat, entry.system, entry.weight)


def file_kind(name: str) -> FileKind | None:
    """The kind of a file that is read; None for all others."""
    match = FILE.fullmatch(name)
    if not match or match["marks"]:
        return None
    return FileKind((match["kind"] or match["parquet"]).lower(), (match["compression"] or "").lower() or None)


def hub_name(name: str) -> HubName | None:
    """The parts of a hub's data set; None for what is a file."""
    match = HUB_NAME.fullmatch(name)
    return HubName(match["hub"], match["dataset"], match["config"], match["split"] or "train") if match else None


def _split_marks(path: str) -> tuple[str, list[str]]:
    """The name, and what follows it behind each #."""
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
        advice = "; save it as CSV UTF-8" if SPREADSHEET.search(path.partition("#")[0]) else ""
        raise LoratuneError(
            f"{path}: not a .json, .jsonl, .csv or .parquet file, nor one of the first three with .gz or .zst{advice}",
            Exit.DATA,
        )
    return match["name"], match["marks"].split("#")[1:]


def _parse_marks(path: str, marks: list[str]) -> tuple[int | None, int]:
    """How many rows to draw, and how often to take each."""
    samples = [int(match[1]) for mark in marks if (match := SAMPLE_MARK.fullmatch(mark))]
    repeats = [int(match[1]) for mark in marks if (match := REPEAT_MARK.fullmatch(mark))]
    if len(samples) + len(repeats) < len(marks) or len(samples) > 1 or len(repeats) > 1:
        raise LoratuneError(
            f"{path}: after # a number of rows is expected, such as rows.json#500, "
            "or how often to take each, such as rows.json#2x; each of them once",
            Exit.DATA,
        )
    return (samples[0] if samples else None), (repeats[0] if repeats else 1)
