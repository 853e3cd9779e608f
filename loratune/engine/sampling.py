"""Declares every sampling setting once; flags, `/set`, the API's fields and the page's inputs follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from loratune.errors import Exit, LoratuneError

ALMOST_ZERO = 1e-4
"""Lower temperatures use greedy decoding, because dividing by them would overflow float32."""
SEEDS = 2**32
"""Number of seeds: torch's CPU generator uses only 32 bits."""

Temperature = Annotated[float, Field(ge=0, le=5)]
TopP = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=2**20)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.1, le=10)]
MaxNewTokens = Annotated[int, Field(ge=1, le=2**20)]
Seed = Annotated[int, Field(ge=0, le=SEEDS - 1)]
MODELS_OWN = "the model's own"
UNSET = {"seed": "another one each time"}
"""Description of an unset value; MODELS_OWN for all others."""


class Sampling(BaseModel):
    """Sampling settings of an answer. None uses the value of the model's generation_config."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    temperature: Temperature = 0.0
    """Divisor of the logits: higher is more random, 0 is greedy decoding."""
    top_p: TopP | None = None
    """Sample from the most likely tokens with this total probability; 1 disables it."""
    top_k: TopK | None = None
    """Sample from this many most likely tokens; 0 disables it."""
    min_p: MinP | None = None
    """Minimum probability of a token, relative to the most likely one."""
    repetition_penalty: RepetitionPenalty | None = None
    """Values above 1 reduce repetition of tokens (Keskar et al. 2019, CTRL); 1 disables it."""
    max_new_tokens: MaxNewTokens = 512
    """Maximum number of generated tokens."""
    stop: tuple[str, ...] = ()
    """Stop before this text; repeatable."""
    seed: Seed | None = None
    """Seed for reproducible sampling, independent of concurrent requests."""

    def but(self, **changes: Any) -> Sampling:
        """Return a copy with other values, without validation: a context may leave room for 0 tokens."""
        return self.model_copy(update=changes)

    def with_defaults(self, config: Any) -> Sampling:
        """Return a copy with all unset values resolved.

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
    """A numeric setting: its range and description."""

    name: str
    kind: type[int] | type[float]
    low: float
    high: float
    default: float | None
    unset: str
    """Description of None; empty if a value is required."""
    about: str

    @property
    def range(self) -> str:
        """The inclusive range as text: `0 to 5`."""
        return f"{self.low:,g} to {self.high:,.10g}"

    def read(self, text: str, called: str = "") -> int | float:
        """Parse and validate a value.

        Args:
            text: the text as typed.
            called: the user's name of the setting, for errors; the setting's own if empty.

        Raises:
            LoratuneError: the text is not a number, or out of range.
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
    """Derive the numeric settings from pydantic's JSON schema: a number, or a number and null."""
    for name, described in Sampling.model_json_schema()["properties"].items():
        number = described["anyOf"][0] if "anyOf" in described else described
        kind = {"number": float, "integer": int}.get(number["type"])
        if kind is not None:
            unset = "" if number is described else UNSET.get(name, MODELS_OWN)
            about = " ".join(described["description"].split())
            yield NumberSetting(name, kind, number["minimum"], number["maximum"], described["default"], unset, about)


NUMBERS = {setting.name: setting for setting in _number_settings()}
