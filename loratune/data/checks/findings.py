"""Data findings: the affected rows, their severity, and the advice in the message."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loratune.data.assembly.pool import Indices, Pool, earlier_copies
from loratune.data.checked_rows import SHOWN_ROWS
from loratune.data.checks.inspection import FLAGS
from loratune.data.encoding.encoded import CUT, UNENDED
from loratune.errors import agreeing, bullet_list, counted
from loratune.extras import required
from loratune.progress import row_progress
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.findings import FINDINGS, Finding

Level = Literal["refuse", "warn", "note"]
LONG_FACTOR = 10  # as its sentence says
FEWEST_FOR_OUTLIERS = 20


@dataclass(frozen=True)
class Found:
    """A finding, ready to be reported."""

    name: str
    level: Level
    count: int
    text: str
    """The message, with the places of the first rows."""


@dataclass(frozen=True)
class FoundRows:
    """The rows of a pool that a finding applies to."""

    places: Indices
    twins: Indices | None = None
    """For duplicates and other answers: the index of the earlier row that each is compared with."""

    def without(self, gone: NDArray[np.bool_]) -> FoundRows:
        """Return the remaining rows after a removal, by their indices in the reduced pool."""
        place = np.cumsum(~gone) - 1
        stays = ~gone[self.places]
        if self.twins is None:
            return FoundRows(place[self.places[stays]])
        stays &= ~gone[self.twins]
        return FoundRows(place[self.places[stays]], place[self.twins[stays]])


def find_rows(pool: Pool, settings: DataSettings, max_length: int) -> dict[Finding, FoundRows]:
    """The rows of each finding that a recipe can set a level for.

    Rows that differ are only compared with those that stay: one would go because of another that goes too.
    """
    flags, places = pool.of_each_row("flags"), np.arange(len(pool))
    found: dict[Finding, FoundRows] = {
        name: FoundRows(np.flatnonzero(flags & (1 << bit))) for bit, name in enumerate(FLAGS)
    }
    first = earlier_copies(pool.digests)
    stays, later = first == places, np.flatnonzero(first != places)
    found |= {"long_answers": FoundRows(_long_answers(pool)), "duplicates": FoundRows(later, first[later])}
    for name in {*settings.remove} & found.keys():
        stays[found[name].places] = False
    if settings.near_duplicates is not None:
        found["near_duplicates"] = _near_duplicates(pool, settings.near_duplicates, np.flatnonzero(stays))
        if "near_duplicates" in settings.remove:
            stays[found["near_duplicates"].places] = False
    found["other_answers"] = _other_answers(pool, np.flatnonzero(stays & pool.has_usable_sequence(max_length)))
    return found


def describe(
    name: Finding, pool: Pool, rows: FoundRows, settings: DataSettings, noun: str, other: Pool | None = None
) -> Iterator[Found]:
    """Yield a finding at the recipe's severity; nothing if there are no rows or it is ignored.

    Args:
        name: name of the finding.
        pool: the pool that `rows` refers to.
        rows: the affected rows.
        settings: holds the severities.
        noun: what the pool has, such as "row of data.train", for the message.
        other: the pool of the duplicates' originals, if not `pool`.
    """
    level = settings.severity.get(name, FINDINGS[name].usual)
    if not len(rows.places) or level == "ignore":
        return
    advice = f"--data.remove {name} removes them"
    if level == "refuse":
        advice += f", --data.severity {name}=warn takes them"
    said, listed = _said(pool, rows.places, noun, FINDINGS[name].sentence), _listed(name, pool, rows, other or pool)
    yield Found(name, level, len(rows.places), f"{said} ({advice}):\n{listed}")


def describe_removed(name: Finding, pool: Pool, rows: FoundRows, noun: str) -> Found:
    """A finding whose rows have been removed."""
    sentence = FINDINGS[name].of_removed or FINDINGS[name].sentence
    text = f"{_said(pool, rows.places, noun, sentence)}; removed:\n{_listed(name, pool, rows, pool)}"
    return Found(f"{name}, removed", "note", len(rows.places), text)


def _said(pool: Pool, places: Indices, noun: str, predicate: str) -> str:
    """Say something of some rows: 1 of 60 rows of data.train has an answer without text."""
    return f"{len(places):,} of {counted(len(pool), noun)} {agreeing(len(places), predicate)}"


def _listed(name: Finding, pool: Pool, rows: FoundRows, other: Pool) -> str:
    """List the first rows, each with its original or an excerpt."""
    first = rows.places[:SHOWN_ROWS]
    if rows.twins is None:
        lines = [pool.place(index) for index in first]
    else:
        compared = FINDINGS[name].of_pair
        lines = [
            f"{pool.short_place(later)} {compared} {_other_place(pool, later, other, earlier)}"
            for later, earlier in zip(first, rows.twins, strict=False)
        ]
    return bullet_list(lines, limit=SHOWN_ROWS, total=len(rows.places))


def _other_place(pool: Pool, later: int, other: Pool, earlier: int) -> str:
    """Return the place of a duplicate's original, without the file's name if both are in one file."""
    name = pool.sources[pool.source[later]].file.name
    return other.short_place(earlier).removeprefix(name).lstrip()


def _long_answers(pool: Pool) -> Indices:
    """Return the rows with more than LONG_FACTOR times the median of trained tokens."""
    trained = pool.of_each_row("trained_of_rows")
    if len(trained) < FEWEST_FOR_OUTLIERS:
        return np.zeros(0, np.int64)
    return np.flatnonzero(trained > LONG_FACTOR * np.median(trained))


def _near_duplicates(pool: Pool, threshold: float, candidates: Indices) -> FoundRows:
    """Return rows that resemble an earlier one, of candidates that are all different."""
    with required("data.near_duplicates", "near-duplicates"):
        # Deferred: importing datasketch with scipy takes longer than the rest of a check.
        from loratune.data.checks.near_duplicates import find_near_duplicates
    shared = _shared_beginning(pool, candidates[:100])
    ids = (pool.input_ids(index)[shared:] for index in candidates)
    with row_progress("looking for similar rows") as advance:
        pairs = find_near_duplicates(ids, threshold, advance)
    later, earlier = np.array(pairs, np.int64).reshape(-1, 2).T
    return FoundRows(candidates[later], candidates[earlier])


def _other_answers(pool: Pool, candidates: Indices) -> FoundRows:
    """Return rows that ask what an earlier one asks, of candidates that are all different."""
    first = candidates[earlier_copies(pool.take(candidates).of_each_row("asked", np.uint64))]
    is_later = first != candidates
    return FoundRows(candidates[is_later], first[is_later])


def _shared_beginning(pool: Pool, rows: Indices) -> int:
    """Return how many leading ids all rows share.

    A common template and system prompt would inflate the similarity of short rows.
    """
    beginnings = [pool.prompt_ids(index).tolist() for index in rows]
    return len(os.path.commonprefix(beginnings)) if len(rows) > 1 else 0  # noqa: RUF071 - of lists


def shared_rows(validation: Pool, train: Pool) -> FoundRows:
    """Return the validation rows that also occur in the training rows."""
    place = {digest: index for index, digest in reversed(list(enumerate(train.digests.tolist())))}
    shared = np.flatnonzero(np.isin(validation.digests, train.digests))
    twins = [place[digest] for digest in validation.digests[shared].tolist()]
    return FoundRows(shared, np.array(twins, np.int64))


def judge_lengths(pool: Pool, settings: DataSettings, max_length: int, noun: str) -> Iterator[Found]:
    """Yield findings for rows that are too long, were truncated, or have nothing to train."""
    flags, trained = pool.of_each_row("flags"), pool.of_each_row("trained_of_rows")
    longest = pool.of_each_row("longest")
    kept = trained > 0
    too_long = np.flatnonzero(longest > max_length)
    if len(too_long):
        listed = [f"{pool.short_place(index)}: {longest[index]} tokens" for index in too_long[:SHOWN_ROWS]]
        refuses = settings.truncation_strategy == "refuse"
        predicate = f"are longer than training.max_length {max_length}{'' if refuses else ' and left out'}"
        share = f"{len(too_long) / len(pool):.1%}"
        yield Found(
            "too_long",
            "refuse" if refuses else "warn",
            len(too_long),
            f"{_said(pool, too_long, noun, predicate)} ({share}):\n"
            f"{bullet_list(listed, limit=SHOWN_ROWS, total=len(too_long))}",
        )
    cut = np.flatnonzero((flags & CUT > 0) & kept)
    if len(cut):
        lost = counted(int(pool.of_each_row("lost")[cut].sum()), "token")
        yield _warning("cut", pool, cut, noun, f"are shortened to training.max_length {max_length}, by {lost} in all")
    unended = np.flatnonzero((flags & UNENDED > 0) & kept)
    if len(unended):
        yield _warning("unended", pool, unended, noun, "have an answer without its end, which teaches no stopping")
    untrained = np.flatnonzero(~kept)
    if len(untrained):
        reason = f"have no token to train within training.max_length {max_length}; left out"
        yield _warning("untrained", pool, untrained, noun, reason)


def _warning(name: str, pool: Pool, rows: NDArray[np.int64], noun: str, predicate: str) -> Found:
    listed = bullet_list([pool.place(index) for index in rows[:SHOWN_ROWS]], limit=SHOWN_ROWS, total=len(rows))
    return Found(name, "warn", len(rows), f"{_said(pool, rows, noun, predicate)}:\n{listed}")


def refusals(found: Sequence[Found]) -> list[str]:
    """Return the messages of all findings that refuse the data."""
    return [one.text for one in found if one.level == "refuse"]
