"""An answer as the continuation of its prompt: the texts of the template and of the row, in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from loratune.data.formats.conversation import CLOSING, OPENING, reasoning_apart
from loratune.data.template.chat_template import ChatTemplate

Part: TypeAlias = tuple[str, bool]
"""Text of an answer; True if special tokens in the text come from the template and stay tokens."""
EMPTY_BLOCK = re.compile(rf"{OPENING}\s*{CLOSING}\s*")


def continued(answer: str, chat: ChatTemplate, special: re.Pattern[str]) -> list[Part]:
    """Return an answer as the continuation of its prompt, with its reasoning in the template's form.

    Args:
        answer: the text of a row's answer.
        chat: the template.
        special: matches the tokenizer's special tokens.
    """
    begun, start, form = chat.begun_reasoning, chat.answer_start, chat.form
    if not form.is_of_rows:
        thought, said = reasoning_apart(answer)
        if not thought:
            return _joined([(start, True), (said, False)], special)
        opening = form.opening.partition(begun)[2] if begun else form.opening
        closing = form.closing + form.answer_start
        return _joined([(opening, True), (thought, False), (closing, True), (said, False)], special)
    if chat.closed_reasoning and (empty := EMPTY_BLOCK.match(answer.lstrip())):
        answer = answer.lstrip()[empty.end() :]  # the prompt has the block already
    elif answer.lstrip().startswith(OPENING) or (begun and CLOSING in answer):
        start = "" if CLOSING in start else start
        if begun and not answer.startswith(begun):
            answer = answer.lstrip()
        answer = answer.removeprefix(begun) if answer.startswith(begun) else answer.removeprefix(OPENING)
    return _joined([(start, True), (answer, False)], special)


def split_parts(parts: Sequence[Part], length: int) -> tuple[list[Part], list[Part]]:
    """Split an answer after a number of characters."""
    before, behind = list[Part](), list[Part]()
    for text, is_own in parts:
        before.append((text[:length], is_own))
        behind.append((text[length:], is_own))
        length = max(0, length - len(text))
    return before, behind


def _joined(parts: Sequence[Part], special: re.Pattern[str]) -> list[Part]:
    """Join the texts between special tokens of the template, which tokenizers take as one."""
    joined: list[Part] = []
    for text, is_own in parts:
        control = list(special.finditer(text)) if is_own else []
        begin, end = (control[0].start(), control[-1].end()) if control else (0, 0)
        for piece in ((text[:begin], False), (text[begin:end], True), (text[end:], False)):
            if joined and joined[-1][1] is piece[1]:
                piece = (joined.pop()[0] + piece[0], piece[1])
            joined += [piece] if piece[0] else []
    return joined
