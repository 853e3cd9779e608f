"""What a sweep varies: values or a range for each setting, checked as flags are before anything starts."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.recipe.effects import OF_SEVERAL_PROCESSES, TOLD_OR_KEPT, is_among
from loratune.recipe.flag_values import parse_flag
from loratune.recipe.loading import with_settings
from loratune.recipe.method_sections import METHOD, METHOD_SECTIONS
from loratune.recipe.names import current_name
from loratune.recipe.sections import Recipe, iterate_settings
from loratune.recipe.suggestions import suggestion
from loratune.recipe.yaml_reader import read_yaml

MOST_TRIALS = 1000
LOG_RATIO = 10
"""Ends of a range that are this far apart are sampled on a logarithmic scale."""
DIGITS = 3
"""Significant digits of a sampled number."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_OTHER_BASE = "a base is named by model.base alone, of which losses are compared per byte"
NOT_SWEPT = {
    "seed": "the best two are trained with other seeds anyway: --seeds",
    "data.seed": "losses on other validation rows cannot be compared",
    "checkpoints.best_by": "it says which trial is better",
    "data.validation": "losses on other validation rows cannot be compared",
    "model.hub": _OTHER_BASE,
    "model.revision": _OTHER_BASE,
}
"""Setting → why a sweep cannot vary it."""

Settings = Mapping[str, Any]
"""Dotted setting → value."""


@dataclass(frozen=True)
class Choices:
    """The values of a setting, in the order in which they were given."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """All numbers between two ends, which belong to it."""

    low: float
    high: float
    is_whole: bool

    @property
    def is_log(self) -> bool:
        """Whether it is sampled on a logarithmic scale."""
        return self.low > 0 and self.high / self.low >= LOG_RATIO

    def rounded(self, number: float) -> float:
        """Return a sampled number as the recipe gets it."""
        if self.is_whole:
            return int(number)
        return float(min(max(float(f"{number:.{DIGITS}g}"), self.low), self.high))


Axis = Choices | Range
Space = Mapping[str, Axis]
"""Dotted setting → what it may be."""


def space_of(over: Mapping[str, Any], recipe: Recipe) -> Space:
    """Parse what a sweep varies, and validate each value in the recipe.

    Args:
        over: setting → text as typed after `--over setting=`, or values of a recipe file.
        recipe: the recipe without the sweep.

    Raises:
        LoratuneError: lists all problems, one a line.
    """
    fields, space, problems = dict(iterate_settings()), dict[str, Axis](), list[str]()
    for name, given in over.items():
        setting = current_name(name) or name
        try:
            if setting not in fields:
                raise ValueError(f"no such setting{suggestion(setting, fields)}")
            if reason := _why_not(setting):
                raise ValueError(f"cannot be swept: {reason}")
            if setting in space:
                raise ValueError("is given twice")
            space[setting] = _axis(given, fields[setting])
        except ValueError as error:
            problems.append(f"--over {name}: {error}")
    problems += [f"--over {problem}" for problem in _problems_of_values(space, recipe)]
    if problems:
        raise LoratuneError("\n".join(problems), Exit.USAGE)
    return space


def _why_not(setting: str) -> str | None:
    """Return why a sweep cannot vary a setting; None if it can."""
    if is_among(setting, TOLD_OR_KEPT):
        return "it is of what is told and kept of a run, and acts on nothing that trials are compared by"
    if is_among(setting, OF_SEVERAL_PROCESSES):
        return "a trial trains in one process, where it does not act"
    return NOT_SWEPT.get(setting)


def _axis(given: Any, field: Any) -> Axis:
    if isinstance(given, str) and (ends := _RANGE.fullmatch(given.strip())):
        low, high = (read_yaml(end).values for end in ends.groups())
        if low >= high:
            raise ValueError(f"{given}: the first end of a range must be the lower one")
        is_whole = isinstance(low, int) and isinstance(high, int) and field.annotation in (int, int | None)
        return Range(low, high, is_whole)
    values = [_parsed(text, field) for text in _split(given)] if isinstance(given, str) else _listed(given)
    if not values:
        raise ValueError("needs values")
    if repeated := {text_of(value) for value in values if sum(value == other for other in values) > 1}:
        raise ValueError(f"has a value twice: {', '.join(sorted(repeated))}")
    return Choices(tuple(values))


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _split(text: str) -> list[str]:
    """Split at commas that are not in brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _parsed(text: str, field: Any) -> Any:
    if not text.startswith(("[", "{")):
        return parse_flag(text, field)
    document = read_yaml(text)
    if document.problems:
        raise ValueError(f"cannot read {text!r}")
    return document.values


