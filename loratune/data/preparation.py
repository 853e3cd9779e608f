"""Prepares the training and validation rows of a recipe: read, encode, check, remove, mix, split."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from loratune.data.assembly.pool import Indices, Pool, draw_validation, mix
from loratune.data.assembly.split import Split
from loratune.data.checked_rows import ReadingLog, check_rows, judge_log
from loratune.data.checks.findings import (
    Found,
    FoundRows,
    describe,
    describe_removed,
    find_rows,
    judge_lengths,
    refusal,
    shared_rows,
)
from loratune.data.encoding.loaded_source import LoadedSource, Rendering, load_source
from loratune.data.reading.files import open_rows
from loratune.data.sources import Source, parse_source
from loratune.data.template.reasoning_form import ReasoningForm
from loratune.data.template.thinking import Reasoning
from loratune.errors import Exit, LoratuneError, counted
from loratune.recipe.data_sections import DataSettings, SourceSettings
from loratune.recipe.sections import PromptSettings


@dataclass
class FileUse:
    """What a run read from one source."""

    path: str
    sha256: str
    rows: int
    """Rows used, after sampling, removal and mixing, with repetitions."""
    seen: int
    """Rows in the file."""
    format: str
    ignored: list[str] = field(default_factory=list)
    """Columns that are not used."""


@dataclass
class PreparedData:
    """The data of a run, and everything that the checks found."""

    train: Split
    validation: Split | None
    files: list[FileUse]
    found: list[Found]
    prompt: PromptSettings
    """The prompt settings that rows were rendered with, including the date that the template writes."""
    reasoning: Reasoning | None = None
    """How their prompts ask for reasoning; None for templates without a thinking mode."""
    reasoning_form: ReasoningForm = field(default_factory=ReasoningForm)
    """How the reasoning of their answers is written."""

    def checked(self) -> PreparedData:
        """Return this object if it may be trained on.

        Raises:
            LoratuneError: lists every finding that refuses the data.
        """
        message = refusal(self.found)
        if message:
            raise LoratuneError(message, Exit.DATA)
        return self

    @property
    def warnings(self) -> list[str]:
        """Messages of findings that do not refuse the data."""
        return [one.text for one in self.found if one.level != "refuse"]


def prepare_data(data: DataSettings, rendering: Rendering, seed: int) -> PreparedData:
    """Read, encode, check, clean, mix and split the rows of a recipe.

    Args:
        data: the settings.
        rendering: how rows become ids.
        seed: seeds samples, mixture and split.

    Raises:
        LoratuneError: a source cannot be read, or no row is left to train on. Other findings that refuse the data raise
            only in `PreparedData.checked`, so that all can be shown together.
    """
    found: list[Found] = []
    loaded = _load(data, rendering, seed, found)
    train, validation = loaded[: len(data.train)], loaded[len(data.train) :]
    max_length = rendering.max_length
    rows = _checked(train, "train", data, max_length, found)
    times = mix(rows, seed)
    found += _unused_sources(rows, times)
    rows, times = rows.take(times > 0), times[times > 0]
    if isinstance(data.validation, float):
        is_held_out = draw_validation(rows, data.validation, seed)
        held_out = rows.take(is_held_out)
        times[is_held_out] = 0
        if data.validation and not len(held_out):
            text = f"{counted(len(rows), 'row')} cannot be split; there is no validation"
            found.append(Found("no_validation", "warn", len(rows), text))
    else:
        held_out = _checked(validation, "validation", data, max_length, found)
    _leave_out_shared(rows, times, held_out, data, found)
    splits = Split(rows.take(np.repeat(np.arange(len(rows)), times)), max_length), Split(held_out, max_length)
    if not len(splits[0]):
        raise _nothing_left(data, max_length, splits[0].pool, found)
    held_out_split = splits[1] if len(splits[1]) else None
    return PreparedData(splits[0], held_out_split, _file_uses(loaded, splits), found, rendering.prompt)


def check_sources(data: DataSettings) -> None:
    """Read all rows without encoding them, for recipes without a tokenizer at hand.

    Raises:
        LoratuneError: a source cannot be read, or holds rows that cannot be trained on.
    """

    def read(source: Source) -> None:
        rows = check_rows(open_rows(source.name, data.encoding), data)
        deque(rows, maxlen=0)
        judge_log(rows.file, rows.log, data)

    _for_each_source([*data.train, *_validation_entries(data)], read)


def _validation_entries(data: DataSettings) -> list[str | SourceSettings]:
    return data.validation if isinstance(data.validation, list) else []


def _load(data: DataSettings, rendering: Rendering, seed: int, found: list[Found]) -> list[LoadedSource]:
    """Load the sources of the training rows, then those of the validation rows."""
    loaded: list[LoadedSource] = []

    def load(source: Source) -> None:
        if source.repeat > 1 and len(loaded) >= len(data.train):
            raise LoratuneError(
                f"{source.name}: validation rows are never repeated; remove #{source.repeat}x", Exit.USAGE
            )
        one = load_source(source, data, rendering, seed)
        left_out = judge_log(one.file, one.rows.log, data)
        if left_out:
            found.append(Found("bad_rows", "warn", one.rows.log.bad, left_out))
        loaded.append(one)

    _for_each_source([*data.train, *_validation_entries(data)], load)
    return loaded


def _for_each_source(entries: Sequence[str | SourceSettings], work: Callable[[Source], None]) -> None:
    """Call `work` with each source; data errors of several sources are raised as one."""
    problems: list[str] = []
    for entry in entries:
        try:
            work(parse_source(entry))
        except LoratuneError as error:
            if error.exit_code != Exit.DATA or len(entries) == 1:
                raise
            problems.append(str(error))
    if problems:
        raise LoratuneError("\n".join(problems), Exit.DATA)


def _checked(
    sources: Sequence[LoadedSource], setting: str, data: DataSettings, max_length: int, found: list[Found]
) -> Pool:
    """Return the rows without those of data.remove; findings and removals are appended to `found`.

    The rows of data.train are checked before some of them become validation rows.
    """
    pool, noun = Pool.of(sources), f"row of data.{setting}"
    odd = find_rows(pool, data)
    gone = np.zeros(len(pool), bool)
    for unwanted in data.remove:
        rows = odd.pop(unwanted, None)
        if rows and len(rows.places):
            gone[rows.places] = True
            found.append(describe_removed(unwanted, pool, rows, noun))
    kept = pool.take(~gone)
    for name, rows in odd.items():
        found += describe(name, kept, rows.without(gone), data, noun)
    found += judge_lengths(kept, data, max_length, noun)
    usable = kept.take(kept.has_usable_sequence(max_length))
    if setting == "train" and not len(usable):
        raise _nothing_left(data, max_length, kept, found)
    return usable


def _leave_out_shared(rows: Pool, times: Indices, held_out: Pool, data: DataSettings, found: list[Found]) -> None:
    """Report validation rows that also occur in training, or remove them from training for `remove: overlap`."""
    taken = rows.take(times > 0)
    if "overlap" not in data.remove:
        found += describe("overlap", held_out, shared_rows(held_out, taken), data, "validation row", other=taken)
        return
    shared = FoundRows(np.flatnonzero(np.isin(taken.digests, held_out.digests)))
    if len(shared.places):
        found.append(describe_removed("overlap", taken, shared, "training row"))
        times[np.isin(rows.digests, held_out.digests)] = 0


def _unused_sources(rows: Pool, times: Indices) -> Iterator[Found]:
    """Yield sources whose weight is too small to use even one row."""
    for number, loaded in enumerate(rows.sources):
        mine = rows.source == number
        if mine.any() and not times[mine].any():
            text = f"{loaded.file.name}: its weight leaves it no row; raise it, or repeat the scarcest source (#2x)"
            yield Found("unused", "warn", int(mine.sum()), text)


def _nothing_left(data: DataSettings, max_length: int, rows: Pool, found: Sequence[Found]) -> LoratuneError:
    """Return the error for data without a trainable row."""
    removed = [one.text for one in found if one.level == "note"]
    if not len(rows):
        names = ", ".join(data.train_names)
        return LoratuneError("\n".join([*removed, f"data.remove leaves no training row of {names}"]), Exit.DATA)
    too_long = [one.text for one in found if one.name in ("too_long", "untrained")]
    return LoratuneError(
        f"no row of data.train has a token to train within training.max_length {max_length}; raise it, or shorten the "
        f"rows\n{too_long[0] if too_long else ''}".rstrip(),
        Exit.DATA,
    )


def _format_of(log: ReadingLog) -> str:
    return f"{log.format} under {log.under!r}" if log.under else log.format


def _file_uses(loaded: Sequence[LoadedSource], splits: Sequence[Split]) -> list[FileUse]:
    uses = [
        FileUse(one.file.name, one.file.sha256, 0, one.rows.log.seen, _format_of(one.rows.log), one.rows.log.ignored)
        for one in loaded
    ]
    place = {id(one): number for number, one in enumerate(loaded)}
    for split in splits:
        for number, one in enumerate(split.pool.sources):
            uses[place[id(one)]].rows += int((split.pool.source == number).sum())
    return uses
