"""Probes the form in which a chat template writes the reasoning of an answer, by rendering marked answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loratune.data.formats.conversation import CLOSING, OPENING, REASONING_KEYS
from loratune.data.template.answer_ends import ANSWER, MARK, QUESTION, Render, Tools
from loratune.errors import LoratuneError

REASONING_MARK = "loratune-reasoning"
MARKED = dict.fromkeys(REASONING_KEYS, REASONING_MARK)
CALL = {"id": "loratune1", "type": "function", "function": {"name": "probe", "arguments": {}}}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
REASONED, REASONED_CALL = {**ANSWER, **MARKED}, {**CALLED, **MARKED}


@dataclass(frozen=True)
class ReasoningForm:
    """The text around the reasoning of an answer. The default is the form of rows."""

    key: str = ""
    """Key of a message whose text the template writes as reasoning; empty if it has none."""
    opening: str = OPENING
    """Text between the prompt and the reasoning."""
    closing: str = CLOSING
    """Text after the reasoning; then follows what would follow the prompt without reasoning."""
    answer_start: str = ""
    """Text between `closing` and the answer."""
    is_known: bool = True
    """False if the template writes reasoning or has a thinking mode, and its renderings do not show the form."""

    @property
    def is_of_rows(self) -> bool:
        """Whether it is the form of rows, whose answers then need no change."""
        return self.opening == OPENING

    @property
    def end(self) -> re.Pattern[str]:
        """Matches the end of reasoning; the group has the line breaks after it that belong to it."""
        return re.compile(re.escape(self.closing) + (r"([\r\n]*)" if self.is_of_rows else "()"))

    def block_at_end(self, prompt: str) -> str:
        """Return the reasoning block that ends a prompt, open or empty; an empty text if it has no such block."""
        _, opening, rest = prompt.rpartition(self.opening.strip())
        return opening + rest if opening and not rest.replace(self.closing.strip(), "", 1).strip() else ""

    def is_closed_in(self, text: str) -> bool:
        """Return whether a text ends reasoning."""
        return self.closing.strip() in text


@dataclass(frozen=True)
class StreamedForm:
    """A form as it is in the text of a streamed answer."""

    opening: str = OPENING
    closing: str = CLOSING
    answer_start: str = ""
    """The three parts of the form with placeholder characters for special tokens; tags without blanks around them."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """Ids of special tokens around reasoning and before answers → placeholder characters."""


def find_reasoning_form(render: Render, text: str, tools: Tools, thinking: bool) -> ReasoningForm:
    """Determine the form in which a template writes reasoning.

    Some templates write it in one thinking mode only, and some before tool calls only.

    Args:
        render: renders messages with any template's text.
        text: the template's text, which must not depend on the clock.
        tools: tools of the probe conversations; empty for the template without tools.
        thinking: whether prompts ask for reasoning; the other mode is tried second.
    """
    is_written, prompts = False, []
    for mode in (thinking, not thinking):
        view = partial(_view, render, text, tools, enable_thinking=mode)
        prompts.append(view(add_generation_prompt=True))
        for answer in (ANSWER, CALLED):
            if REASONING_MARK not in view({**answer, **MARKED}):
                continue
            is_written = True
            if form := _form_around(view, prompts[-1], answer):
                return form
    ends = [prompt.rpartition(str(QUESTION["content"]))[2] for prompt in prompts]
    is_shown = any(OPENING in end or CLOSING in end for end in ends)
    return ReasoningForm(is_known=not is_written and (is_shown or prompts[0] == prompts[1]))


def _form_around(view: Callable[..., str], prompt: str, answer: dict[str, Any]) -> ReasoningForm | None:
    """Return the form of the text around the reasoning of an answer; None if it cannot be told from other text."""
    key = next((one for one in REASONING_KEYS if REASONING_MARK in view({**answer, one: REASONING_MARK})), "")
    head, mark, tail = view({**answer, key: REASONING_MARK}).partition(REASONING_MARK)
    if not mark:
        return None
    if head.rstrip().endswith(OPENING) and tail.lstrip().startswith(CLOSING):
        return ReasoningForm(key)
    before = view(ANSWER).partition(MARK)[0]
    starts = [start for start in (prompt, before) if start and head.startswith(start) and head != start]
    if not starts:
        return None
    begin = max(starts, key=len)
    unreasoned = view(answer)
    rest = unreasoned.removeprefix(begin)
    if rest not in ("", unreasoned) and tail.endswith(rest):
        closing, start = tail.removesuffix(rest), before.removeprefix(begin) if before.startswith(begin) else ""
    else:
        closing, start = tail.partition(MARK)[0] if MARK in tail else "", ""
    opening = head.removeprefix(begin)
    return ReasoningForm(key, opening, closing, start) if opening.strip() and closing.strip() else None


def _view(render: Render, text: str, tools: Tools, *messages: dict[str, Any], **options: Any) -> str:
    """Render messages after a question; the result is empty if the template rejects them."""
    try:
        return render(text, [QUESTION, *messages], tools, **options)
    except LoratuneError:
        return ""
