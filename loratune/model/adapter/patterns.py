"""Resolves names and regular expressions in an adapter's config to module names, within a time limit.

PEFT evaluates expressions with `re`, which cannot be interrupted, and some run practically forever. Here they are
evaluated with a time limit, and PEFT gets the resulting names.
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
"""For all expressions of a config together; usual ones take milliseconds."""
ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"
"""PEFT's target_modules of an adapter without LoRA layers."""
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")
Patterns = Mapping[str, Mapping[str, Any]]
"""Setting → name or expression → number."""
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")


class _Matcher:
    """Matches names and expressions against modules, until the time limit."""

    def __init__(self, base: Mapping[str, Sequence[int]], place: Path) -> None:
        self.modules = modules_of(base)
        self.adaptable = [*self.modules, *stacks_of(base)]
        self._place = place
        self._end = time.monotonic() + SECONDS

    def matching(self, key: str, expression: str, texts: Sequence[str]) -> list[Any]:
        """Return the result of `fullmatch` for each text.

        Raises:
            LoratuneError: the expression is invalid, or takes too long.
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
        """Return the modules and stacks that a key of rank_pattern or alpha_pattern selects: those ending with it."""
        if NAME.fullmatch(pattern):
            return [name for name in self.adaptable if _ends_in(name, {pattern})]
        found = self.matching(key, rf"(.*\.)?({pattern})", self.adaptable)
        return [name for name, match in zip(self.adaptable, found, strict=True) if match]

    def named(self, key: str, given: Any) -> Any:
        """Resolve an expression of target_modules or exclude_modules to names; lists of names stay unchanged."""
        if not isinstance(given, str):
            return given
        return [
            name for name, match in zip(self.modules, self.matching(key, given, self.modules), strict=True) if match
        ]

    def _where(self, key: str, expression: str) -> str:
        short = expression if len(expression) <= 80 else f"{expression[:80]}…"
        return f"{self._place / CONFIG_FILE}: {key}: the expression {short!r}"


def settle_patterns(values: dict[str, Any], base: Mapping[str, Sequence[int]], place: Path) -> dict[str, Any]:
    """Return an adapter's config with module names in place of expressions.

    Args:
        values: result of `read_config_values`.
        base: parameter name → shape, of the base.
        place: the adapter's folder, for messages.

    Returns:
        A copy in which `rank_pattern` and `alpha_pattern` map module names to numbers, and the other settings are names
        or lists of names.

    Raises:
        LoratuneError: an expression is invalid, or takes too long.
    """
    matcher, settled = _Matcher(base, place), dict(values)
    for key in ("target_modules", "exclude_modules"):
        settled[key] = values[key] if values.get(key) == NO_TARGETS else matcher.named(key, values.get(key))
    if str(values.get("target_modules")).lower() == ALL_LINEAR:  # PEFT ignores case, too
        matrices = (name for name in matcher.modules if len(base.get(f"{name}.weight", ())) == 2)
        left_out = vocabulary_of(base).modules
        settled["target_modules"] = [name for name in matrices if name not in left_out]
    select = _selected_from_one_list if _is_before_0_14(values) else _selected
    settled |= select(matcher, {key: values.get(key) or {} for key in PATTERN_KEYS})
    layers = _as_list(values.get("layers_pattern"))
    if not all(map(NAME.fullmatch, layers)):
        settled["layers_pattern"] = _layer_lists(matcher, layers)
    return settled


def _selected(matcher: _Matcher, patterns: Patterns) -> Patterns:
    """Return the numbers of rank_pattern and alpha_pattern by module; the first pattern that fits wins."""
    found: dict[str, dict[str, Any]] = {key: {} for key in patterns}
    for key, numbers in patterns.items():
        for pattern, number in numbers.items():
            for name in matcher.ending_in(key, pattern):
                found[key].setdefault(name, number)
    return found


def _selected_from_one_list(matcher: _Matcher, patterns: Patterns) -> Patterns:
    """Return what `_selected` does, as PEFT before 0.14 found it.

    It took one pattern per module from those of both settings, so a pattern for ranks hides those for alphas. A pattern
    began after a dot, unless it was the whole name, and its alternatives were no group.
    """
    first: dict[str, str] = {}
    for key, numbers in patterns.items():
        for pattern in numbers:
            found = matcher.matching(key, rf"(?:.*\.{pattern}$).*", matcher.adaptable)
            for name, match in zip(matcher.adaptable, found, strict=True):
                if match:
                    first.setdefault(name, pattern)
    taken = [(name, first.get(name, name)) for name in matcher.adaptable]
    return {key: {name: numbers[one] for name, one in taken if one in numbers} for key, numbers in patterns.items()}


def with_current_patterns(values: dict[str, Any], base: Mapping[str, Sequence[int]], place: Path) -> dict[str, Any]:
    """Return a config whose rank_pattern and alpha_pattern mean the same to every version of PEFT.

    Args:
        values, base, place: see `settle_patterns`; of the base, the adapted modules suffice.

    Raises:
        LoratuneError: see `settle_patterns`.
    """
    if not _is_before_0_14(values) or not any(values.get(key) for key in PATTERN_KEYS):
        return values
    settled = settle_patterns(values, base, place)
    return values | {key: settled[key] for key in PATTERN_KEYS}


def _is_before_0_14(values: Mapping[str, Any]) -> bool:
    """Return whether PEFT wrote a config before 0.14: with every setting that it had, and without exclude_modules."""
    return "layers_pattern" in values and "exclude_modules" not in values


def modules_of(base: Iterable[str]) -> list[str]:
    """Return the names of the modules that have parameters."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in base))


