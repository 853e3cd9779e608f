"""The rows of a config: entries of data.train and data.validation, and the columns that name their parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.data.formats.chat_rows import SHAREGPT_ROLES
from loratune.data.sources import file_kind, parse_source
from loratune.errors import LoratuneError, counted
from loratune.migration.sheet import Sheet, texts
from loratune.plain_files import is_folder

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
SPLIT = re.compile(r"([\w.-]+)(?:\[:(\d+)\])?")
MEDIA = ("images", "videos", "audios", "image", "video", "audio")
TURN_KEYS = ({"from", "value"}, {"role", "content"})


@dataclass
class Rows:
    """Where the rows of a config are, and how they are read."""

    sources: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    """Name that a format knows → column of the files."""
    problems: list[str] = field(default_factory=list)
    """What is not read, each with its reason."""
    notes: list[str] = field(default_factory=list)
    """What is read in another way."""

    def add(self, source: str) -> None:
        """Add an entry, if data.train takes it."""
        try:
            parse_source(source)
        except LoratuneError as error:
            self.problems.append(error.message)
            return
        self.sources.append(source)

    def add_hub(self, hub: str, name: str, config: str | None, split: str | None, sample: int | None) -> None:
        """Add a data set of a hub.

        Args:
            hub: hf or ms.
            name: owner/name.
            config: a subset.
            split: such as train, or train[:500] for its first rows.
            sample: number of rows.
        """
        found = SPLIT.fullmatch(split or "train")
        if not found:
            self.problems.append(f"{name}: a part of a split, {split}, is not read; name it with a number of rows")
            return
        if found[2]:
            sample = int(found[2])
            self.notes.append(f"{name}: there, the first {counted(sample, 'row')} of the file; here as many are drawn")
        self.add(f"{hub}:{name}{f':{config}' if config else ''}:{found[1]}{f'#{sample}' if sample else ''}")

    def map_columns(self, columns: Mapping[str, str], name: str) -> None:
        """Add the columns of one source; those of a recipe hold for all its sources.

        Args:
            columns: name that a format knows → column of the files.
            name: name of the source.
        """
        for known, own in columns.items():
            if known != own and self.columns.setdefault(known, own) != own:
                self.problems.append(
                    f"{name}: the column {known} is {own!r} there and {self.columns[known]!r} in another source, and "
                    "data.columns holds for all of them; rename the column in one of the files"
                )

    def put(self, sheet: Sheet, setting: str) -> None:
        """Write the rows into a recipe, with what is not read of them."""
        earlier = sheet.recipe.get("data.columns", {})
        self.map_columns(earlier, setting)
        for problem in self.problems:
            sheet.lose(problem)
        for note in self.notes:
            sheet.note(note, setting if self.sources else "")
        if self.sources:
            sheet.take(setting, self.sources)
        if self.columns.keys() - earlier.keys():
            sheet.take("data.columns", self.columns | earlier)


def is_file_name(name: str) -> bool:
    """Return whether a name is that of a file of rows, and not of a data set."""
    return bool(file_kind(name)) or name.startswith(("/", "./", "../", "~"))


def add_named(
    rows: Rows, hub: str, name: str, sample: int | None = None, split: str | None = None, config: str | None = None
) -> None:
    """Add a file, a folder, or a data set of a hub, as `Rows.add_hub` does."""
    if is_file_name(name) or is_folder(Path(name)):
        rows.add(f"{name}#{sample}" if sample else name)
    elif HUB_ID.fullmatch(name):
        rows.add_hub(hub, name, config, split, sample)
    else:
        rows.problems.append(f"{name}: neither a file of rows nor owner/name of a data set")


def add_loaded(rows: Rows, name: str, entry: Mapping[str, Any], split: str | None) -> None:
    """Add what datasets' `load_dataset` would load: the `data_files` of an entry, else its path with its subset."""
    files = texts(entry.get("data_files") or [])
    for file in files:
        add_named(rows, "hf", file)
    if name and not files:
        add_named(rows, "hf", name, split=split, config=entry.get("name"))


def check_turns(rows: Rows, name: str, keys: set[str], roles: Mapping[str, str]) -> None:
    """Record a source whose turns have keys or roles that no format has.

    Args:
        rows: where the problem is recorded.
        name: name of the source.
        keys: keys of the role and the text in a turn.
        roles: name of a role in the file → role.
    """
    if keys not in TURN_KEYS:
        rows.problems.append(f"{name}: turns with the keys {', '.join(sorted(keys))}; rename them to role and content")
    if odd := {own: role for own, role in roles.items() if SHAREGPT_ROLES.get(own) != role}:
        listed = ", ".join(f"{own!r} for {role}" for own, role in odd.items())
        rows.problems.append(f"{name}: turns with the roles {listed}; rename them to user, assistant, system and tool")


def validation(sheet: Sheet, value: Any, name: str) -> None:
    """Take a share of rows; a count of them has no setting."""
    if value >= 1:
        sheet.lose(f"{name} is a number of rows, and data.validation a share or files of its own")
    else:
        sheet.take("data.validation", float(value))
