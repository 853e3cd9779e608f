"""What is told of answered rows: for a later call, for scripts, and for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from loratune import console
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.generation.batch.answer_file import AnswerFile
from loratune.generation.batch.request import RowsRequest

if TYPE_CHECKING:
    from loratune.generation.batch.row_answers import Tally, Work

TOO_LONG = "too_long"
"""How a row ends whose question does not fit into the context."""
REFUSED = "refused"
"""How a row ends that cannot be asked; `error` says why."""
SHOWN_ROWS = 5
SHOWN = {"exact_match": "exact match", "rouge_l": "ROUGE-L", "bleu": "BLEU", "perplexity": "perplexity of references"}
ANSWERS = "answers"
"""What the metrics of those that were asked for are called, beside those of the base."""


def report_of(work: Work, answers: AnswerFile, sums: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is kept beside the answers, and tells a later call what they hold.

    Args:
        work: what was answered.
        answers: has all results.
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


def summary_of(report: dict[str, Any], request: RowsRequest) -> dict[str, Any]:
    """What scripts are told, whether something was done or not."""
    told = {name: report.get(name) for name in ("rows", "tokens", "finish", "too_long", "metrics")}
    refused = report.get("refused", [])  # reports of earlier versions have none
    return {"output": str(request.output), **told, "refused": refused, "answered": 0, "kept": told["rows"]}


def show(request: RowsRequest, work: Work, tally: Tally, report: dict[str, Any]) -> None:
    """Show people what happened."""
    long = report["too_long"]
    if long:
        listed = ", ".join(map(str, long[:SHOWN_ROWS])) + (", …" if len(long) > SHOWN_ROWS else "")
        console.warn(
            f"{counted(len(long), 'row')} of {len(work.rows):,} did not fit into the context and got no answer: "
            f"row {listed}"
        )
    if report["metrics"]:
        is_base = request.adapter and request.no_adapter and not request.compares
        name = "base" if is_base else work.adapter or request.model
        _show_scores(report["metrics"], {ANSWERS: str(name), "base": "base"})
    console.say(f"answers: {request.output}", style="bold")
    if tally.seconds:
        rate = tally.tokens / tally.seconds
        console.say(f"{counted(tally.answers, 'answer')}, {tally.tokens:,} tokens at {rate:,.0f} tokens/s")


def _show_scores(sums: dict[str, dict[str, Any]], names: dict[str, str]) -> None:
    """Print a table of the whole file's metrics, one column a side.

    Args:
        sums: as `score_rows` gives them.
        names: of the columns.
    """
    lines = [("", *(names[side] for side in sums))]
    for key, label in SHOWN.items():
        lines.append((label, *(_shown(key, values[key]) for values in sums.values())))
    console.comparison(lines)


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return {"exact_match": f"{value:.1%}", "rouge_l": f"{value:.3f}", "bleu": f"{value:.1f}"}.get(key, f"{value:.3f}")


def require_all_asked(summary: dict[str, Any]) -> None:
    """Name the rows of a file that could not be asked, all others being answered.

    Args:
        summary: from `summary_of`.

    Raises:
        LoratuneError: there are some; where they are all, the template is told to be at fault.
    """
    refused, total = summary["refused"], summary["rows"]
    if not refused:
        return
    listed = bullet_list([f"row {one['row']}: {one['error']}" for one in refused], limit=SHOWN_ROWS)
    message = f"{len(refused):,} of {counted(total, 'row')} could not be asked and got no answer:\n{listed}\n"
    if len(refused) == total:
        raise LoratuneError(
            f"{message}no row could be asked: the system prompt or the chat template is at fault; correct it",
            Exit.MODEL,
        )
    raise LoratuneError(
        f"{message}the other rows are answered in {summary['output']}, where these have an 'error'; mend them and ask "
        "them from a file of their own",
        Exit.DATA,
    )
