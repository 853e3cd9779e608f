"""The checks in the order in which they run: what each measures, what it may take, and which bounds hold."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Figures = Mapping[str, Any]
"""Name → number or text, in JSON types. A check that cannot measure a figure on this machine leaves it out."""
RELATIONS = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}


@dataclass(frozen=True)
class Workplace:
    """Where a check runs."""

    folder: Path
    """For models, rows and runs; checks share it."""
    is_gpu: bool
    """Whether torch can use a GPU. Without one a check takes small models."""


@dataclass(frozen=True)
class Bound:
    """What a figure has to be."""

    figure: str
    relation: Literal["≤", "≥", "="]
    value: float
    on: Literal["gpu", "cpu", "both"] = "both"
    """The machines on which it is required."""

    def is_required(self, is_gpu: bool) -> bool:
        return self.on in ("both", "gpu" if is_gpu else "cpu")

    def holds(self, figures: Figures) -> bool:
        """Whether the figure is there and within the bound; NaN never is."""
        found = figures.get(self.figure)
        return isinstance(found, int | float) and bool(RELATIONS[self.relation](found, self.value))

    def told(self, figures: Figures) -> str:
        """The figure beside its bound."""
        found = figures.get(self.figure)
        value = f"{found:.4g}" if isinstance(found, int | float) else "missing"
        return f"{self.figure} {value} {self.relation} {self.value:g}"


@dataclass(frozen=True)
class Check:
    """One row of the acceptance plan."""

    name: str
    function: str
    """`module:function` in this package, from a Workplace to Figures."""
    seconds: int
    """Limit of its process."""
    needs_gpu: bool
    bounds: tuple[Bound, ...]


def on_gpu(figure: str, relation: Literal["≤", "≥", "="], value: float) -> Bound:
    """A bound that means something on a GPU alone."""
    return Bound(figure, relation, value, "gpu")


FLASH = 1
"""torch's number of the flash attention back end."""
CHECKS = (
    Check("environment", "environment:environment", 60, False, (on_gpu("attention back end", "=", FLASH),)),
    Check(
        "kernels",
        "kernels:kernels",
        180,
        False,
        (
            Bound("float32 error", "≤", 1e-5),
            Bound("bfloat16 error / plain", "≤", 1.2),
            on_gpu("float16 error / plain", "≤", 1.2),
            Bound("nf4 error / plain", "≤", 1.2),
            Bound("error of dA and dB", "≤", 3e-3),
        ),
    ),
    Check(
        "whole_step",
        "whole_step:whole_step",
        90,
        False,
        (Bound("bfloat16 difference", "≤", 1e-2), Bound("float32 difference", "≤", 1e-4)),
    ),
    Check(
        "end_to_end",
        "end_to_end:end_to_end",
        300,
        False,
        (
            Bound("wrong exit codes", "=", 0),
            Bound("last loss / first", "≤", 0.9),
            Bound("resumed adapter differs by", "=", 0),
        ),
    ),
    Check(
        "matrix",
        "matrix:matrix",
        300,
        False,
        (Bound("failed settings", "=", 0), Bound("largest deviation of a loss", "≤", 0.01)),
    ),
    Check(
        "step_profile",
        "step_profile:step_profile",
        150,
        True,
        (on_gpu("launches", "≤", 6000), on_gpu("waits", "≤", 2), on_gpu("GPU busy", "≥", 0.95)),
    ),
    Check(
        "training_speed",
        "training_speed:training_speed",
        480,
        True,
        (
            on_gpu("short rows: ratio to TRL", "≥", 3),
            on_gpu("long rows: ratio to TRL", "≥", 1.5),
            on_gpu("long rows: MFU", "≥", 0.45),
            on_gpu("long rows: p95 / p50", "≤", 1.3),
        ),
    ),
    Check(
        "other_types",
        "training_speed:other_types",
        240,
        True,
        (on_gpu("nf4 / bfloat16 speed", "≥", 0.8), on_gpu("float16 loss deviation", "≤", 0.01)),
    ),
    Check(
        "pass_memory",
        "pass_memory:pass_memory",
        150,
        False,
        (on_gpu("lowest estimate / measured", "≥", 1.0), on_gpu("highest estimate / measured", "≤", 1.25)),
    ),
    Check(
        "small_card",
        "small_card:small_card",
        240,
        True,
        (on_gpu("failed commands", "=", 0), on_gpu("largest fragmentation", "≤", 0.1)),
    ),
    Check(
        "out_of_memory",
        "out_of_memory:out_of_memory",
        180,
        True,
        (on_gpu("unexplained failures", "=", 0), on_gpu("answered afterwards", "=", 8)),
    ),
    Check(
        "decoding",
        "decoding:decoding",
        300,
        False,
        (
            Bound("equal tokens, tiny-qwen in float32", "≥", 0.99),
            on_gpu("equal tokens, 7B", "≥", 0.99),
            on_gpu("1 stream: ratio to generate", "≥", 1.2),
            on_gpu("32 streams: ratio to generate", "≥", 3),
            on_gpu("copies per step", "≤", 4),
            on_gpu("1 stream: p95 / p50", "≤", 1.5),
        ),
    ),
    Check(
        "cache_memory",
        "cache_memory:cache_memory",
        120,
        True,
        (on_gpu("reserved / written", "≤", 1.3), on_gpu("peak / promised", "≤", 1.0)),
    ),
    Check(
        "merge",
        "merge:merge",
        180,
        False,
        (
            Bound("wrong exit codes", "=", 0),
            on_gpu("longest merge, seconds", "≤", 30),
            Bound("difference of the proofs' KL", "≤", 1e-6),
            on_gpu("proof on the GPU / on the CPU, time", "≤", 1),
        ),
    ),
    Check(
        "launchers",
        "launchers:launchers",
        150,
        False,
        (Bound("largest difference of a loss", "≤", 1e-6), Bound("wrong exit codes", "=", 0)),
    ),
    Check(
        "sharding",
        "sharding:sharding",
        120,
        False,
        # Rounding of sums of up to 512 numbers; units are two layers, embedding, decoder and head.
        (Bound("largest error", "≤", 1e-5), Bound("fewest units", "≥", 5)),
    ),
    Check(
        "families",
        "families:families",
        300,
        False,
        (
            Bound("leaking", "=", 0),
            Bound("blind controls", "=", 0),
            # Rounding, which models so narrow and random amplify up to 300 times.
            Bound("float32 error", "≤", 1e-4),
            Bound("packed beside padded", "≤", 1e-4),
            # As many roundings as PEFT's, but other ones; one of a router's logits may send a token elsewhere.
            Bound("error / plain", "≤", 2),
        ),
    ),
    Check(
        "nf4_mixture",
        "nf4_mixture:nf4_mixture",
        240,
        False,
        (
            # 4 bits, a scale of 8 bits for 64 values, and one of 32 bits for 256 scales: 4.127 of 16.
            Bound("stack bytes / bfloat16", "≤", 0.262),
            # What the allocator rounds up to 512 bytes, of which the smallest scales take 1,536.
            on_gpu("allocated / counted", "≤", 1.05),
            Bound("float32 error", "≤", 1e-4),
            Bound("bfloat16 error / plain", "≤", 1.5),
        ),
    ),
    Check(
        "slots",
        "slots:slots",
        180,
        False,
        (Bound("lowest share of equal tokens", "≥", 0.99), Bound("without slots", "=", 0)),
    ),
    Check(
        "hybrid_run",
        "hybrid_run:hybrid_run",
        300,
        False,
        (
            Bound("wrong exit codes", "=", 0),
            Bound("highest last loss / first", "≤", 0.95),
            # The proof computes in float32, one layer at a time.
            Bound("highest mean KL of a proof", "≤", 1e-5),
        ),
    ),
    Check(
        "family_speed",
        "family_speed:family_speed",
        480,
        True,
        (
            # Without kernels for recurrent layers, rows of 50 to 1,000 tokens are up to five batches, each with its own
            # kernels; TRL pads all of them to the longest, and computes activations twice.
            on_gpu("hybrid: ratio to TRL", "≥", 1.2),
            on_gpu("mixture: ratio to TRL", "≥", 1.5),
            # TRL has the logits of a padded batch at once: 8 GB of 248,320 columns in float32.
            on_gpu("hybrid: memory / TRL", "≤", 0.8),
            on_gpu("mixture: memory / TRL", "≤", 0.8),
        ),
    ),
    Check(
        "doctor",
        "doctor:doctor",
        600,
        False,
        (
            Bound("broken", "=", 0),
            # Products and bitsandbytes on a GPU; a CPU has no products of its own to compare.
            Bound("trials that compute", "≥", 1, "cpu"),
            on_gpu("trials that compute", "≥", 2),
            Bound("wrong sums", "=", 0),
            Bound("crashes found", "=", 1),
            Bound("broken beside the crash", "=", 0),
        ),
    ),
)
