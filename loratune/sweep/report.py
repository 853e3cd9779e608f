"""sweep.json: what a sweep has tried and found. It is typed, and written here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

from loratune.choices import BestOf
from loratune.runs.typed_json import WRITTEN_BESIDE
from loratune.writing import PROGRAM, write_json

SWEEP_REPORT, KIND = "sweep.json", "sweep"
SWEEP_VERSION = 1
NATS, BITS = "nats per token", "bits per byte"
"""Units of losses; bytes of the answers, which are the same for every base, as tokens are not."""
TrialState = Literal["finished", "stopped", "waiting", "diverged", "failed"]
SweepState = Literal["running", "interrupted", "out of budget", "finished"]


@dataclass(frozen=True)
class TrialReport:
    """One trial, or its repetition with another seed."""

    name: str
    """Of its run folder in `trials`."""
    settings: Mapping[str, Any]
    """Dotted setting → value."""
    state: TrialState
    """stopped: left behind at a rung; waiting: it has not been trained as far as it may be."""
    repeats: str | None = None
    """Name of the trial with the same settings."""
    seed: int | None = None
    """Of a repetition."""
    loss: float | None = None
    """Validation loss at its last rung."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Step of each rung → validation loss there."""
    exact: float | None = None
    """Share of exact validation answers at its last rung."""
    exacts: Mapping[str, float] = field(default_factory=dict)
    """Step of each rung → that share there, where it was counted."""
    forgetting: Mapping[str, float] | None = None
    """Language → rise of the loss of general text; None before the end of the run, and if it was not measured."""
    step: int = 0
    steps: int = 0
    """Of its whole run."""
    seconds: float | None = None
    """Of training."""
    peak_memory_bytes: int | None = None
    trained_parameters: int | None = None
    adapter_bytes: int | None = None
    message: str | None = None
    """Why it has failed."""


@dataclass(frozen=True)
class Standing:
    """A trial that was repeated with other seeds, or the best one."""

    name: str
    settings: Mapping[str, Any]
    loss: float
    """Mean over the seeds."""
    seeds: int
    deviation: float | None
    """Standard deviation of the loss over the seeds; None for a single one."""
    exact: float | None = None
    """Share of exact answers, mean over the seeds."""
    exact_deviation: float | None = None


@dataclass(frozen=True)
class Noise:
    """How much trials differ by the seed alone."""

    deviation: float
    """Pooled over the settings that were repeated."""
    degrees: int
    """Degrees of freedom."""
    least_difference: float
    """Two single trials differ by more than this in 5 of 100 cases if only their seeds do."""
    of: BestOf = "loss"
    """What differs: the losses, or the shares of exact answers."""


@dataclass(frozen=True)
class SweepReport:
    """What a sweep's report says."""

    output: str
    base: str
    over: Mapping[str, Any]
    """Dotted setting → values, or the two ends of a range as text: 1e-05..0.001."""
    sampler: str
    shares: tuple[float, ...]
    """Of a run's steps, for each rung."""
    unit: str = NATS
    """Of losses and forgetting."""
    state: SweepState = "running"
    sentence: str | None = None
    """What the sweep has found."""
    ranked_by: BestOf | None = None
    """What says how good the best trial is."""
    best: Standing | None = None
    repeated: tuple[Standing, ...] = ()
    """The best trials over all seeds, the best one first."""
    noise: Noise | None = None
    """Of what the trials are ranked by."""
    seconds_per_step: float | None = None
    """Mean over all trials."""
    trials: tuple[TrialReport, ...] = ()
    """In order of the table: the best first, then the furthest, and among these the lowest loss."""
    program: str = PROGRAM
    kind: str = KIND

    def values(self) -> dict[str, Any]:
        """In JSON types, in the file's layout."""
        return {"format_version": SWEEP_VERSION, **asdict(self)}


class SweepFile(TypedDict):
    """sweep.json of a sweep."""

    format_version: int
    report: Annotated[SweepReport, WRITTEN_BESIDE]


def write_sweep_report(folder: Path, report: SweepReport) -> None:
    """Replace a sweep's report."""
    write_json(folder / SWEEP_REPORT, report.values())
