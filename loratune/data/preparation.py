"""data settings → encoded training and validation rows, with a count of everything that was left out."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from loratune.data.encoding import Encoder, Example
from loratune.data.formats import Conversation, read_alpaca
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
class PreparedData:
    """Everything training needs of the data, and what the user should know of it."""

    train: Split
    validation: Split | None
    files: list[FileUse]
    first_example: Example
    warnings: list[str] = field(default_factory=list)


def prepare_data(settings: DataSettings, encoder: Encoder, max_length: int, seed: int) -> PreparedData:
    """Read, split and encode the rows of a recipe.

    Args:
        settings: files, validation, placeholders.
        encoder: the renderer.
        max_length: tokens; longer sequences are left out and counted.
        seed: of sampling and split.

    Raises:
        LoratuneError: rows that cannot be read or trained on.
    """
    files: list[FileUse] = []
    train = _read_files(settings.train, settings.placeholders, seed, files)
    warnings: list[str] = []
    if isinstance(settings.validation, float):
        train, validation = _split_off(train, settings.validation, seed)
        if settings.validation and not validation:
            warnings.append(f"{len(train)} rows are too few to split; there is no validation")
    else:
        validation = _read_files(settings.validation, settings.placeholders, seed, files)
    train_examples = _encode(train, encoder, settings.train_on, max_length, "training", warnings)
    if not train_examples:
        raise LoratuneError(
            f"all {len(train)} training rows are longer than training.max_length {max_length}; nothing is left to "
            "train on. Raise it, or shorten the rows",
            Exit.DATA,
        )
    validation_examples = _encode(validation, encoder, settings.train_on, max_length, "validation", warnings)
    return PreparedData(
        train=_split(train_examples),
        validation=_split(validation_examples) if validation_examples else None,
        files=files,
        first_example=train_examples[0],
        warnings=warnings,
    )


def _read_files(names: list[str], placeholders: dict[str, str], seed: int, files: list[FileUse]) -> list[Conversation]:
    """All conversations of some files; problems of several files are told together."""
    conversations: list[Conversation] = []
    problems: list[str] = []
    for name in names:
        try:
            source = parse_source(name)
            read = read_alpaca(read_rows(source, seed), placeholders)
        except LoratuneError as error:
            if error.exit_code != Exit.DATA or len(names) == 1:
                raise
            problems.append(str(error))
            continue
        conversations += read
        files.append(FileUse(str(source.path), hashlib.sha256(source.path.read_bytes()).hexdigest(), len(read)))
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
