"""Rows whose last answer may be missing, as a file of questions has them: given an empty one, as every format needs."""

from __future__ import annotations

from typing import Any

from loratune.data.formats.chat_rows import TRAINING_MARKS, ChatRows, TurnStyle


def with_output(row: dict[str, Any], answer: str = "output") -> dict[str, Any]:
    """A row of texts with an answer.

    Args:
        row: in any format.
        answer: name of the column.
    """
    return row if row.get(answer) is not None else row | {answer: ""}


def with_last_turn(row: dict[str, Any], rows: ChatRows) -> dict[str, Any]:
    """A row whose list of turns ends with an answer.

    Args:
        row: in any format.
        rows: how the list is called and written.
    """
    turns = row.get(rows.key)
    return row | {rows.key: answered(turns, rows.style_of(turns))} if isinstance(turns, list) else row


def answered(turns: list[Any], style: TurnStyle) -> list[Any]:
    """Turns that end with an answer; which of them are trained does not matter to who asks."""
    plain = [
        {key: inner for key, inner in turn.items() if key not in TRAINING_MARKS} if isinstance(turn, dict) else turn
        for turn in turns
    ]
    speaker = plain[-1].get(style.role) if plain and isinstance(plain[-1], dict) else None
    asks = isinstance(speaker, str) and style.roles.get(speaker) in ("user", "tool")
    return [*plain, blank(style)] if asks else plain


def blank(style: TurnStyle) -> dict[str, str]:
    """An answer that says nothing."""
    return {style.role: "assistant", style.text: ""}
