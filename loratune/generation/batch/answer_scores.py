"""Scores the answers of a file per row and in total."""

from __future__ import annotations

import math
from typing import Any

from loratune.data.formats.conversation import written_out
from loratune.generation.batch.answer_file import AnswerFile
from loratune.generation.batch.row_answers import Side, Work
from loratune.generation.batch.text_metrics import TextMetrics
from loratune.progress import counted_progress

LARGEST_EXPONENT = 700.0
"""Limits the exponent so that the perplexity does not overflow."""

RowScores = dict[tuple[str, int], dict[str, Any]]
"""(side, row) → metrics."""


def score_rows(work: Work, file: AnswerFile) -> tuple[RowScores, dict[str, dict[str, Any]]]:
    """Compute the metrics of all rows with a reference answer.

    Args:
        work: the rows and sides that were answered.
        file: holds all answers and losses.

    Returns:
        The metrics per row, and side → metrics of the whole file.
    """
    references = {row.number: row.reference for row in work.rows if row.reference is not None}
    texts = TextMetrics(references.values())
    rows: RowScores = {}
    total = len(references) * len(work.sides)
    with counted_progress("answers compared", total) as show:
        for side in work.sides:
            for number, reference in references.items():
                answer = _said(file, number, side)
                known = file.read(number, side.loss)
                perplexity = {"perplexity": _perplexity(known["loss"], known["tokens"])}
                rows[side.name, number] = texts.of_row(answer, reference) | perplexity
                show(len(rows), "")
    return rows, {side.name: _of_file(side, file, texts, references, rows) for side in work.sides}


def _of_file(
    side: Side, file: AnswerFile, texts: TextMetrics, references: dict[int, str], rows: RowScores
) -> dict[str, Any]:
    answers = [_said(file, number, side) for number in references]
    losses = [known for number in references if (known := file.read(number, side.loss))["loss"] is not None]
    tokens = sum(known["tokens"] for known in losses)
    return {
        **texts.of_file([rows[side.name, number] for number in references], answers, list(references.values())),
        "perplexity": _perplexity(sum(known["loss"] for known in losses) if losses else None, tokens),
        "rows": len(references),
        "rows_with_perplexity": len(losses),
        "reference_tokens": tokens,
    }


def _said(file: AnswerFile, number: int, side: Side) -> str:
    """Return an answer as one text, including tool calls, in the form of the references."""
    known = file.read(number, side.answer)
    return written_out(known["answer"], known.get("tool_calls", ()))


def _perplexity(loss: float | None, tokens: int) -> float | None:
    """Return the perplexity, given the negative log-likelihood in nats, summed over tokens."""
    return None if loss is None else round(math.exp(min(loss / tokens, LARGEST_EXPONENT)), 6)
