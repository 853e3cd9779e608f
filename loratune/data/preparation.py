"""Prepares the training and validation rows of a recipe: read, encode, check, remove, mix, split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from loratune.data.assembly.pool import Indices, Pool, draw_validation, mix
from loratune.data.assembly.split import Split
from loratune.data.checked_rows import ReadingLog
from loratune.data.checks.findings import (
    Found,
    FoundRows,
    describe,
    describe_removed,
    find_rows,
    judge_lengths,
    refusals,
    shared_rows,
)
from loratune.data.encoding.loaded_source import LoadedSource, Rendering
from loratune.data.formats.placeholders import PLACEHOLDER, braced, describe_literal, describe_unused
from loratune.data.loading import SourceLoader
from loratune.data.template.reasoning_form import ReasoningForm
from loratune.data.template.thinking import Reasoning
from loratune.errors import Exit, LoratuneError, agreeing, counted, joined
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.sections import PromptSettings

PLACEHOLDERS = "placeholders"
"""Name of findings about `{{name}}`."""


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
        messages = refusals(self.found)
        if messages:
            raise joined([], Exit.DATA, others=messages)
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
        LoratuneError: lists the sources that cannot be read or hold rows that cannot be trained on, with the findings
            that refuse rows of the others; or no row is left to train on. Where all sources can be used, findings that
            refuse the data raise only in `PreparedData.checked`, so that the others can be shown with them.
    """
    loader = SourceLoader(data, rendering, seed)
    train, validation = loader.load(data.train), loader.load(data.validation_sources, may_repeat=False)
    found, max_length = loader.found, rendering.max_length
    kept = _cleaned(train, "train", data, max_length, found)
    rows = kept.take(kept.has_usable_sequence(max_length))
    held_out = _cleaned(validation, "validation", data, max_length, found)
    held_out = held_out.take(held_out.has_usable_sequence(max_length))
    if loader.problems:
        _leave_out_shared(rows, np.ones(len(rows), np.int64), held_out, data, found)
        refused = refusals(found)
        code = Exit.DATA if refused else max(loader.problems.values())  # the recipe's, if no row is at fault
        raise joined([*loader.problems], code, others=refused)
    if not len(rows):
        raise _nothing_left(data, max_length, kept, found)
    found += _about_placeholders([*train, *validation], data.placeholders, rendering.prompt)
    times = mix(rows, seed)
    found += _unused_sources(rows, times)
    rows, times = rows.take(times > 0), times[times > 0]
    if isinstance(data.validation, float):
        is_held_out = draw_validation(rows, data.validation, seed)
        held_out = rows.take(is_held_out)
        times[is_held_out] = 0
        found += _poor_split(len(rows), len(held_out), data.validation)
    _leave_out_shared(rows, times, held_out, data, found)
    splits = Split(rows.take(np.repeat(np.arange(len(rows)), times)), max_length), Split(held_out, max_length)
    if not len(splits[0]):
        raise _nothing_left(data, max_length, splits[0].pool, found)
    held_out_split = splits[1] if len(splits[1]) else None
    return PreparedData(splits[0], held_out_split, _file_uses([*train, *validation], splits), found, rendering.prompt)


def _cleaned(
    sources: Sequence[LoadedSource], setting: str, data: DataSettings, max_length: int, found: list[Found]
) -> Pool:
    """Return the rows without those of data.remove; findings and removals are appended to `found`.

    The rows of data.train are checked before some of them become validation rows.
    """
    pool, noun = Pool.of(sources), f"row of data.{setting}"
    odd = find_rows(pool, data, max_length)
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
    return kept


def _about_placeholders(
    loaded: Sequence[LoadedSource], given: Mapping[str, str], prompt: PromptSettings
) -> Iterator[Found]:
    """Yield what is written like a placeholder and has no value, and values that are not used."""
    for file, log in {one.file.name: (one.file, one.rows.log) for one in loaded}.values():
        if log.literal:
            yield Found(PLACEHOLDERS, "warn", 0, f"{file.name}: {describe_literal(log.literal, given)}")
    if names := PLACEHOLDER.findall(prompt.system or ""):
        text = f"prompt.system holds {braced(names)}, which is no placeholder there: values are set into rows alone"
        yield Found(PLACEHOLDERS, "warn", 0, text)
    if unused := describe_unused(given, {name for one in loaded for name in one.rows.log.filled}):
        yield Found(PLACEHOLDERS, "warn", 0, unused)


def _poor_split(rows: int, held_out: int, share: float) -> Iterator[Found]:
    """Yield a finding for rows that are too few to hold a share of them for validation."""
    if share and not held_out:
        text = f"{counted(rows, 'row')} cannot be split; there is no validation"
        yield Found("no_validation", "warn", rows, text)
    elif held_out and not round(rows * share):
        left = rows - held_out
        text = (
            f"{held_out} of {counted(rows, 'row')} is held for validation, since data.validation {share:g} takes at "
            f"least one; {left} {agreeing(left, 'are')} left to train on, and --data.validation 0 trains on all"
        )
        yield Found("few_rows", "warn", rows, text)


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
