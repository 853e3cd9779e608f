"""eval.json: what an evaluation has found. It is typed, and read and written here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loratune.evaluation.statistics import Comparison, Verdict
from loratune.runs.typed_json import read_typed
from loratune.writing import PROGRAM, write_json

RESULT = "eval.json"
RESULTS = "results.jsonl"
"""Answers and losses as they arrive, from which a rerun goes on; there from the start, unlike the result."""
RESULT_VERSION = 1


@dataclass(frozen=True)
class Decision:
    """One of the things that decide whether the tuned model is worse."""

    name: str
    verdict: Verdict
    why: str
    """The figures and the bound, as a sentence."""


@dataclass(frozen=True)
class GeneralText:
    """The bundled passages of one language; losses in nats per token, as the baseline's tokenizer counts them."""

    passages: int
    tokens: int
    loss: Comparison
    kl: float
    """Mean divergence of the tuned model's predictions from its own base's, in nats per token."""
    baseline_kl: float
    """The same of the baseline; 0 for the base."""


@dataclass(frozen=True)
class ChangedAnswer:
    """An answer to a bundled instruction that differs from the baseline's in kind."""

    instruction: str
    change: str
    """`language`, `refusal` or `empty`."""
    baseline: str
    tuned: str


@dataclass(frozen=True)
class GeneralAnswers:
    """The answers to the bundled instructions."""

    asked: int
    language: int
    """Answers in another language than the baseline's."""
    refusal: int
    """Refusals where the baseline answers."""
    empty: int
    shorter: int
    """Less than half as long as the baseline's."""
    longer: int
    """More than twice as long."""
    changed: tuple[ChangedAnswer, ...] = ()


@dataclass(frozen=True)
class Form:
    """How answers to the compared rows are formed: numbers of answers."""

    answers: int
    ended: int
    """By themselves."""
    cut: int
    """By the limit of new tokens."""
    repetitive: int
    """With one phrase over and over."""
    unwanted_thinking: int
    missing_thinking: int


@dataclass(frozen=True)
class Leaks:
    """Test rows that a run was trained on, by their numbers."""

    checked: bool
    reason: str = ""
    """Why not, or what was not checked."""
    training_rows: int = 0
    same: tuple[int, ...] = ()
    """The row itself."""
    same_question: tuple[int, ...] = ()
    """Its question with another answer."""
    near: tuple[int, ...] = ()
    """A row nearly the same."""

    @property
    def rows(self) -> frozenset[int]:
        return frozenset({*self.same, *self.same_question, *self.near})


@dataclass(frozen=True)
class Judging:
    """What a judge was asked and said."""

    model: str
    judged: int
    not_judged: int
    undecided: int
    """Rows on which the judge preferred whichever answer came first, or last; they count as ties."""
    problem: str = ""
    """Why rows were not judged."""


@dataclass(frozen=True)
class Evaluation:
    """A tuned model beside a baseline, on the same rows."""

    tuned: str
    """Folder of the adapter."""
    baseline: str
    """`base`, or the folder of the other adapter."""
    base: str
    tests: str
    rows: int
    compared: int
    """Rows that the verdict is about: those that were not found in the training rows, or all if none are left."""
    decided_by: str
    """Name of the measure that decides about the rows."""
    verdict: Verdict
    sentence: str
    decisions: tuple[Decision, ...]
    measures: Mapping[str, Comparison] = field(default_factory=dict)
    """Name of a measure → its comparison on the compared rows that have it."""
    objection: str = ""
    """What other measures say where the deciding one says otherwise, in a sentence; empty if none does."""
    fallen: Mapping[str, str] = field(default_factory=dict)
    """Name of a measure that is worse without any decision that says so → by how much, and on which rows."""
    form: Mapping[str, Form] = field(default_factory=dict)
    """`tuned` and `baseline`."""
    general_text: Mapping[str, GeneralText] = field(default_factory=dict)
    """Language → its passages."""
    general_answers: GeneralAnswers | None = None
    leaks: Mapping[str, Leaks] = field(default_factory=dict)
    """`tuned`, and `baseline` if it is an adapter."""
    judge: Judging | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of all that the results depend on, and the settings of the comparison."""
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, str]:
        """What to call the tuned model and the baseline: the ends of their paths, as long as they are the same."""
        paths = Path(self.tuned).parts, Path(self.baseline).parts
        lengths = range(1, max(map(len, paths)) + 1)
        ends = [(str(Path(*paths[0][-length:])), str(Path(*paths[1][-length:]))) for length in lengths]
        return next((pair for pair in ends if pair[0] != pair[1]), ends[0])

    @property
    def is_worse(self) -> bool:
        return self.verdict == "worse"

    def values(self) -> dict[str, Any]:
        """In JSON types, in the file's layout."""
        return {"program": PROGRAM, "format_version": RESULT_VERSION, **asdict(self)}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Replace the result in an output folder."""
    write_json(folder / RESULT, evaluation.values())


def read_evaluation(folder: Path) -> Evaluation:
    """Read the result in an output folder; keys that this version does not know are left out.

    Raises:
        LoratuneError: it is missing, damaged, or written by a later version of loratune.
    """
    return read_typed(Evaluation, folder / RESULT, RESULT_VERSION)
