"""The bundled passages and instructions in English and Chinese, by which a model shows what it has forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune.engine.engine import Engine
from loratune.engine.types import Divergence
from loratune.generation.batch.questions import AskedRow
from loratune.plain_files import read_json
from loratune.progress import counted_progress

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "general"
INSTRUCTIONS = "instructions.json"


@dataclass(frozen=True)
class Passage:
    number: int
    language: str
    text: str


@dataclass(frozen=True)
class Instruction:
    language: str
    row: AskedRow


def load_passages() -> list[Passage]:
    """Return the bundled passages, numbered from 1."""
    known: list[dict[str, str]] = read_json(ASSETS / "passages.json")
    return [Passage(number, one["language"], one["text"]) for number, one in enumerate(known, start=1)]


def load_instructions() -> list[Instruction]:
    """Return the bundled instructions, as rows numbered from 1."""
    known: list[dict[str, str]] = read_json(ASSETS / INSTRUCTIONS)
    return [
        Instruction(
            one["language"],
            AskedRow(
                number,
                f"{INSTRUCTIONS} row {number}",
                dict(one),
                ({"role": "user", "content": one["instruction"]},),
                None,
            ),
        )
        for number, one in enumerate(known, start=1)
    ]


def read_passages(engine: Engine, adapter: str, passages: Sequence[Passage]) -> Iterator[tuple[Passage, Divergence]]:
    """Yield passages with the losses of an adapter and of its base on them.

    Args:
        engine: the loaded model.
        adapter: name of the adapter.
        passages: the passages to read.
    """
    with counted_progress("passages read", len(passages)) as show:
        for count, passage in enumerate(passages, start=1):
            yield passage, engine.divergence(passage.text, adapter)
            show(count, "")