def _problems_of_values(space: Space, recipe: Recipe) -> list[str]:
    problems = dict[str, None]()  # several settings may show the same one
    for settings in single_values(space):
        try:
            with_settings(recipe, settings)
        except LoratuneError as error:
            for problem in error.message.splitlines():
                named = problem.removeprefix("--")
                problems[named if named != problem else f"{described(settings)}: {problem}"] = None
    return list(problems)


def single_values(space: Space) -> list[Settings]:
    """Return every value by itself, and the ends of ranges; a method, and what is of use to it alone, together."""
    found = list[Settings]()
    for setting, axis in space.items():
        for value in _some_values(axis):
            method = value if setting == METHOD else setting.partition(".")[0]
            is_of_method = METHOD in space and method in _some_values(space[METHOD])
            own = [name for name in space if name.startswith(f"{method}.")] if is_of_method else []
            together = {METHOD: method} if is_of_method else {}
            found.append({**together, **{name: _some_values(space[name])[0] for name in own}, setting: value})
    return found


def _some_values(axis: Axis) -> tuple[Any, ...]:
    """Return the values of an axis, or the ends of a range."""
    return axis.values if isinstance(axis, Choices) else (axis.rounded(axis.low), axis.rounded(axis.high))


def of_use(settings: Settings) -> Settings:
    """Return settings without those that their method makes no use of."""
    unused = [f"{section}." for section in METHOD_SECTIONS if section != settings.get(METHOD, section)]
    return {name: value for name, value in settings.items() if not name.startswith(tuple(unused))}


def grid(space: Space) -> list[Settings]:
    """Return every combination of the values that are of use to its method; the last setting changes first.

    Raises:
        LoratuneError: there are too many.
    """
    axes = [axis.values for axis in space.values() if isinstance(axis, Choices)]
    count = math.prod(map(len, axes))
    if count > MOST_TRIALS:
        raise LoratuneError(
            f"the grid has {counted(count, 'trial')}, {MOST_TRIALS:,} are the most; take fewer values, or --sampler "
            "random",
            Exit.USAGE,
        )
    found = list[Settings]()
    for values in itertools.product(*axes):
        settings = of_use(dict(zip(space, values, strict=True)))
        if len(settings) == len(space) or settings not in found:
            found.append(settings)
    return found


def require_valid(settings: Sequence[Settings], recipe: Recipe) -> None:
    """Check that settings that are valid by themselves are so together.

    Raises:
        LoratuneError: lists the combinations that are not.
    """
    problems = []
    for chosen in settings:
        try:
            with_settings(recipe, chosen)
        except LoratuneError as error:
            problems.append(f"{described(chosen)}: {error.message}")
    if problems:
        raise LoratuneError(f"the sweep cannot start:\n{bullet_list(problems)}", Exit.USAGE)


def written(axis: Axis) -> Any:
    """Return what a recipe file says of a setting that varies."""
    return f"{axis.low}..{axis.high}" if isinstance(axis, Range) else list(axis.values)


def stored(value: Any) -> Any:
    """Return a value as Optuna stores it: as it is, or a list or mapping as JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def text_of(value: Any) -> str:
    """Return a value for tables and names: 0.0002, true, attention+mlp."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "+".join(map(text_of, value))
    if isinstance(value, dict):
        return "+".join(f"{name}:{text_of(inner)}" for name, inner in value.items())
    return str(value)


def short_names(settings: Sequence[str]) -> dict[str, str]:
    """Return dotted setting → its last part, or the whole name where two settings end alike."""
    ends = [setting.rpartition(".")[2] for setting in settings]
    return {name: end if ends.count(end) == 1 else name for name, end in zip(settings, ends, strict=True)}


def described(settings: Settings, between: str = ", ") -> str:
    """Return settings for a line: `learning_rate 0.0002, rank 8`."""
    names = short_names(list(settings))
    return between.join(f"{names[setting]} {text_of(value)}" for setting, value in settings.items())


def folder_name(number: int, settings: Settings) -> str:
    """Return the name of a trial's folder, such as `03-learning_rate-0.0002-rank-8`."""
    names = short_names(list(settings))
    words = (f"{names[setting]}-{text_of(value)}" for setting, value in settings.items())
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join([f"{number:02d}", *words]))[:80].rstrip("-.")
