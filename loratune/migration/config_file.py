"""Reads a config of another tool: YAML, JSON, or the training command of a shell script. Nothing is executed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.data.formats.conversation import is_deeper
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.migration.shell_command import read_command
from loratune.plain_files import read_plain, reason_of
from loratune.recipe.yaml_reader import MAX_DEPTH, SURROGATE, read_yaml

MOST_BYTES = 2**20
"""Maximum size of a config in bytes; the longest that tools write have about 20 kB."""
MOST_KEYS = 5000


@dataclass(frozen=True)
class Config:
    """The settings of a config file, under the names that the file has."""

    path: Path
    values: dict[str, Any]
    """Name → value; nothing is null or empty."""
    program: str = ""
    """The program that a shell command starts, such as `swift sft`; empty for other files."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the file sets."""


def read_config(path: Path) -> Config:
    """Read a config.

    Raises:
        LoratuneError: it cannot be read, is a script without a training command, holds no settings, or too many.
    """
    text = read_text(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        command = read_command(text)
        if command is not None:
            values = {name: value for name, value in command.options.items() if not is_empty(value)}
            return Config(path, values, command.program, command.environment)
        if path.suffix == ".sh" or text.startswith("#!"):
            raise LoratuneError(
                f"{path}: no training command of a known tool is in it (swift sft, megatron sft, trl sft); give the "
                "YAML file instead if the command names one",
                Exit.USAGE,
            )
    values = parse(path, text)
    if not isinstance(values, dict) or not values:
        raise LoratuneError(f"{path}: it holds no settings (name: value)", Exit.USAGE)
    if len(values) > MOST_KEYS:
        raise LoratuneError(f"{path}: it has {len(values):,} names; at most {MOST_KEYS:,} are read", Exit.USAGE)
    return Config(path, {str(name): value for name, value in values.items() if not is_empty(value)})


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        LoratuneError: it cannot be read, is larger than `MOST_BYTES`, or not UTF-8.
    """
    try:
        return read_plain(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoratuneError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8", Exit.USAGE) from error
    except OSError as error:
        raise LoratuneError(f"{path}: cannot be read: {reason_of(error)}", Exit.USAGE) from error


def parse(path: Path, text: str) -> Any:
    """Parse the text of a JSON or YAML file; YAML without tags and aliases.

    Raises:
        LoratuneError: lists all problems, with their lines.
    """
    if path.suffix == ".json":
        try:
            values = json.loads(text)
            if SURROGATE.search(json.dumps(values, ensure_ascii=False)):
                raise ValueError("it holds an unpaired UTF-16 surrogate")
            if is_deeper(values, MAX_DEPTH):
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
            return values
        except (ValueError, RecursionError) as error:
            raise LoratuneError(f"{path}: not valid JSON: {reason_of(error)}", Exit.USAGE) from error
    document = read_yaml(text)
    if document.problems:
        listed = bullet_list([f"line {line}: {problem}" for line, problem in sorted(document.problems)], limit=20)
        raise LoratuneError(f"{path}: the file cannot be read safely:\n{listed}", Exit.USAGE)
    return document.values


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, or an empty text, list or object."""
    return value is None or value == "" or value == [] or value == {}
