"""data settings → encoded training and validation rows, with a count of everything that was left out."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from loratune.data.conversation import Conversation
from loratune.data.encoding import Encoder, Example
from loratune.data.formats import detect_format, read_conversations
from loratune.data.sources import parse_source, read_rows
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.recipe.sections import DataSettings


@dataclass
class FileUse:
    """One data file as it was read."""

    path: str
    sha256: str
    rows: int
    """Rows used, after sampling."""
    format: str


@dataclass
class Split:
    """The encoded sequences of one purpose."""

    dataset: Dataset
    """Columns input_ids and labels: lists of int, of equal length in a row."""
    tokens: int
    trained_tokens: int
    longest: int
    """Tokens of the longest sequence."""


@dataclass
class ReadData:
    """The rows of a recipe, checked and split, not yet encoded."""

    train: list[Conversation]
    validation: list[Conversation]
    files: list[FileUse]
    warnings: list[str]


@dataclass
class PreparedData:
    """Everything training needs of the data, and what the user should know of it."""

    train: Split
    validation: Split | None
    files: list[FileUse]
    warnings: list[str]


def read_data(settings: DataSettings, seed: int) -> ReadData:
    """Read and split the rows of a recipe; needs no model, so that it can stand before a download.

    Args:
        settings: files, validation, placeholders.
        seed: of sampling and split.

    Raises:
        LoratuneError: rows that cannot be read or trained on.
    """
    files: list[FileUse] = []
    warnings: list[str] = []
    train = _read_files(settings.train, settings, seed, files)
    if isinstance(settings.validation, float):
        train, validation = _split_off(train, settings.validation, seed)
        if settings.validation and not validation:
            warnings.append(f"{len(train)} rows are too few to split; there is no validation")
    else:
        validation = _read_files(settings.validation, settings, seed, files)
    warnings += _repetitions(train, validation)
    return ReadData(train, validation, files, warnings)


def encode_data(data: ReadData, encoder: Encoder, train_on: str, max_length: int) -> PreparedData:
    """Encode rows into training and validation sequences.

    Args:
        data: the rows.
        encoder: the renderer.
        train_on: `all` answers of a conversation, or the `last`.
        max_length: tokens; longer sequences are left out and counted.

    Raises:
        LoratuneError: no training row is short enough.
    """
    warnings = [*data.warnings]
    train = _encode(data.train, encoder, train_on, max_length, "training", warnings)
    if not train:
        raise LoratuneError(
            f"all {len(data.train)} training rows are longer than training.max_length {max_length}; nothing is left to "
            "train on. Raise it, or shorten the rows",
            Exit.DATA,
        )
    validation = _encode(data.validation, encoder, train_on, max_length, "validation", warnings)
    return PreparedData(_split(train), _split(validation) if validation else None, data.files, warnings)


def _read_files(names: list[str], settings: DataSettings, seed: int, files: list[FileUse]) -> list[Conversation]:
    """All conversations of some files; problems of several files are told together."""
    conversations: list[Conversation] = []
    problems: list[str] = []
    for name in names:
        try:
            source = parse_source(name)
            rows = read_rows(source, seed)
            read = read_conversations(rows, settings.placeholders, settings.columns)
        except LoratuneError as error:
            if error.exit_code != Exit.DATA or len(names) == 1:
                raise
            problems.append(str(error))
            continue
        conversations += read
        sha256 = hashlib.sha256(source.path.read_bytes()).hexdigest()
        files.append(FileUse(str(source.path), sha256, len(read), detect_format(rows, settings.columns).name))
    if problems:
        raise LoratuneError("\n".join(problems), Exit.DATA)
    return conversations


def _split_off(rows: list[Conversation], fraction: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Draw validation rows; at least one where a fraction is asked for and a row can be spared."""
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1) if fraction else 0
    drawn = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for place, row in enumerate(rows) if place not in drawn],
        [row for place, row in enumerate(rows) if place in drawn],
    )


def _repetitions(train: list[Conversation], validation: list[Conversation]) -> list[str]:
    """Warnings about rows that stand in training twice, and about those that stand in validation too."""
    first: dict[str, str] = {}
    twice = []
    for row in train:
        key = json.dumps(row.messages)
        if key in first:
            twice.append(f"{row.place}: the same as {first[key]}")
        first.setdefault(key, row.place)
    shared = [
        f"{row.place}: the same as {first[key]}" for row in validation if (key := json.dumps(row.messages)) in first
    ]
    warnings = []
    if twice:
        warnings.append(f"{len(twice)} of {len(train)} training rows are repetitions:\n{bullet_list(twice, limit=5)}")
    if shared:
        warnings.append(
            f"{len(shared)} of {len(validation)} validation rows are training rows too, so that the validation loss "
            f"says less than it seems to:\n{bullet_list(shared, limit=5)}"
        )
    return warnings


def _encode(
    rows: list[Conversation], encoder: Encoder, train_on: str, max_length: int, purpose: str, warnings: list[str]
) -> list[Example]:
    """Encode rows and leave out those that are too long, with a warning that names the first."""
    examples, too_long = [], []
    for row in rows:
        encoded = encoder.encode(row, train_on)
        fitting = [example for example in encoded if len(example.input_ids) <= max_length]
        examples += fitting
        if len(fitting) < len(encoded):
            longest = max(len(example.input_ids) for example in encoded)
            too_long.append(f"{row.place}: {longest} tokens")
    if too_long:
        warnings.append(
            f"{len(too_long)} of {len(rows)} {purpose} rows ({len(too_long) / len(rows):.1%}) are longer than "
            f"training.max_length {max_length} and left out:\n{bullet_list(too_long, limit=5)}"
        )
    return examples


def _split(examples: list[Example]) -> Split:
    columns: dict[str, Any] = {
        "input_ids": [example.input_ids for example in examples],
        "labels": [example.labels for example in examples],
    }
    return Split(
        dataset=Dataset.from_dict(columns),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(example.trained_tokens for example in examples),
        longest=max(len(example.input_ids) for example in examples),
    )
