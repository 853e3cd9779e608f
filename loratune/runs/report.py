"""report.json: what happened in a finished run. It is typed, and read and written here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler
from typing_extensions import TypedDict

from loratune.choices import BestOf
from loratune.runs.folder import REPORT
from loratune.runs.model_check import ModelCheck
from loratune.runs.typed_json import WRITTEN_BESIDE, read_typed
from loratune.writing import write_json

REPORT_VERSION = 1


@dataclass(frozen=True)
class RowCounts:
    """How many rows each split had."""

    training: int = 0
    validation: int = 0


@dataclass(frozen=True)
class Losses:
    """Nats per answer token."""

    first: float
    """Of the first logged steps."""
    last: float


@dataclass(frozen=True)
class ValidationLosses:
    """Nats per answer token."""

    before: float
    """Of the untrained adapter."""
    after: float
    """Of the adapter that was kept."""
    best: float | None
    """The lowest after a step."""
    best_step: int | None
    adapter_step: int
    """Whose weights the adapter has."""


@dataclass(frozen=True)
class ExactAnswers:
    """Shares of the validation answers that greedy decoding gives token for token."""

    answers: int
    """How many were judged."""
    before: float | None
    """Of the untrained adapter."""
    after: float
    """Of the adapter that was kept."""
    best: float
    """The largest after a step, where several are equal that with the lowest loss."""
    best_step: int


@dataclass(frozen=True)
class AdapterGroup:
    """What an adapter has on the modules of one role."""

    modules: int
    """Of experts, parameters with the matrices of a layer."""
    parameters: int


@dataclass(frozen=True)
class AdapterCounts:
    """What has been trained, and what it takes of memory."""

    trainable_parameters: int
    total_parameters: int
    """Of base and adapter."""
    modules: Mapping[str, int]
    """Name of a target → how many modules of that name have an adapter."""
    base_bytes: int
    adapter_bytes: int
    groups: Mapping[str, AdapterGroup] = field(default_factory=dict)
    """Role of modules, such as attention → what the adapter has on them."""
    left_out: tuple[str, ...] = ()
    """Linear modules without an adapter, with the reason."""


@dataclass(frozen=True)
class QuantizationEffect:
    """How the predictions of the quantised base differ from those of the base in 16 bits, on some rows."""

    tokens: int
    mean_kl: float
    """nats per token, from 16 bits."""
    top1_agreement: float
    """Share of the tokens after which both predict the same token."""


@dataclass(frozen=True)
class Updates:
    """How much the adapter changes the modules of one name."""

    modules: int
    median: float
    """‖ΔW‖ / ‖W‖ in Frobenius norms."""
    largest: float
    unchanged: tuple[str, ...]
    """Modules whose update is exactly nothing."""
    not_finite: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """One question and what was answered."""

    question: str
    expected: str
    base: str
    """The first tokens of it."""
    adapter: str
    has_changed: bool
    ended: bool | None
    """Whether the adapter's answer came to an end; None where it was not waited for."""
    cut_short: bool = False
    """Whether time was up before both answers were as long as they were to be."""
    base_ended: bool | None = None
    """Whether the base's answer came to an end by itself; None where an earlier version did not say."""


COUNTS = ("changed", "judged", "ended", "cut_short")
"""What is counted of answers, and written with them."""


@dataclass(frozen=True)
class Answers:
    """All questions that were asked."""

    told: tuple[Told, ...]

    @property
    def changed(self) -> int:
        """How many are answered differently."""
        return sum(one.has_changed for one in self.told)

    @property
    def judged(self) -> int:
        """How many could be seen to end."""
        return sum(one.ended is not None for one in self.told)

    @property
    def ended(self) -> int:
        """How many of those ended by themselves."""
        return sum(one.ended is True for one in self.told)

    @property
    def cut_short(self) -> int:
        """How many would have gone on, had there been time."""
        return sum(one.cut_short for one in self.told)

    def values(self) -> dict[str, Any]:
        """In JSON types, with the counts, which a reader of the file would else have to make."""
        return {name: getattr(self, name) for name in COUNTS} | asdict(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        counts = {name: {"type": "integer", "description": getattr(cls, name).__doc__} for name in COUNTS}
        return schema | {
            "properties": counts | schema["properties"],
            "required": [*COUNTS, *schema["required"]],
        }


@dataclass(frozen=True)
class ExpertUse:
    """How many experts the training's tokens reached, over all layers."""

    used: int
    all: int


@dataclass(frozen=True)
class Health:
    """What has become of the adapter."""

    updates: Mapping[str, Updates] = field(default_factory=dict)
    """Target name → how much its modules change."""
    without_gradient: tuple[str, ...] = ()
    """Adapted modules that no gradient has reached in the first step of the process."""
    answers: Answers | None = None
    """What it says to some questions; None if they could not be asked."""
    sentences: tuple[str, ...] = ()
    """What stands out, each with what to do."""
    expert_use: ExpertUse | None = None
    """Of a mixture of experts."""


@dataclass(frozen=True)
class Report:
    """What a run's report says; None stands for what could not be told, or for what an earlier version did not tell."""

    output: str
    base: str
    steps: int
    epochs: float
    state: str = "finished"
    stopped_early: bool = False
    rows: RowCounts = field(default_factory=RowCounts)
    loss: Losses | None = None
    validation_loss: ValidationLosses | None = None
    exact_answers: ExactAnswers | None = None
    best_by: BestOf | None = None
    """What the best validation was chosen by; None without validations."""
    seconds: float | None = None
    tokens: int | None = None
    """Without padding."""
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    predicted_memory_bytes: int | None = None
    """The peak that was expected before the first step."""
    predicted_memory: Mapping[str, int] | None = None
    """Term → bytes of that peak; on a GPU, with what the peak does not count."""
    gradient_checkpointing: bool | None = None
    start_up_seconds: Mapping[str, float] | None = None
    """Stage → how long it took."""
    adapter: AdapterCounts | None = None
    base_groups: Mapping[str, int] | None = None
    """Group of the base's weights → bytes."""
    quantization: QuantizationEffect | None = None
    """None for a base that is not quantised, and if the comparison would have taken too long."""
    versions: Mapping[str, str] | None = None
    """Library → version."""
    checks: tuple[ModelCheck, ...] = ()
    """What was measured on the model before the first step."""
    health: Health | None = None
    warnings: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """In JSON types, in the file's layout."""
        values = {"format_version": REPORT_VERSION, **asdict(self)}
        if self.health and self.health.answers:
            values["health"]["answers"] = self.health.answers.values()
        return values


class ReportFile(TypedDict):
    """report.json of a run."""

    format_version: int
    report: Annotated[Report, WRITTEN_BESIDE]


def write_report(run: Path, report: Report) -> None:
    """Replace a run's report."""
    write_json(run / REPORT, report.values())


def read_report(run: Path) -> Report:
    """What a run's report says; keys that this version does not know are left out.

    Raises:
        LoratuneError: it is missing, damaged, or written by a later version of loratune.
    """
    return read_typed(Report, run / REPORT, REPORT_VERSION)
