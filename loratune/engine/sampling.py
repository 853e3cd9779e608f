"""The sampling settings, each declared once: flags, `/set`, the API's fields and the page's inputs follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from loratune.errors import Exit, LoratuneError

ALMOST_ZERO = 1e-4
"""Temperatures below take the likeliest token: a division by them would leave the range of float32."""
SEEDS = 2**32
"""How many a user can choose from: torch's generator on a CPU reads no more than 32 bits."""

Temperature = Annotated[float, Field(ge=0, le=5)]
TopP = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=2**20)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.1, le=10)]
MaxNewTokens = Annotated[int, Field(ge=1, le=2**20)]
Seed = Annotated[int, Field(ge=0, le=SEEDS - 1)]
MODELS_OWN = "the model's own"
UNSET = {"seed": "another one each time"}
"""What a setting is that nobody has given; MODELS_OWN for the others."""


class Sampling(BaseModel):
    """How an answer is drawn. None leaves a setting to the model's own generation_config."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    temperature: Temperature = 0.0
    """Randomness: the logits are divided by it; 0 takes the likeliest token every time."""
    top_p: TopP | None = None
    """Draw from the likeliest tokens that together have this probability; 1 takes all."""
    top_k: TopK | None = None
    """Draw from this many of the likeliest tokens; 0 takes all."""
    min_p: MinP | None = None
    """Draw from tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: RepetitionPenalty | None = None
    """Above 1 makes tokens of prompt and answer less likely to come again (Keskar et al. 2019, CTRL); 1 is none."""
    max_new_tokens: MaxNewTokens = 512
    """Longest answer, in tokens."""
    stop: tuple[str, ...] = ()
    """End the answer before this text; may be given again."""
    seed: Seed | None = None
    """Make drawing repeatable, whatever else is drawn at the same time."""

    def but(self, **changes: Any) -> Sampling:
        """The same with other values, which are not checked: a context may leave room for no token."""
        return self.model_copy(update=changes)

    def with_defaults(self, config: Any) -> Sampling:
        """The same with everything said.

        Args:
            config: the model's GenerationConfig.
        """

        def known(name: str, otherwise: float) -> Any:
            own, model_s = getattr(self, name), getattr(config, name, None)
            return own if own is not None else model_s if model_s is not None else otherwise

        return self.but(
            temperature=self.temperature if self.temperature >= ALMOST_ZERO else 0.0,
            top_p=known("top_p", 1.0),
            top_k=known("top_k", 0),
            min_p=known("min_p", 0.0),
            repetition_penalty=known("repetition_penalty", 1.0),
        )


@dataclass(frozen=True)
class NumberSetting:
    """A setting that is one number: its range, and what is said of it."""

    name: str
    kind: type[int] | type[float]
    low: float
    high: float
    default: float | None
    unset: str
    """What None means; empty where there must be a value."""
    about: str

    @property
    def range(self) -> str:
        """Both ends, which belong to it: `0 to 5`."""
        return f"{self.low:,g} to {self.high:,.10g}"

    def read(self, text: str, called: str = "") -> int | float:
        """The value that a text gives.

        Args:
            text: as it was typed.
            called: how the user spells the setting; its name if empty.

        Raises:
            LoratuneError: it is no such number, or out of range.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = self.kind(self.low) - 1
        if self.low <= value <= self.high:
            return value
        noun = "an integer" if self.kind is int else "a number"
        either = ", or default" if self.unset and not called else ""
        raise LoratuneError(f"{called or self.name} is {noun} from {self.range}{either}, not {text!r}", Exit.USAGE)


def _number_settings() -> Iterator[NumberSetting]:
    """From what pydantic itself makes of the declarations: a number, or a number and null."""
    for name, described in Sampling.model_json_schema()["properties"].items():
        number = described["anyOf"][0] if "anyOf" in described else described
        kind = {"number": float, "integer": int}.get(number["type"])
        if kind is not None:
            unset = "" if number is described else UNSET.get(name, MODELS_OWN)
            about = " ".join(described["description"].split())
            yield NumberSetting(name, kind, number["minimum"], number["maximum"], described["default"], unset, about)


NUMBERS = {setting.name: setting for setting in _number_settings()}
