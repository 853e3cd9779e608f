"""Encodes the rows of a source into a cache entry in batches, so that memory does not grow with the file."""

from __future__ import annotations

import gc
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from loratune.data.checked_rows import CheckedRows
from loratune.data.checks.inspection import Inspector
from loratune.data.encoding.encoded import CUT, INFO, ROWS, SCHEMA, UNENDED, Line
from loratune.data.encoding.encoder import IGNORED, Encoder, Example
from loratune.data.encoding.tokens import Ids, normal_form
from loratune.data.encoding.truncation import shorten
from loratune.data.formats.conversation import Conversation
from loratune.errors import LoratuneError
from loratune.progress import row_progress
from loratune.recipe.data_sections import DataSettings

BATCH_ROWS = 1000
Rendered: TypeAlias = tuple[list[Example], list[Example]]
"""Sequences of a row before and after truncation."""
NOTHING = Example(array("i"), array("i"))


class RowEncoder:
    """Encodes conversations under one recipe's settings.

    Args:
        encoder: renders the conversations.
        data: trained parts, truncation.
        max_length: maximum tokens per sequence.
    """

    def __init__(self, encoder: Encoder, data: DataSettings, max_length: int) -> None:
        self._encoder, self._data, self._max_length = encoder, data, max_length
        self._settings = data.train_on_turns, data.train_thinking
        added = encoder.tokenizer.added_tokens_decoder.values()
        self._inspector = Inspector(
            [token.content for token in added if not token.content.isspace()],
            [token.content for token in added if token.special],
            encoder.takes_reasoning,
            encoder.asks_for_reasoning,
            encoder.leaves_reasoning_open,
            normal_form(encoder.tokenizer),
        )

    def write(self, rows: CheckedRows, folder: Path) -> None:
        """Encode rows into a cache entry. Rows that cannot be rendered are logged as bad and skipped.

        Raises:
            LoratuneError: iterating the rows raised it, or the file changed meanwhile.
        """
        sequences, iterator = 0, iter(rows)
        with (
            _rare_garbage_collection(),
            pa.OSFile(str(folder / ROWS), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
            row_progress(f"encoding {Path(rows.file.name).name}") as advance,
        ):
            while batch := list(islice(iterator, BATCH_ROWS)):
                lines = self._encode(batch, rows)
                sequences += len(lines)
                writer.write_batch(_record_batch(lines))
                advance(len(batch))
        rows.file.check_unchanged()
        (folder / INFO).write_text(json.dumps({"reading": asdict(rows.log), "sequences": sequences}), encoding="utf-8")

    def _encode(self, batch: Sequence[tuple[int, Conversation]], rows: CheckedRows) -> list[Line]:
        """Return one line per sequence."""
        lines = []
        for (number, conversation), rendered in zip(batch, self._rendered(batch), strict=True):
            if isinstance(rendered, LoratuneError):
                rows.refuse(number, rendered)
                continue
            rows.log.rendered += 1
            examples, kept = rendered
            text = json.dumps(conversation.messages, ensure_ascii=False)
            digest = _digest(text, conversation.tools)
            asked = _digest(json.dumps(conversation.messages[:-1], ensure_ascii=False), conversation.tools)
            lost = sum(len(example.input_ids) for example in examples) - sum(len(one.input_ids) for one in kept)
            flags = self._flags(conversation, kept) | CUT * (lost > 0)
            # A row without anything to train keeps an empty line, so that it can be reported.
            for place, one in enumerate(kept or [NOTHING]):
                ids, shown = one.input_ids, text if place == 0 else ""
                line = Line(
                    input_ids=ids,
                    labels=one.labels,
                    number=number,
                    digest=digest,
                    asked=asked,
                    flags=flags,
                    tokens=len(ids),
                    trained=one.trained_tokens,
                    lost=lost,
                    messages=shown,
                )
                lines.append(line)
        return lines

    def _rendered(self, batch: Sequence[tuple[int, Conversation]]) -> list[Rendered | LoratuneError]:
        """Return each row's sequences, or the error that prevents them."""
        conversations = [conversation for _, conversation in batch]
        try:
            encoded = self._encoder.encode_all(conversations, *self._settings)
            pairs = zip(conversations, encoded, strict=True)
            return [(examples, self._shortened(conversation, examples)) for conversation, examples in pairs]
        except LoratuneError:  # at least one row cannot be rendered: find out which
            return [self._rendered_alone(conversation) for conversation in conversations]

    def _rendered_alone(self, conversation: Conversation) -> Rendered | LoratuneError:
        try:
            examples = self._encoder.encode(conversation, *self._settings)
            return examples, self._shortened(conversation, examples)
        except LoratuneError as error:
            return error

    def _shortened(self, conversation: Conversation, examples: list[Example]) -> list[Example]:
        data, limit = self._data, self._max_length
        fits = all(len(example.input_ids) <= limit for example in examples)
        if fits or data.truncation_strategy not in ("truncate_prompt", "truncate_answer"):
            return examples
        return shorten(self._encoder, conversation, limit, data.truncation_strategy, *self._settings)

    def _flags(self, conversation: Conversation, examples: list[Example]) -> int:
        trained = array("i", b"".join(map(_trained, examples)))
        is_unended = any(example.labels[-1] != self._encoder.end_id for example in examples)
        return self._inspector.flags(conversation, trained) | UNENDED * is_unended


def _trained(example: Example) -> Ids:
    """Return the labelled ids; in most examples they are one block at the end."""
    end = example.labels[example.labels.count(IGNORED) :]
    return end if IGNORED not in end else array("i", (label for label in example.labels if label != IGNORED))


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Collect garbage rarely: rows leave no cycles, and frequent collections take a third of the time."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def row_digest(conversation: Conversation) -> int:
    """Hash a row's messages and tools, to detect duplicates."""
    return _digest(json.dumps(conversation.messages, ensure_ascii=False), conversation.tools)


def _digest(messages: str, tools: tuple[dict[str, Any], ...]) -> int:
    content = messages + json.dumps(tools) if tools else messages
    return int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "little")


def _record_batch(lines: list[Line]) -> pa.RecordBatch:
    return pa.record_batch(
        [_column([getattr(line, field.name) for line in lines], field.type) for field in SCHEMA], SCHEMA
    )


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    return _list_array(values) if pa.types.is_list(kind) else pa.array(values, kind)


def _list_array(lists: Sequence[Ids]) -> pa.Array:
    """Build an Arrow array of int32 lists without a Python object per element."""
    ends = np.cumsum([len(values) for values in lists], dtype=np.int32)
    count = int(ends[-1]) if len(ends) else 0
    flat = pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(b"".join(lists))])
    offsets = pa.Array.from_buffers(pa.int32(), len(lists) + 1, [None, pa.py_buffer(np.append(np.int32(0), ends))])
    return pa.ListArray.from_arrays(offsets, flat)
