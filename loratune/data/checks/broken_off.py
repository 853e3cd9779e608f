"""Detects answers that stop early, from a few signs that rarely end a complete answer."""

from __future__ import annotations

import re

MARKED = re.compile(
    r"[\[(<【（]\s*(?:(?:text|output|response|answer|content)\s+)?"
    r"(?:truncated|cut off|cut short|截断|已截断|未完)\s*[\])>】）]"
    r"[.…\s]*\Z",
    re.IGNORECASE,
)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
# A comma, an opening bracket, or a word that cannot end a sentence.
UNFINISHED = re.compile(
    r"(?:[,，、(（\[【]|\b(?:the|an|and|or|of|with|from|because|which|is|are|was|were|their|its|our|your))\Z"
    r"|(?:因为|以及|或者|并且|但是|包括|例如)\Z"
)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s|[。！？][”’）]*")
ENDED = re.compile(r"[.!?:;。！？：；…][\"'’”)\]*_`）」』】]*\Z")
LONG_LINE = 40
"""Lines of at least this many characters count as prose."""
OTHER_LINES = 2
SENTENCES, REST = 3, 20
"""The rule for a last line: this many finished sentences, then this many characters without an end."""


def breaks_off(answer: str) -> bool:
    """Return whether an answer stops inside a code block or a sentence, or carries a mark such as [truncated]."""
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
    """Return whether the last line is unfinished, or is the only sentence without closing punctuation."""
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
