"""Reads the rows of --tests: questions with their expected answers, their asserts, or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratune.data.reading.files import Row, RowFile, unreadable
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.evaluation.asserts import Assert, read_asserts
from loratune.generation.batch.questions import AskedRow, QuestionFile, questions_of, read_questions
from loratune.plain_files import read_plain_text, reason_of
from loratune.recipe.yaml_reader import read_yaml
from loratune.runs.folder import file_sha256

ASSERT = "assert"
"""Column of the asserts."""
YAML = (".yaml", ".yml")
SHOWN_ROWS = 5


@dataclass(frozen=True)
class EvaluationRows:
    """The rows of a tests file."""

    file: QuestionFile
    asserts: Mapping[int, tuple[Assert, ...]]
    """Number of a row → its asserts; rows without any are left out."""

    @property
    def rows(self) -> list[AskedRow]:
        return self.file.rows


def read_tests(entry: str, columns: Mapping[str, str], placeholders: Mapping[str, str]) -> EvaluationRows:
    """Read a tests file: rows in any format of sft, or the same as YAML, each with `assert` if wanted.

    Args:
        entry: a file, or hf:org/name:split.
        columns: name that a format knows → name in the file.
        placeholders: values of placeholders such as {{name}}.

    Raises:
        LoratuneError: the file cannot be read, some rows cannot be asked, or some asserts are invalid.
    """
    if entry.lower().endswith(YAML):
        file = questions_of(_open_yaml(entry), columns, placeholders)
    else:
        file = read_questions(entry, columns, placeholders)
    asserts, bad = dict[int, tuple[Assert, ...]](), list[str]()
    for row in file.rows:
        found, problems = read_asserts(row.fields.get(ASSERT) or [])
        bad += [f"{row.place}: {problem}" for problem in problems]
        if found:
            asserts[row.number] = tuple(found)
    if bad:
        listed = bullet_list(bad, limit=SHOWN_ROWS)
        raise LoratuneError(f"{file.name}: {counted(len(bad), 'assert')} cannot be checked:\n{listed}", Exit.DATA)
    return EvaluationRows(file, asserts)


def _open_yaml(name: str) -> RowFile:
    """Return the rows of a YAML file: a list, or an object that holds one list, such as `tests`."""
    path = Path(name)
    try:
        document = read_yaml(read_plain_text(path))
    except FileNotFoundError as error:
        raise unreadable(name, error) from error
    except (OSError, ValueError) as error:
        raise LoratuneError(f"{name}: cannot be read: {reason_of(error)}", Exit.DATA) from error
    if document.problems:
        listed = bullet_list([f"line {line}: {problem}" for line, problem in document.problems])
        raise LoratuneError(f"{name}:\n{listed}", Exit.DATA)
    values = document.values
    lists = [inner for inner in values.values() if isinstance(inner, list)] if isinstance(values, dict) else [values]
    if len(lists) != 1 or not isinstance(lists[0], list) or not lists[0]:
        raise LoratuneError(f"{name}: holds no list of rows, such as 'tests:' and a row behind each dash", Exit.DATA)

    def rows() -> Iterator[Row]:
        return (Row(value, number) for number, value in enumerate(lists[0], start=1))

    def fingerprint() -> str:
        return file_sha256(path)

    return RowFile(name, rows, fingerprint)


def unscored(tests: EvaluationRows) -> list[int]:
    """Return the numbers of the rows with neither an expected answer nor asserts."""
    return [row.number for row in tests.rows if row.reference is None and row.number not in tests.asserts]


def question_of(row: AskedRow) -> str:
    """Return the last question of a row."""
    return next((str(turn["content"]) for turn in reversed(row.messages) if turn["role"] == "user"), "")
