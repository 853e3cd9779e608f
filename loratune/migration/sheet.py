"""The account of a translation: each setting is taken over, changed in meaning, not taken, or not needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune.printable import shortened
from loratune.recipe.sections import Recipe, iterate_settings

Rule = Callable[["Sheet", Mapping[str, Any]], None]
"""Translates one group of settings: name → value of those that are given or have a default there."""
SETTINGS = dict(iterate_settings())
OF_METHODS = ("lora", "freeze")
"""Sections that only the method of this name uses."""
MOST = 10**15
"""Whole numbers above are no setting."""


@dataclass(frozen=True)
class Context:
    """What a translation depends on beside the settings of the config."""

    folder: Path = Path()
    """The folder of the config."""
    program: str = ""
    """The program of a shell command."""
    devices: int | None = None
    """Number of devices that the tool trained on; None if unknown."""
    dataset_info: Path | None = None
    """LLaMA-Factory's descriptions of data sets, where they are not where it looks."""


@dataclass(frozen=True)
class Entry:
    """What becomes of settings of a config that belong together."""

    names: tuple[str, ...]
    """As the file spells them; empty for a default of the tool."""
    value: str
    """Their values in the file."""
    setting: str = ""
    """Setting of the recipe; empty if there is none."""
    reason: str = ""
    """How the meaning has changed, or why nothing is taken."""
    defaults: tuple[str, ...] = ()
    """Names that belong to them and that the file leaves out, so that the tool's defaults count."""


@dataclass
class Sheet:
    """A recipe in the making, and what became of each setting of the config."""

    tool: str
    known: Mapping[str, Any] = field(default_factory=dict)
    """Name → value of everything that is given or has a default."""
    context: Context = field(default_factory=Context)
    recipe: dict[str, Any] = field(default_factory=dict)
    """Dotted setting → value."""
    comments: dict[str, list[str]] = field(default_factory=dict)
    """Dotted setting → how its meaning has changed."""
    taken: list[Entry] = field(default_factory=list)
    changed: list[Entry] = field(default_factory=list)
    lost: list[Entry] = field(default_factory=list)
    """What changes the result and is not taken."""
    unneeded: list[Entry] = field(default_factory=list)
    """What is not taken and does not change the result."""
    _names: tuple[str, ...] = ()
    _value: str = ""
    _defaults: tuple[str, ...] = ()
    _is_asked: bool = False

    @contextmanager
    def of(self, given: Mapping[str, Any], is_asked: bool = True, defaults: tuple[str, ...] = ()) -> Iterator[None]:
        """Account for some settings: what the block reports is about them, and without a report nothing changes.

        An error of the block about a value, such as a text where a number belongs, is a loss.

        Args:
            given: name, as the file spells it → value.
            is_asked: whether somebody has chosen the values; a tool's dump holds its defaults too.
            defaults: names beside them that are not given and have a default.
        """
        self._is_asked = is_asked and bool(given)
        self._defaults = defaults if given else ()
        self._names, self._value = tuple(given), ", ".join(shortened(str(value), 60) for value in given.values())
        before = self._count()
        try:
            yield
        except ValueError as error:
            self.lose(str(error))
        except (TypeError, AttributeError):
            self.lose(f"its value is of a kind that {self.tool} does not take")
        if self._count() == before and given:
            self.taken.append(self._entry("", "as in loratune"))
        self._names, self._value, self._defaults = (), "", ()

    def take(self, setting: str, value: Any) -> None:
        """Give a setting of the recipe its value; one that the recipe would refuse is lost."""
        if self._is_put(setting, value) and (self._names or value != SETTINGS[setting].get_default()):
            self.taken.append(self._entry(setting, "" if self._names else f"the default of {self.tool}"))

    def change(self, setting: str, value: Any, how: str) -> None:
        """Give a setting a value that does not mean the same here; `how` becomes its comment in the recipe."""
        if self._is_put(setting, value):
            self.note(how, setting)

    def _is_put(self, setting: str, value: Any) -> bool:
        """Put a value into the recipe, unless the method of training makes no use of it, or the recipe refuses it."""
        section, method = setting.partition(".")[0], self.recipe.get("method", "lora")
        if section in OF_METHODS and section != method:
            if self._names:
                self.skip(f"method {method} makes no use of it")
            return False
        if problem := problem_of(setting, value):
            self.fail(f"{setting}: {problem}")
            return False
        self.recipe[setting] = value
        return True

    def note(self, how: str, setting: str = "") -> None:
        """Record a change in meaning, of a setting or of the run as a whole."""
        self.changed.append(self._entry(setting, how))
        if setting:
            self.comments.setdefault(setting, []).append(how)

    def lose(self, reason: str) -> None:
        """Record that the settings are not taken and that the result is another without them.

        A default of the tool that loratune does not have is a change in meaning, because nobody asked for it.
        """
        (self.lost if self._is_asked else self.changed).append(self._entry("", reason))

    def fail(self, reason: str) -> None:
        """Record a loss that is one even where nothing is given, such as the method of training."""
        self.lost.append(self._entry("", reason))

    def skip(self, reason: str) -> None:
        """Record that the settings are not taken and that the result is the same without them."""
        self.unneeded.append(self._entry("", reason))

    def _entry(self, setting: str, reason: str) -> Entry:
        return Entry(self._names, self._value, setting, reason, self._defaults)

    def _count(self) -> int:
        return sum(map(len, (self.taken, self.changed, self.lost, self.unneeded)))


def problem_of(setting: str, value: Any) -> str:
    """Return why the recipe would refuse a value of a setting; empty if it takes it."""
    section, _, name = setting.rpartition(".")
    kind: Any = Recipe.model_fields[section].annotation if section else Recipe
    try:
        kind.model_validate({name: value})
    except ValidationError as error:
        found = [detail for detail in error.errors() if detail["loc"][:1] == (name,)]
        return f"{found[0]['msg']}; got {shortened(repr(value), 60)}" if found else ""
    return ""


def number(value: Any) -> float:
    """Return a value as a number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{shortened(repr(value), 60)} is not a number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{shortened(repr(value), 60)} is not a number")
    return found


def whole(value: Any) -> int:
    """Return a value as a whole number.

    Raises:
        ValueError: it is none.
    """
    found = number(value)
    if found != int(found) or abs(found) > MOST:
        raise ValueError(f"{shortened(repr(value), 60)} is not a whole number")
    return int(found)


def truth(value: Any) -> bool:
    """Return whether a switch is on; YAML 1.1 has more words for it than loratune's recipes.

    Raises:
        ValueError: it is neither on nor off.
    """
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    found = words.get(str(value).lower())
    if found is None:
        raise ValueError(f"{shortened(repr(value), 60)} is neither true nor false")
    return found


def is_off(value: Any) -> bool:
    """Return whether a value means that something is not used."""
    if isinstance(value, dict | list):
        return not value
    return str(value).lower() in ("none", "null", "false", "no", "off", "0", "0.0", "")


def texts(value: Any) -> list[str]:
    """Return names that are written as a list, or in one text with commas."""
    values = value if isinstance(value, list) else str(value).split(",")
    return [str(one).strip() for one in values if str(one).strip()]
