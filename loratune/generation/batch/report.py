"""Reports on answered rows: the report file, the summary for scripts, and the output for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from typing_extensions import NotRequired, TypedDict

from loratune import console
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.generation.batch.answer_file import REFUSED, TOO_LONG, AnswerFile
from loratune.generation.batch.questions import QuestionFile
from loratune.generation.batch.request import RowsRequest
from loratune.generation.batch.row_answers import Tally, Work

SHOWN_ROWS = 5
SHOWN = {"exact_match": "exact match", "rouge_l": "ROUGE-L", "bleu": "BLEU", "perplexity": "perplexity of references"}
ANSWERS = "answers"
"""Name of the answers' metrics, next to those of the base."""


class FileMetrics(TypedDict):
    """The answers of a file beside the rows' own."""

    exact_match: float
    """A share, as ROUGE-L."""
    rouge_l: float
    bleu: float
    """0 to 100."""
    perplexity: float | None
    """Of the rows' own answers."""
    rows: int
    """With an answer to compare with."""
    rows_with_perplexity: int
    reference_tokens: int


class RefusedRow(TypedDict):
    """A row that is no valid prompt."""

    row: int
    place: str
    """Its file and line or row."""
    error: str


class RowsSummary(TypedDict):
    """The answers to the rows of a file."""

    output: str
    rows: int
    tokens: int
    finish: dict[str, int]
    """Why answers ended → how many."""
    too_long: list[int]
    """Rows whose prompts do not fit into the context."""
    metrics: dict[str, FileMetrics] | None
    """answers, and base if it was asked too; null without --metrics."""
    refused: list[RefusedRow]
    answered: int
    """By this command."""
    kept: int
    """Of an earlier, interrupted one."""
    seconds: NotRequired[float]
    """Of generation; missing if nothing was generated."""
    tokens_per_second: NotRequired[float]


def report_of(work: Work, answers: AnswerFile, sums: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the report that is stored with the answers; a later run reads it.

    Args:
        work: the rows and sides that were answered.
        answers: holds all results.
        sums: side → metrics of the whole file.
    """
    results = {row.number: answers.read(row.number, work.sides[0].answer) for row in work.rows}
    return {
        "rows": len(work.rows),
        "tokens": sum(result["tokens"] for result in results.values()),
        "finish": dict(Counter(result["finish"] for result in results.values())),
        "too_long": [number for number, result in results.items() if result["finish"] == TOO_LONG],
        "refused": [
            {"row": number, "error": result["error"]}
            for number, result in results.items()
            if result["finish"] == REFUSED
        ],
        "metrics": {side or ANSWERS: values for side, values in sums.items()} or None,
    }


def summary_of(report: dict[str, Any], request: RowsRequest, file: QuestionFile) -> RowsSummary:
    """Return the summary for scripts, whether or not anything was generated."""
    refused = report.get("refused", [])  # missing in reports of earlier versions
    return {
        "output": str(request.output),
        "rows": report["rows"],
        "tokens": report["tokens"],
        "finish": report["finish"],
        "too_long": report["too_long"],
        "metrics": report["metrics"],
        "refused": [
            {"row": one["row"], "place": file.rows[one["row"] - 1].place, "error": one["error"]} for one in refused
        ],
        "answered": 0,
        "kept": report["rows"],
    }


def show(request: RowsRequest, work: Work, file: QuestionFile, tally: Tally, report: dict[str, Any]) -> None:
    long = report["too_long"]
    if long:
        console.warn(
            f"{counted(len(long), 'row')} of {len(work.rows):,} did not fit into the context and got no answer: "
            f"{file.places(long, SHOWN_ROWS)}"
        )
    if report["metrics"]:
        is_base = request.adapter and request.no_adapter and not request.compares
        name = "base" if is_base else work.sides[0].adapter or request.model
        _show_scores(report["metrics"], {ANSWERS: str(name), "base": "base"})
    console.say(f"answers: {request.output}", style="bold")
    if tally.seconds:
        rate = tally.tokens / tally.seconds
        console.say(f"{counted(tally.answers, 'answer')}, {counted(tally.tokens, 'token')} at {rate:,.0f} tokens/s")


def _show_scores(sums: dict[str, dict[str, Any]], names: dict[str, str]) -> None:
    """Print a table of the file's metrics, one column per side.

    Args:
        sums: the second result of `score_rows`.
        names: titles of the columns.
    """
    lines = [("", *(names[side] for side in sums))]
    for key, label in SHOWN.items():
        lines.append((label, *(_shown(key, values[key]) for values in sums.values())))
    console.comparison(lines)


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return {"exact_match": f"{value:.1%}", "rouge_l": f"{value:.3f}", "bleu": f"{value:.1f}"}.get(key, f"{value:.3f}")


def require_all_asked(summary: RowsSummary) -> None:
    """Raise if some rows could not be answered, after all others were.

    Args:
        summary: result of `summary_of`.

    Raises:
        LoratuneError: lists these rows; if they are all rows, it blames the template.
    """
    refused, total = summary["refused"], summary["rows"]
    if not refused:
        return
    listed = bullet_list([f"{one['place']}: {one['error']}" for one in refused], limit=SHOWN_ROWS)
    message = f"{len(refused):,} of {counted(total, 'row')} could not be asked and got no answer:\n{listed}\n"
    if len(refused) == total:
        raise LoratuneError(
            f"{message}no row could be asked: the system prompt or the chat template is at fault; correct it",
            Exit.MODEL,
        )
    raise LoratuneError(
        f"{message}the other rows are answered in {summary['output']}, where these have an 'error'; correct them, and "
        "answer them from a separate file",
        Exit.DATA,
    )
