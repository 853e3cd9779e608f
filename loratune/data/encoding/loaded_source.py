"""Loads the encoded rows of one entry of data.train or data.validation, encoding them if they are not cached."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratune.data.checked_rows import CheckedRows, check_rows
from loratune.data.encoding.cache import cache_key, entry_lock, mark_used, new_entry
from loratune.data.encoding.encoded import INFO, EncodedRows
from loratune.data.encoding.encoder import Encoder
from loratune.data.encoding.row_encoder import RowEncoder
from loratune.data.reading.files import RowFile, open_rows
from loratune.data.sources import Source
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.sections import PromptSettings
from loratune.writing import remove


@dataclass(frozen=True)
class Rendering:
    """How rows become ids."""

    prompt: PromptSettings
    tokenizer_sha256: str
    """Hash of all files of the tokenizer and its template."""
    make_encoder: Callable[[], Encoder]
    """Called only if rows are not cached, since loading a tokenizer takes seconds."""
    max_length: int


@dataclass(frozen=True)
class LoadedSource:
    """A source, its file, and its encoded rows."""

    source: Source
    file: RowFile
    rows: EncodedRows


def load_source(source: Source, data: DataSettings, rendering: Rendering, seed: int) -> LoadedSource:
    """Return the encoded rows of a source, from the cache if possible.

    Args:
        source: file or hub dataset, and its sample size.
        data: formats, trained parts, truncation.
        rendering: template and tokenizer.
        seed: seeds the sample.

    Raises:
        LoratuneError: the source cannot be read, or has no rows.
    """
    file = open_rows(source.name, data.encoding)
    with entry_lock(_key(source, file, data, rendering, seed)) as entry:
        for is_last_try in (False, True):
            if not (entry / INFO).is_file():
                rows = _rows(source, file, data, seed)
                row_encoder = RowEncoder(rendering.make_encoder(), data, rendering.max_length)
                with new_entry(entry) as folder:
                    row_encoder.write(rows, folder)
            try:
                encoded = EncodedRows(entry)
                break
            except (OSError, ValueError, TypeError, KeyError):  # damaged: write the entry again
                if is_last_try:
                    raise
                remove(entry)
        mark_used(entry)
    return LoadedSource(source, file, encoded)


def _key(source: Source, file: RowFile, data: DataSettings, rendering: Rendering, seed: int) -> str:
    """Return a key of all inputs that affect the ids, and no others, so that unrelated changes keep the cache."""
    shortens = data.truncation_strategy in ("truncate_prompt", "truncate_answer")
    return cache_key(
        {
            "file": [file.sha256, Path(file.name).suffixes],
            "sample": [source.sample, seed] if source.sample else None,
            "system": source.system,
            "reading": [data.encoding, data.columns, data.placeholders],
            "prompt": rendering.prompt.model_dump(),
            "tokenizer": rendering.tokenizer_sha256,
            "trained": [data.train_on_turns, data.train_thinking],
            "shortened": [data.truncation_strategy, rendering.max_length] if shortens else None,
        }
    )


def _rows(source: Source, file: RowFile, data: DataSettings, seed: int) -> CheckedRows:
    rows = check_rows(file, data, source.system)
    if source.sample is None:
        return rows
    good = [number for number, _ in rows]
    if source.sample >= len(good):
        return rows
    return CheckedRows(file, rows.reader, frozenset(random.Random(seed).sample(good, source.sample)))