def stacks_of(base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the names of the parameters with several matrices, such as those of experts."""
    return [name for name, shape in base.items() if len(shape) == 3 and not name.endswith(".weight")]


def targeted_stacks(settled: Mapping[str, Any], base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the parameters with several matrices to which a config applies LoRA.

    Args:
        settled: result of `settle_patterns`.
        base: parameter name → shape, of the base.
    """
    wanted = set(_as_list(settled.get("target_parameters")))
    return [name for name in stacks_of(base) if _ends_in(name, wanted)]


def unmatched_stacks(settled: Mapping[str, Any], base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a problem for each entry of target_parameters that is no stack of matrices of the base."""
    found = targeted_stacks(settled, base)
    wanted = _as_list(settled.get("target_parameters"))
    return [
        f"target_parameters names {one}, and the base has no parameter of this name with several matrices"
        for one in wanted
        if not any(_ends_in(name, {one}) for name in found)
    ]


def targeted(settled: dict[str, Any], base: Iterable[str]) -> list[str]:
    """Return the modules to which a config applies LoRA.

    Args:
        settled: result of `settle_patterns`.
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
    """Convert numbers per module to PEFT's form: for each number, one expression of alternatives."""
    names = defaultdict(list)
    for name, number in by_module.items():
        names[number].append(re.escape(name))
    return {f"(?:{'|'.join(alternatives)})": number for number, alternatives in names.items()}


def _layer_lists(matcher: _Matcher, patterns: list[str]) -> list[str]:
    """Return the names of the layer lists that expressions select."""
    lists = [match["list"] for name in matcher.modules if (match := re.match(r"(?P<list>.*?)\.\d+\.", name))]
    names = list(dict.fromkeys(lists))
    found = []
    for pattern in patterns:
        matches = matcher.matching("layers_pattern", rf"(?:.*?\.)?({pattern})", names)
        found += [name for name, match in zip(names, matches, strict=True) if match]
    return list(dict.fromkeys(found)) or ["-"]  # an empty list would match all


def _is_in_layers(name: str, settled: dict[str, Any]) -> bool:
    """Return whether a module is in one of the config's layers, if it restricts them."""
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
    """Return whether a module's name, or a suffix of it, is in the set."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in endings for start in range(len(parts)))


def _as_list(given: Any) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)
