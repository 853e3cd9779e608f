"""Flags problems in the text of one conversation, as bits of an integer that is cached with the row."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from enum import IntFlag, auto
from typing import cast
from unicodedata import is_normalized

from ftfy import fix_encoding
from ftfy.badness import badness

from loratune.data.checks.broken_off import breaks_off
from loratune.data.encoding.tokens import NormalForm
from loratune.data.formats.conversation import CLOSING, OPENING, Conversation, Message
from loratune.recipe.findings import Finding


class Flag(IntFlag):
    """The findings that one row's texts show, by the bits under which they are kept; new ones come last."""

    EMPTY = auto()
    SHORT = auto()
    GARBLED = auto()
    CONTROL_TOKENS = auto()
    CONTROL_TOKENS_IN_ANSWERS = auto()
    REPETITIVE = auto()
    THINKING = auto()
    NO_REASONING = auto()
    BROKEN_OFF = auto()
    ONLY_REASONING = auto()
    NORMALIZED = auto()
    OPEN_REASONING = auto()


FLAGS = cast("tuple[Finding, ...]", tuple(str(flag.name).lower() for flag in Flag))
"""Their names as findings, by the number of their bit."""

REASONING = re.compile(r"<think>\s*(?!</think>)\S")
"""Matches the start of a non-empty reasoning block."""

# Replacement and control characters, and typical results of decoding damaged bytes as GBK.
BROKEN = re.compile("[\0\x80-\x9f\ufffd]|锟斤拷|烫烫烫|屯屯屯")
# Every ftfy pattern needs a character outside this set; most Chinese and Korean texts stay inside it.
UNSUSPICIOUS = re.compile("[\x00-\x7f\u2010-\u201f\u2022-\u2027\u3000-\u9fff\uac00-\ud7a3\uff00-\uffef]*")
NON_ASCII = re.compile(r"[^\x00-\x7f]")
# Three Chinese characters or punctuation marks in UTF-8, decoded as GB18030. Genuine Chinese text contains one or two
# such byte sequences by chance (联通), but hardly ever three.
UTF_8_WITHIN_GB18030 = re.compile(rb"(?:[\xe3-\xe9\xef][\x80-\xbf]{2}){3}")
# Four characters of GBK or EUC-KR, decoded as Latin-1 or Windows-1252.
GBK_WITHIN_LATIN = re.compile("(?:[\xb0-\xf7][\xa1-\xfe]){4}")
DENSE_MATCHES = 3
DENSE_SHARE = 1 / 4

LOOP_IDS = 64
"""Minimum length of a loop, in token ids."""
LOOP_TURNS = 4
"""Minimum number of repetitions of the phrase."""
LONGEST_PHRASE = 128
PROBE_IDS = 8  # Stride of the search: it finds any loop slightly longer than LOOP_IDS.
ID_TYPE = "i"
ID_BYTES = array(ID_TYPE).itemsize


class Inspector:
    """Flags problems in conversations.

    Args:
        added_tokens: texts of all tokens added to the tokenizer's vocabulary.
        special_tokens: those of them that must not occur as text in a conversation.
        thinking: whether prompts ask for a reasoning block.
        expects_reasoning: whether the template then expects reasoning before every answer.
        leaves_open: whether the prompt opens a reasoning block that an answer without reasoning would not close.
        form: the Unicode normal form that the tokenizer converts texts to.
    """

    def __init__(
        self,
        added_tokens: Iterable[str],
        special_tokens: Iterable[str],
        thinking: bool,
        expects_reasoning: bool = False,
        leaves_open: bool = False,
        form: NormalForm | None = None,
    ) -> None:
        self._added = _any_of(added_tokens)
        self._special = _any_of(special_tokens)
        self._thinking = thinking
        self._expects_reasoning = expects_reasoning
        self._leaves_open = leaves_open
        self._form = form

    def flags(self, conversation: Conversation, trained: Sequence[int]) -> int:
        """Return the bits of all findings, in the order of FLAGS.

        Args:
            conversation: the conversation to check.
            trained: token ids of its trained answers.
        """
        found = Flag.REPETITIVE if is_repetitive(trained) else Flag(0)
        for place, message in enumerate(conversation.messages):
            text = message["content"]
            if is_garbled(text):
                found |= Flag.GARBLED
            if self._form and not is_normalized(self._form, text):
                found |= Flag.NORMALIZED
            if message["role"] != "assistant":
                found |= Flag.CONTROL_TOKENS if self._added.search(text) else 0
                continue
            if self._special.search(text):
                found |= Flag.CONTROL_TOKENS_IN_ANSWERS
            if place not in conversation.untrained:
                found |= self._flags_of_trained(message)
        return int(found)

    def _flags_of_trained(self, message: Message) -> int:
        text, calls = message["content"], message.get("tool_calls")
        length = len(text.strip())
        if length < 2 and not calls:
            return Flag.SHORT if length else Flag.EMPTY
        found = Flag.BROKEN_OFF if not calls and breaks_off(text) else 0
        found |= Flag.ONLY_REASONING if not calls and text.rstrip().endswith(CLOSING) else 0
        if CLOSING not in text and (text.lstrip().startswith(OPENING) or (self._leaves_open and not calls)):
            found |= Flag.OPEN_REASONING
        if self._expects_reasoning:
            return found if CLOSING in text or REASONING.search(text) else found | Flag.NO_REASONING
        return found | Flag.THINKING if not self._thinking and REASONING.search(text) else found


def is_garbled(text: str) -> bool:
    """Return whether a text was decoded with a wrong encoding or has lost characters."""
    if text.isascii():
        return "\0" in text
    if BROKEN.search(text) or UTF_8_WITHIN_GB18030.search(text.encode("gb18030", "replace")):
        return True
    return not UNSUSPICIOUS.fullmatch(text) and _is_mojibake(text)


def is_repetitive(ids: Sequence[int]) -> bool:
    """Return whether token ids contain a loop: one phrase repeated many times with nothing in between.

    Counting distinct n-grams would flag tables and code, which repeat n-grams too, but rarely at equal distances.
    """
    if len(ids) < LOOP_IDS:
        return False
    text = array(ID_TYPE, ids).tobytes()
    probe, reach = PROBE_IDS * ID_BYTES, LONGEST_PHRASE * ID_BYTES
    for start in range(0, len(text) - LOOP_IDS * ID_BYTES + 1, probe):
        again = text.find(text[start : start + probe], start + ID_BYTES, start + reach + probe)
        if again > 0 and _is_loop(text, start, again - start):
            return True
    return False


def _is_mojibake(text: str) -> bool:
    """Return whether the text is Latin, Greek or Cyrillic mojibake.

    One unlikely pair of characters is no proof, as in »Übung« or “Aç”a. The text must also decode in another encoding,
    or contain many such pairs.
    """
    matches = badness(text)
    if matches == 0:
        return False
    is_dense = matches >= max(DENSE_MATCHES, DENSE_SHARE * len(NON_ASCII.findall(text)))
    return is_dense or bool(GBK_WITHIN_LATIN.search(text)) or fix_encoding(text) != text


def _is_loop(text: bytes, start: int, phrase: int) -> bool:
    """Return whether the bytes at `start` repeat every `phrase` bytes for the minimum length of a loop."""
    length = max(LOOP_IDS * ID_BYTES, LOOP_TURNS * phrase)
    stop = start + length
    return stop <= len(text) and text[start : stop - phrase] == text[start + phrase : stop]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens. Whitespace tokens are excluded, since they control nothing."""
    texts = sorted({token for token in tokens if token.strip()})
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
