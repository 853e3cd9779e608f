"""Finds the test rows that a run was trained on: the same rows, the same questions, and near duplicates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loratune.data.assembly.pool import Pool
from loratune.data.encoding.encoder import Encoder
from loratune.data.encoding.row_encoder import row_digest
from loratune.data.formats.conversation import Conversation
from loratune.data.reading.files import open_rows
from loratune.data.sources import hub_name
from loratune.errors import LoratuneError, first_line_of
from loratune.evaluation.result import Leaks
from loratune.extras import needs
from loratune.generation.batch.questions import AskedRow
from loratune.progress import row_progress
from loratune.recipe.loading import load_written_recipe
from loratune.runs.folder import RECIPE
from loratune.runs.manifest import Manifest
from loratune.runs.opening import AdapterSource
from loratune.training.gate import pass_gate

NEAR = 0.7
"""Share of common token 5-grams from which two rows are nearly the same."""
SAMPLED_PROMPTS = 100


def find_leaks(source: AdapterSource, rows: Sequence[AskedRow], encoder: Encoder) -> Leaks:
    """Compare test rows with the training rows of a run, as its recipe mixes and splits them.

    The rows are prepared again from the run's recipe, from the cache if they are there; validation rows were not
    trained on. An evaluation does not fail where this is not possible.

    Args:
        source: the run's adapter.
        rows: the test rows.
        encoder: renders the prompts of the run.
    """
    if source.run is None or source.manifest is None:
        return Leaks(False, "the adapter is not in a run folder, which would name the training rows")
    if problem := _missing(source.manifest):
        return Leaks(False, problem)
    day = {"date": source.trained_day} if encoder.is_dated else {}
    try:
        trained = pass_gate(load_written_recipe(source.run / RECIPE), source.trained_day).train.pool
        return _compared(trained, rows, Encoder(encoder.tokenizer, encoder.settings.model_copy(update=day)))
    except (LoratuneError, OSError) as error:
        return Leaks(False, f"the rows cannot be prepared for it: {first_line_of(error)}")


def _missing(manifest: Manifest) -> str:
    """Return which files of the training are gone or have changed; empty if none."""
    for file in manifest.data:
        if hub_name(file.path):
            continue
        if not Path(file.path).is_file():
            return f"{file.path}, a file of the training, is not there any more (looked from {Path.cwd()})"
        try:
            found = open_rows(file.path).sha256
        except LoratuneError as error:
            return str(error)
        if found != file.sha256:
            return f"{file.path}, a file of the training, has changed since"
    return "" if manifest.data else "the run does not record its files"


def _compared(trained: Pool, rows: Sequence[AskedRow], encoder: Encoder) -> Leaks:
    known = {*trained.digests.tolist()}
    prompts = {row.number: encoder.prompt_ids(row.messages, row.tools) for row in rows}
    questions = {trained.prompt_ids(index).tobytes() for index in range(len(trained))}
    answered = [(row, row.answer) for row in rows if row.answer is not None]
    same = {
        row.number
        for row, answer in answered
        if row_digest(Conversation((*row.messages, answer), tools=row.tools)) in known
    }
    asked = {number for number, ids in prompts.items() if _as_bytes(ids) in questions} - same
    sequences = {
        row.number: [*prompts[row.number], *encoder.reply_ids(row.messages, answer, row.tools)]
        for row, answer in answered
        if row.number not in same | asked
    }
    near, reason = _near(trained, sequences, list(prompts.values()))
    return Leaks(True, reason, len(trained), tuple(sorted(same)), tuple(sorted(asked)), near)


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _near(trained: Pool, sequences: dict[int, list[int]], prompts: Sequence[list[int]]) -> tuple[tuple[int, ...], str]:
    """Return the numbers of the rows that resemble a training row, and what could not be checked."""
    try:
        from loratune.data.checks.near_duplicates import TokenIds, find_near_duplicates
    except ImportError:
        return (), needs("a look for near duplicates", "datasketch", "near-duplicates")
    sample = [trained.prompt_ids(index).tolist() for index in range(min(SAMPLED_PROMPTS, len(trained)))]
    shared = len(os.path.commonprefix([*sample, *prompts])) if len(prompts) + len(sample) > 1 else 0  # noqa: RUF071
    count = len(trained)
    ids: list[TokenIds] = [
        *(trained.input_ids(index)[shared:] for index in range(count)),
        *(one[shared:] for one in sequences.values()),
    ]
    with row_progress("looking for test rows among the training rows") as advance:
        pairs = find_near_duplicates(ids, NEAR, advance, known=count)
    numbers = list(sequences)
    return tuple(sorted(numbers[row - count] for row, earlier in pairs if earlier < count)), ""
