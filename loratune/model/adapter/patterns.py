"""Which modules an adapter's config means: its names and expressions, settled within bounds before PEFT looks.

PEFT evaluates expressions with `re`, which nothing can interrupt, and some keep it busy for years. Here they are
evaluated within a time limit, and PEFT gets the names that they have found.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import regex

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.files import CONFIG_FILE, NAME
from loratune.model.architecture.vocabulary import vocabulary_of

SECONDS = 5.0
"""For all expressions of a config together; the usual ones take milliseconds."""
ALL_LINEAR = "all-linear"
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")


class _Matcher:
    """Finds the modules that names and expressions mean, until the time is up."""

    def __init__(self, modules: Iterable[str], place: Path) -> None:
        self.modules = list(modules)
        self._place = place
        self._end = time.monotonic() + SECONDS

    def matching(self, key: str, expression: str, texts: Sequence[str]) -> list[Any]:
        """What `fullmatch` finds in each text.

        Raises:
            LoratuneError: it is no expression, or takes too long.
        """
        try:
            compiled = regex.compile(expression)
            return [compiled.fullmatch(text, timeout=max(1e-3, self._end - time.monotonic())) for text in texts]
        except (regex.error, RecursionError, OverflowError) as error:
            raise LoratuneError(f"{self._where(key, expression)} cannot be read: {error}", Exit.MODEL) from error
        except TimeoutError as error:
            raise LoratuneError(
                f"{self._where(key, expression)} takes too long: all expressions of a config together have "
                f"{SECONDS:g} s. Write names of modules instead",
                Exit.MODEL,
            ) from error

    def ending_in(self, key: str, pattern: str) -> list[str]:
        """The modules that a key of rank_pattern or alpha_pattern means: those whose name ends in it."""
        if NAME.fullmatch(pattern):
            return [name for name in self.modules if _ends_in(name, {pattern})]
        found = self.matching(key, rf"(.*\.)?({pattern})", self.modules)
        return [name for name, match in zip(self.modules, found, strict=True) if match]

    def named(self, key: str, given: Any) -> Any:
        """Names, for an expression of target_modules or exclude_modules; what holds names already stays as it is."""
        if not isinstance(given, str):
            return given
        return [
            name for name, match in zip(self.modules, self.matching(key, given, self.modules), strict=True) if match
        ]

    def _where(self, key: str, expression: str) -> str:
        short = expression if len(expression) <= 80 else f"{expression[:80]}…"
        return f"{self._place / CONFIG_FILE}: {key}: the expression {short!r}"


def settle_patterns(values: dict[str, Any], base: Mapping[str, Sequence[int]], place: Path) -> dict[str, Any]:
    """An adapter's config with names of modules in place of expressions.

    Args:
        values: from `read_config_values`.
        base: name of each parameter of the base → its shape.
        place: the adapter's folder, for messages.

    Returns:
        A copy whose `rank_pattern` and `alpha_pattern` are name of a module → number, and whose other settings hold
        plain names or lists of them.

    Raises:
        LoratuneError: an expression cannot be read, or takes too long.
    """
    matcher, settled = _Matcher(modules_of(base), place), dict(values)
    for key in ("target_modules", "exclude_modules"):
        settled[key] = matcher.named(key, values.get(key))
    if str(values.get("target_modules")).lower() == ALL_LINEAR:  # as PEFT compares it
        matrices = (name for name in matcher.modules if len(base.get(f"{name}.weight", ())) == 2)
        left_out = vocabulary_of(base).modules
        settled["target_modules"] = [name for name in matrices if name not in left_out]
    for key in ("rank_pattern", "alpha_pattern"):
        settled[key] = by_module = dict[str, Any]()
        for pattern, number in (values.get(key) or {}).items():
            for name in matcher.ending_in(key, pattern):
                by_module.setdefault(name, number)  # the first pattern that matches counts
    layers = _as_list(values.get("layers_pattern"))
    if not all(map(NAME.fullmatch, layers)):
        settled["layers_pattern"] = _layer_lists(matcher, layers)
    return settled


def modules_of(base: Iterable[str]) -> list[str]:
    """The modules that have parameters, by the names of these."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in base))


def targeted(settled: dict[str, Any], base: Iterable[str]) -> list[str]:
    """The modules that a config puts LoRA on.

    Args:
        settled: from `settle_patterns`.
        base: names of the base's parameters.
    """
    wanted, excluded = (set(_as_list(settled.get(key))) for key in ("target_modules", "exclude_modules"))
    saved = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in _as_list(settled.get("modules_to_save"))]
    return [
        name
        for name in modules_of(base)
        if not _ends_in(name, excluded)
        and not any(pattern.match(name) for pattern in saved)
        and (name in wanted or (_ends_in(name, wanted) and _is_in_layers(name, settled)))
    ]


def as_expressions(by_module: dict[str, Any]) -> dict[str, Any]:
    """Numbers of modules as PEFT takes them: one expression of plain alternatives for each number."""
    names = defaultdict(list)
    for name, number in by_module.items():
        names[number].append(re.escape(name))
    return {f"(?:{'|'.join(alternatives)})": number for number, alternatives in names.items()}


def _layer_lists(matcher: _Matcher, patterns: list[str]) -> list[str]:
    """Names of the lists that hold a model's layers, for expressions that mean them."""
    lists = [match["list"] for name in matcher.modules if (match := re.match(r"(?P<list>.*?)\.\d+\.", name))]
    names = list(dict.fromkeys(lists))
    found = []
    for pattern in patterns:
        matches = matcher.matching("layers_pattern", rf"(?:.*?\.)?({pattern})", names)
        found += [name for name, match in zip(names, matches, strict=True) if match]
    return list(dict.fromkeys(found)) or ["-"]  # an empty list would mean any


def _is_in_layers(name: str, settled: dict[str, Any]) -> bool:
    """Whether a module is in one of the layers that a config names, if it names any."""
    layers = settled.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = _as_list(settled.get("layers_pattern"))
    if not patterns:
        match = _FIRST_NUMBER.match(name)
    else:
        tried = (re.match(rf"(?:^|.*?\.){re.escape(one)}\.(?P<layer>\d+)\.", name) for one in patterns)
        match = next((one for one in tried if one), None)
    return match is not None and int(match["layer"]) in ([layers] if isinstance(layers, int) else layers)


def _ends_in(name: str, endings: Set[str]) -> bool:
    """Whether one of some names is a module's, or the last parts of it."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in endings for start in range(len(parts)))


def _as_list(given: Any) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)
