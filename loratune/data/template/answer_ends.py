"""Probes how a chat template ends answers, and whether it changes their text, by rendering marked answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.errors import Exit, LoratuneError

Tools = Sequence[dict[str, Any]]
Render = Callable[..., str]
"""`render(text, messages, tools, **options)`: render messages with a template's text."""

MARK = "loratune-answer"
NEXT_MARK = "loratune-question"
SAMPLE = 'Loratune  Answer,\n\n\n   "it\'s" <b>&amp;</b>\t{{ x }} a\\n *é* 你。'
"""Contains capitals, runs of whitespace, quotes and symbols, any of which a template might change."""
QUESTION, ANSWER, NEXT_QUESTION, SAMPLE_ANSWER = (
    {"role": role, "content": content}
    for role, content in (("user", "?"), ("assistant", MARK), ("user", NEXT_MARK), ("assistant", SAMPLE))
)
EXCERPT = 120


@dataclass(frozen=True)
class AnswerFrame:
    """The text that a template writes around an answer."""

    before: str
    """Text before an answer that is the last message."""
    behind: str
    """Text after it."""
    end_token: str
    """The special token that ends an answer; empty if the template writes none."""
    remark: str
    """Warning about the end token or changes of the text; {end} stands for the tokenizer's end token."""


def frame_answer(render: Render, text: str, tools: Tools, special: re.Pattern[str]) -> AnswerFrame:
    """Return the text that a template writes around an answer, which it must render exactly once and unchanged.

    Args:
        render: renders messages with any template's text.
        text: the template's text.
        tools: tools of the probe conversations.
        special: matches the tokenizer's special tokens.

    Raises:
        LoratuneError: the answer is missing from the rendering, or occurs more than once.
    """
    whole = render(text, [QUESTION, ANSWER], tools)
    if whole.count(MARK) != 1:
        found = "not" if MARK not in whole else "several times"
        raise LoratuneError(
            f"the tokenizer's chat template does not write an answer as it is: {MARK!r} is {found} in what it makes of "
            f"it, {whole[-EXCERPT:]!r}, so that the end of an answer cannot be told. Correct the template, or set "
            "prompt.template to plain or alpaca",
            Exit.MODEL,
        )
    before, _, behind = whole.partition(MARK)
    last = special.search(behind)
    end = last[0] if last else _end_before_a_question(render, text, tools, special)
    if end:
        between = behind[: last.start()].strip() if last else ""
        ending = f"writes {between!r} between an answer and {end!r}, which is not trained" if between else ""
    elif behind.strip():
        ending = f"ends an answer with {behind!r}, which is no end token: {{end}}, and not on that text"
    else:
        ending = "sets no end token after an answer: {end}"
    told = [f"the tokenizer's chat template {one}" for one in (ending, _changes(render, text, tools)) if one]
    return AnswerFrame(before, behind, end, "; ".join(told))


def _changes(render: Render, text: str, tools: Tools) -> str:
    """Return a warning if the template changes an answer once a question follows; empty if it does not."""
    sampled, marked = (_with_earlier(render, text, tools, answer) for answer in (SAMPLE_ANSWER, ANSWER))
    if SAMPLE in sampled:
        return ""
    if sampled == marked:
        return (
            "leaves the text of earlier answers out: in training as in inference, an answer follows a prompt without "
            "those before it"
        )
    return (
        "changes the text of earlier answers, such as capitals, blanks or signs in them; answers are trained as the "
        "rows have them, after earlier ones as the template has them"
    )


def _end_before_a_question(render: Render, text: str, tools: Tools, special: re.Pattern[str]) -> str:
    """Return the special token between an answer and a question, unless the token starts the question."""
    try:
        between = render(text, [QUESTION, ANSWER, NEXT_QUESTION], tools).partition(MARK)[2].partition(NEXT_MARK)[0]
        header = render(text, [NEXT_QUESTION], tools).partition(NEXT_MARK)[0]
    except LoratuneError:
        return ""
    first, opening = special.search(between), special.findall(header)
    return first[0] if first and first[0] not in opening[-1:] else ""


def _with_earlier(render: Render, text: str, tools: Tools, answer: dict[str, str]) -> str:
    """Render a conversation in which a question follows an answer."""
    try:
        return render(text, [QUESTION, answer, QUESTION], tools)
    except LoratuneError:
        return SAMPLE  # the template accepts only a single question
