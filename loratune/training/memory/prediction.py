"""What a process of a run holds in memory, term by term, at the moments when it may hold most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import TypedDict

from loratune import console

LOADING, STEP = "loading the base", "a step's largest pass"
UPDATE, ANSWERS = "the optimizer's update", "the closing questions"
"""Moments at which a run may hold most."""
KEPT, LOGITS, WORKSPACE = "kept activations", "logits", "workspace"
WEIGHTS = "weights: "
ADAPTER, GRADIENTS, OPTIMIZER = "adapter", "gradients", "optimizer"
GATHERED, CACHE, STATES = "gathered layers", "key-value cache", "recurrent states"
FILES, FREED = "pages of the base's files", "freed blocks kept for reuse"
FRAGMENTS, CONTEXT = "fragmentation", "CUDA context"
PROCESS, FIRST_USE = "interpreter and libraries", "what libraries take at their first use"


class PredictionValues(TypedDict):
    """The memory of one device, or of one process on a CPU."""

    peak_bytes: int
    moment: str
    """When most is held."""
    terms: dict[str, int]
    """What is held then: name → bytes, whose sum is the peak."""
    moments: dict[str, dict[str, int]]
    """Moment → what is held then, without the base and what every moment has."""
    keeps_freed: bool
    """Whether freed blocks are kept for reuse, which is faster; on a CPU with room for it."""
    device: str
    """cpu or cuda."""
    processes: int
    tokens_per_pass: int
    """Of the largest pass, with what fills it up."""
    gradient_checkpointing: bool
    notes: list[str]
    """What was assumed."""


@dataclass(frozen=True)
class Prediction:
    """The memory of one device, or of one process on a CPU, in bytes."""

    weights: Mapping[str, int]
    """Group of the base's weights → bytes."""
    beside: Mapping[str, int]
    """What else is held all the time."""
    moments: Mapping[str, Mapping[str, int]]
    """Moment → what is held then in addition."""
    tokens: int
    """Of the largest pass, with what fills it up."""
    gradient_checkpointing: bool
    processes: int = 1
    device: str = "cpu"
    """cpu or cuda."""
    keeps_freed: bool = False
    """Whether freed blocks are kept for reuse, which is faster; on a CPU with room for it."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed."""

    @property
    def moment(self) -> str:
        """When most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def terms(self) -> dict[str, int]:
        """Return what is held at that moment: name → bytes, whose sum is the peak."""
        weights = {f"{WEIGHTS}{name}": size for name, size in self.weights.items()}
        found = {**weights, **self.beside, **self.moments[self.moment]}
        return {name: size for name, size in found.items() if size}

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def between_passes(self) -> int:
        """Bytes from which a process that keeps freed blocks returns them between two passes."""
        return self.peak_bytes - self.moments.get(STEP, {}).get(FREED, 0) // 2

    @property
    def counted_bytes(self) -> int:
        """Of the peak, what a report's peak counts: on a GPU, what torch allocates."""
        return sum(size for name, size in self.terms.items() if name not in (CONTEXT, FRAGMENTS))

    def __str__(self) -> str:
        return f"{console.memory(self.peak_bytes)} expected at the peak, in {self.moment}"

    def values(self) -> PredictionValues:
        """In JSON types."""
        return {
            "peak_bytes": self.peak_bytes,
            "moment": self.moment,
            "terms": self.terms,
            "moments": {name: dict(terms) for name, terms in self.moments.items()},
            "keeps_freed": self.keeps_freed,
            "device": self.device,
            "processes": self.processes,
            "tokens_per_pass": self.tokens,
            "gradient_checkpointing": self.gradient_checkpointing,
            "notes": list(self.notes),
        }

    @property
    def parts(self) -> dict[str, int]:
        """Return the terms for a sentence: those of the base, and those of AdamW, as one."""
        terms = self.terms
        base = sum(size for name, size in terms.items() if name.startswith(WEIGHTS))
        trained = terms.pop(GRADIENTS, 0) + terms.pop(OPTIMIZER, 0)
        rest = {name: size for name, size in terms.items() if not name.startswith(WEIGHTS) and name != ADAPTER}
        return {"base": base, ADAPTER: terms.get(ADAPTER, 0), "gradients and optimizer": trained, **rest}
