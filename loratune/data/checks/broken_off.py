"""Whether an answer breaks off: few signs, each of which hardly ever stands at the end of a whole answer."""

from __future__ import annotations

import re

MARKED = re.compile(
    r"[\[(<【（]\s*(?:(?:text|output|response|answer|content)\s+)?"
    r"(?:truncated|cut off|cut short|截断|已截断|未完)\s*[\])>】）]"
    r"[.…\s]*\Z",
    re.IGNORECASE,
)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
# A comma, an opened bracket, or a word that needs another one behind it.
UNFINISHED = re.compile(
    r"(?:[,，、(（\[【]|\b(?:the|an|and|or|of|with|from|because|which|is|are|was|were|their|its|our|your))\Z"
    r"|(?:因为|以及|或者|并且|但是|包括|例如)\Z"
)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s|[。！？][”’）]*")
ENDED = re.compile(r"[.!?:;。！？：；…][\"'’”)\]*_`）」』】]*\Z")
LONG_LINE = 40
"""Characters of a line that is taken for a sentence or several."""
OTHER_LINES = 2
SENTENCES, REST = 3, 20
"""Ended sentences of a last line, and characters of one behind them that is not ended."""


def breaks_off(answer: str) -> bool:
    """Whether an answer stops inside a code block or a sentence, or says that it was cut."""
    text = answer.rstrip()
    is_fenced = "```" in text or "~~~" in text
    return bool(MARKED.search(text)) or (is_fenced and _opens_a_fence(text)) or _stops_in_a_sentence(text)


def _opens_a_fence(text: str) -> bool:
    opened = ""
    for match in FENCE.finditer(text):
        fence, info = match[1], match[2]
        if not opened:
            opened = fence
        elif fence.startswith(opened) and not info.strip():
            opened = ""
    return bool(opened)


def _stops_in_a_sentence(text: str) -> bool:
    """Whether the last line is unfinished, or lacks an end where all other sentences have one."""
    line = text.rpartition("\n")[2]
    if UNFINISHED.search(line):
        return len(line.split()) > 2 or not line.isascii()
    if not text[-1:].isalpha():
        return False
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    if len(ends) >= SENTENCES and len(line) - ends[-1] >= REST:
        return True
    earlier = [one for one in map(str.rstrip, text.split("\n")[:-1]) if len(one) >= LONG_LINE]
    return len(line) >= LONG_LINE and len(earlier) >= OTHER_LINES and all(map(ENDED.search, earlier))
