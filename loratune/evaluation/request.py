"""The request of an evaluation: the two models, how they are loaded, and all inputs that determine the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.data.encoding.encoder import Encoder
from loratune.engine.sampling import Sampling
from loratune.evaluation.bounds import Bounds
from loratune.evaluation.general import ANSWER_TOKENS
from loratune.evaluation.judge import Judge
from loratune.evaluation.rows_file import EvaluationRows
from loratune.generation.batch.answer_header import About
from loratune.generation.batch.request import RowsRequest, encoder_of, everything_asked
from loratune.generation.batch.row_answers import BASE, Side
from loratune.generation.general_texts import ASSETS
from loratune.model.files import find_base
from loratune.runs.folder import file_sha256
from loratune.runs.opening import AdapterSource, base_settings

TUNED, AGAINST = "tuned", "against"


@dataclass(frozen=True)
class EvaluationRequest:
    """A tests file, the adapter to evaluate, and the settings."""

    tests: str
    output: Path
    adapter: Path
    against: Path | None
    """Another adapter as the baseline; None for the base."""
    model: str | None
    """Where the base lies now; None for the recorded place."""
    sampling: Sampling
    general: bool
    """Whether to look for what was forgotten."""
    bounds: Bounds
    decide_by: str | None
    """Name of the measure that decides about the rows; None for the first that some row has."""
    judge: Judge | None
    junit: bool
    overwrite: bool
    force: bool


@dataclass(frozen=True)
class Loading:
    """A base with adapters, and the sides that it answers for."""

    adapters: tuple[tuple[str, Path], ...]
    model: str | None
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Contest:
    """The two models."""

    tuned: Side
    baseline: Side
    sources: tuple[AdapterSource, ...]
    """Of the tuned model and, if it is an adapter, of the baseline."""
    loadings: tuple[Loading, ...]
    """One if both have the same base, which is loaded once."""

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.tuned, self.baseline

    @property
    def named(self) -> dict[str, Side]:
        """The sides, by their names in the result."""
        return {"tuned": self.tuned, "baseline": self.baseline}


def plan(request: EvaluationRequest, sources: Sequence[AdapterSource]) -> Contest:
    """Decide how the two models are loaded."""
    tuned = Side("", TUNED, use_adapter=True)
    own = ((TUNED, request.adapter),)
    if request.against is None:
        baseline = Side(BASE, TUNED, use_adapter=False)
        return Contest(tuned, baseline, tuple(sources), (Loading(own, request.model, (tuned, baseline)),))
    baseline = Side(AGAINST, AGAINST, use_adapter=True)
    other = ((AGAINST, request.against),)
    if _have_one_base(sources, request.model):
        together = Loading((*own, *other), request.model, (tuned, baseline))
        return Contest(tuned, baseline, tuple(sources), (together,))
    apart = Loading(own, request.model, (tuned,)), Loading(other, None, (baseline,))
    return Contest(tuned, baseline, tuple(sources), apart)


def _have_one_base(sources: Sequence[AdapterSource], model: str | None) -> bool:
    """Return whether two adapters were trained on the same base, held in memory in the same way."""
    settings = [base_settings(source, model) for source in sources]
    if len({one.quantization for one in settings}) > 1:
        return False
    recorded = [source.manifest.base.hashes if source.manifest and source.manifest.base else {} for source in sources]
    if all(recorded):
        return recorded[0] == recorded[1]
    return len({find_base(one).resolve() for one in settings}) == 1


def inputs_of(request: EvaluationRequest, contest: Contest, tests: EvaluationRows) -> About:
    """Return everything that the results depend on; asserts and bounds can change without new answers."""
    asked = [
        everything_asked(asking, source, tests.file)
        for asking, source in zip(_rows_requests(request, contest), contest.sources, strict=True)
    ]
    references = json.dumps([row.reference for row in tests.rows]).encode()
    about = {**asked[0], "rows": hashlib.sha256(references).hexdigest(), "general": _general_sha256()}
    for name in ("model", "adapter", "prompt"):
        about[f"{name} of the baseline"] = asked[-1][name] if request.against else None
    return about


def encoders_of(request: EvaluationRequest, contest: Contest) -> dict[str, Encoder]:
    """Return the encoder of each side, by the side's name."""
    encoders = [
        encoder_of(asking, source)
        for asking, source in zip(_rows_requests(request, contest), contest.sources, strict=True)
    ]
    return {contest.tuned.name: encoders[0], contest.baseline.name: encoders[-1]}


def _rows_requests(request: EvaluationRequest, contest: Contest) -> list[RowsRequest]:
    """Return a request to answer the rows for each adapter."""
    adapters = [(TUNED, request.adapter, request.model), (AGAINST, request.against, contest.loadings[-1].model)]
    return [
        RowsRequest(
            input=request.tests,
            output=request.output,
            adapter=(name, adapter),
            model=model,
            no_adapter=True,
            metrics=True,
            system=None,
            sampling=request.sampling,
            overwrite=request.overwrite,
            force=request.force,
        )
        for name, adapter, model in adapters
        if adapter is not None
    ]


def _general_sha256() -> str:
    """Hash the bundled texts, and how they are asked."""
    files = {path.name: file_sha256(path) for path in sorted(ASSETS.iterdir())}
    return hashlib.sha256(json.dumps([files, ANSWER_TOKENS]).encode()).hexdigest()


def settings_of(request: EvaluationRequest, tests: EvaluationRows) -> dict[str, Any]:
    """Return what the comparison depends on besides the results."""
    return {
        "tests": tests.file.sha256,
        "general_text": request.general,
        "bounds": vars(request.bounds),
        "decide_by": request.decide_by,
        "judge": vars(request.judge) if request.judge else None,
    }
