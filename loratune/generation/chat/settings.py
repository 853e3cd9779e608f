"""What `/set` changes: the sampling settings, in the ranges of the flags of the same names."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass, replace
from typing import Any

from loratune.engine.sampling import Sampling
from loratune.errors import Exit, LoratuneError

UNSET = "default"


@dataclass(frozen=True)
class Setting:
    """A number with its range."""

    kind: type[int] | type[float]
    low: float
    high: float
    unset: str = ""
    """What it means to say nothing; empty where something must be said."""

    def read(self, name: str, text: str) -> int | float | None:
        """The value that a text gives.

        Raises:
            LoratuneError: it is no such number, or out of range.
        """
        if self.unset and text == UNSET:
            return None
        try:
            value = self.kind(text)
        except ValueError:
            value = self.kind(self.low) - 1
        if self.low <= value <= self.high:
            return value
        noun = "an integer" if self.kind is int else "a number"
        either = f", or {UNSET}" if self.unset else ""
        raise LoratuneError(
            f"{name} is {noun} from {self.low:,g} to {self.high:,.10g}{either}, not {text!r}", Exit.USAGE
        )


MODEL_S = "what the model's own settings say"
SETTINGS = {
    "temperature": Setting(float, 0, 5),
    "top_p": Setting(float, 0.01, 1, MODEL_S),
    "top_k": Setting(int, 0, 1_000_000, MODEL_S),
    "min_p": Setting(float, 0, 1, MODEL_S),
    "repetition_penalty": Setting(float, 0.1, 10, MODEL_S),
    "max_new_tokens": Setting(int, 1, 1_048_576),
    "seed": Setting(int, 0, 2**32 - 1, "another one each time"),
}
NAMES = [*SETTINGS, "stop"]


def changed(sampling: Sampling, said: str) -> Sampling:
    """The settings with some changed.

    Args:
        sampling: as they are.
        said: such as `temperature=0.2 stop="Human: "`; several stop texts are given one by one, `\\n` in them is a new
            line.

    Raises:
        LoratuneError: a name is unknown, or a value cannot be.
    """
    lexer = shlex.shlex(said, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise LoratuneError(f"/set: {str(error).lower()}; write name=value", Exit.USAGE) from error
    changes: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        name = name.replace("-", "_")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
            raise LoratuneError(f"/set: no setting {name!r}; {hint}", Exit.USAGE)
        if not sign:
            raise LoratuneError(f"/set: write {name}=value, without spaces", Exit.USAGE)
        if name == "stop":
            text = value.replace("\\n", "\n")
            changes["stop"] = (*changes.get("stop", ()), *([text] if text else []))
        else:
            changes[name] = SETTINGS[name].read(name, value)
    return replace(sampling, **changes)


def rows_of(sampling: Sampling) -> list[tuple[str, str]]:
    """All settings by name, with their values for people."""
    rows = []
    for name, setting in SETTINGS.items():
        value = getattr(sampling, name)
        rows.append((name, f"{UNSET} ({setting.unset})" if value is None else str(value)))
    return [*rows, ("stop", ", ".join(map(repr, sampling.stop)) or "none")]
