"""The settings of a sweep, which a recipe may hold under `sweep`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from loratune.recipe.section import Section

SWEEP = "sweep"
"""Name of the section."""
_UNITS = {"h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(\d+(\.\d+)?[hms])+")


def seconds_of(duration: str) -> float:
    """Return the seconds of a duration such as `1h30m`."""
    return sum(float(part[:-1]) * _UNITS[part[-1]] for part in re.findall(r"[\d.]+[hms]", duration))


def _is_duration(text: str) -> str:
    if not _DURATION.fullmatch(text) or not seconds_of(text):
        raise ValueError("write hours, minutes or seconds, such as 2h, 90m or 1h30m")
    return text


class SweepSettings(Section):
    """What a sweep varies, and how it chooses and compares the trials."""

    over: dict[str, Any] = Field(min_length=1)
    """Setting → values to try, such as lora.rank=8,32, or a range: training.learning_rate=1e-5..1e-3."""
    sampler: Literal["grid", "random", "tpe"] | None = None
    """How trials are chosen: grid, random, or tpe (by the results so far); default is grid, and tpe for a range."""
    trials: int | None = Field(default=None, ge=1, le=1000)
    """Number of trials of random and tpe; default is 16."""
    halving: bool | None = None
    """Train all for a part of the steps, and only the best third on; default is yes from 4 trials, but not for tpe."""
    seeds: int = Field(default=3, ge=1, le=20)
    """Seeds to train the best two with, so that a difference can be told from chance; 1 repeats none."""
    budget: Annotated[str, AfterValidator(_is_duration)] | None = None
    """Time for one command, such as 2h: no trial starts that would not end in it."""
