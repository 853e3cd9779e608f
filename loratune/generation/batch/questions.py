"""Reads the rows of a file as prompts, with the reference answers that some of them have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from loratune.data.checked_rows import FORMAT_ROWS, SHOWN_ROWS
from loratune.data.formats.conversation import Conversation, Message, written_out
from loratune.data.formats.placeholders import MUST_BE_FILLED, PLACEHOLDER
from loratune.data.formats.registry import FORMATS, ConversationReader, detect_format
from loratune.data.reading.files import BadRow, RowFile, open_rows
from loratune.data.sources import parse_source
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.printable import shortened

NEEDS = (
    f"each row needs {', '.join(kind.asks for kind in FORMATS[:-1])} or {FORMATS[-1].asks}; a list ends with a "
    "question or an answer"
)


@dataclass(frozen=True)
class AskedRow:
    number: int
    """Number from 1, in the order of the file."""
    place: str
    """File and line or row, for messages; see `RowFile.place`."""
    fields: dict[str, Any]
    """The row as in the file."""
    messages: tuple[Message, ...]
    """The conversation up to and including the question."""
    answer: Message | None
    """The reference answer; None if it is missing or blank."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the model may call."""

    @property
    def reference(self) -> str | None:
        """The reference answer as one text, including tool calls."""
        return written_out(self.answer["content"], self.answer.get("tool_calls", ())) if self.answer else None

    @property
    def uses_tools(self) -> bool:
        """Whether tools are available or were called."""
        messages = [*self.messages, *([self.answer] if self.answer else [])]
        return bool(self.tools) or any(one["role"] == "tool" or "tool_calls" in one for one in messages)

    @property
    def size_bytes(self) -> int:
        """Size of all texts of the prompt in bytes, an upper bound of its tokens."""
        called = [*self.tools, *(message.get("tool_calls") for message in self.messages if "tool_calls" in message)]
        written = json.dumps(called, ensure_ascii=False) if called else ""
        return len(written.encode()) + sum(len(message["content"].encode()) for message in self.messages)


@dataclass(frozen=True)
class QuestionFile:
    """A file in which every row is a prompt."""

    name: str
    sha256: str
    rows: list[AskedRow]

    def places(self, numbers: Sequence[int], limit: int) -> str:
        """List the places of the first rows of some numbers, the file's name before the first alone."""
        shown = [self.rows[number - 1].place for number in numbers[:limit]]
        later = [place.removeprefix(self.name).lstrip() for place in shown[1:]]
        return ", ".join([*shown[:1], *later, *(["…"] if len(numbers) > limit else [])])


def read_questions(entry: str, columns: Mapping[str, str], placeholders: Mapping[str, str]) -> QuestionFile:
    """Read rows in any training format, whose last answer may be missing, or rows with only a `prompt`.

    Args:
        entry: a file, or hf:org/name:split.
        columns: name that a format knows → name in the file.
        placeholders: values of placeholders such as {{name}}.

    Raises:
        LoratuneError: the file cannot be read, or some rows are not prompts.
    """
    source = parse_source(entry)
    if source.sample or source.repeat > 1:
        raise LoratuneError(f"{entry}: every row is answered once; remove the # and what follows it", Exit.USAGE)
    return questions_of(open_rows(source.name), columns, placeholders)


def questions_of(file: RowFile, columns: Mapping[str, str], placeholders: Mapping[str, str]) -> QuestionFile:
    """Read the rows of an open file. See `read_questions`."""
    rows, bad = [], []
    for number, read in enumerate(_read(file, columns, placeholders), start=1):
        if isinstance(read, str):
            bad.append(read)
        else:
            rows.append(AskedRow(number, *read))
    if bad:
        listed = bullet_list(bad, limit=SHOWN_ROWS)
        raise LoratuneError(
            f"{file.name}: {len(bad):,} of {counted(len(rows) + len(bad), 'row')} cannot be answered:\n{listed}\n"
            f"{NEEDS}; correct or remove these rows{'' if rows else _about_columns(file)}",
            Exit.DATA,
        )
    sha256 = file.sha256
    file.check_unchanged()
    return QuestionFile(file.name, sha256, rows)


def _about_columns(file: RowFile) -> str:
    """Return which columns a file has of which no row can be used; empty for rows that have none."""
    first = next((row.value for row in islice(file, FORMAT_ROWS) if not isinstance(row, BadRow)), None)
    if not isinstance(first, dict) or not first:
        return ""
    named = ", ".join(repr(shortened(str(name))) for name in islice(first, SHOWN_ROWS))
    return f"; its columns begin with {named}, and must have the names that they had in the training"


def _read(
    file: RowFile, columns: Mapping[str, str], placeholders: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any], tuple[Message, ...], Message | None, tuple[dict[str, Any], ...]] | str]:
    """Place, fields, question, answer and tools of each row, or what is wrong with it and where."""
    first = [row.value for row in islice(file, FORMAT_ROWS) if not isinstance(row, BadRow)]
    kind = detect_format(first, columns, are_questions=True)
    reader = ConversationReader(kind, placeholders, columns, are_questions=True)
    for row in file:
        if isinstance(row, BadRow):
            yield row.problem
            continue
        read = reader.read(row.value)
        place, problem = file.place(row.number), read if isinstance(read, str) else _problem(read)
        if problem:
            yield f"{place}: {problem}"
        elif not isinstance(read, str):
            *asked, answer = read.messages
            is_given = bool(answer["content"].strip() or answer.get("tool_calls"))
            yield place, row.value, tuple(asked), answer if is_given else None, read.tools


def _problem(conversation: Conversation) -> str:
    """Return the reason why a readable row cannot be used as a prompt; empty if it can."""
    names = {
        name
        for message in conversation.messages
        for name in PLACEHOLDER.findall(message["content"])
        if name.lower() in MUST_BE_FILLED
    }
    if names:
        listed = ", ".join(f"{{{{{name}}}}}" for name in sorted(names))
        return f"holds {listed}, for which the adapter's recipe has no value; write it into the row"
    return ""
