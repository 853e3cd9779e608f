"""The asserts of test rows, in promptfoo's vocabulary: what an answer has to hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import regex

from loratune.extras import required
from loratune.printable import shortened

KEYS = ("type", "value", "within")
NEGATION = "not-"
REGEX_SECONDS = 2.0
"""Time limit of an expression on one answer."""
NUMBER = regex.compile(r"(?:(?<!\w)[-+−])?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
"""The hyphen of 3-5 is no sign."""
EXCERPT = 60


@dataclass(frozen=True)
class Said:
    """An answer, as asserts see it."""

    text: str
    """Without reasoning and tool calls."""
    calls: tuple[dict[str, Any], ...] = ()
    """`name` and `arguments` of each tool call."""


class UndecidedError(Exception):
    """A schema cannot be applied."""


@dataclass(frozen=True)
class Assert:
    kind: str
    """One of KINDS."""
    value: Any = None
    within: float = 0.0
    """Of number: the allowed difference."""
    is_negated: bool = False

    @property
    def title(self) -> str:
        """The assert in words."""
        value = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        beside = f" ± {self.within:g}" if self.within else ""
        shown = "" if self.value is None else f" {shortened(value, EXCERPT)}{beside}"
        return f"{NEGATION * self.is_negated}{self.kind}{shown}"

    def holds(self, said: Said) -> bool:
        """Return whether an answer fulfils it; one that cannot be decided counts as not fulfilled, negated or not."""
        try:
            return KINDS[self.kind].holds(self, said) != self.is_negated
        except (TimeoutError, UndecidedError):
            return False


@dataclass(frozen=True)
class Kind:
    """One type of assert."""

    problem: Callable[[Any], str]
    """What is wrong with a value; empty if nothing is."""
    holds: Callable[[Assert, Said], bool]


def read_asserts(values: Any) -> tuple[list[Assert], list[str]]:
    """Parse the asserts of a row.

    Args:
        values: an assert, or a list of them.

    Returns:
        The asserts, and what is wrong with others.
    """
    asserts, problems = [], []
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        problem = _problem(value)
        if problem:
            problems.append(f"assert {number}: {problem}")
            continue
        kind = value["type"].removeprefix(NEGATION)
        is_negated = value["type"] != kind
        asserts.append(Assert(kind, value.get("value"), float(value.get("within", 0)), is_negated))
    return asserts, problems


def _problem(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return "is not an object with a 'type'"
    kind = value["type"].removeprefix(NEGATION)
    if kind not in KINDS:
        return f"no type {shortened(kind)!r}; there are {', '.join(KINDS)}, each also as {NEGATION}…"
    unknown = [key for key in value if key not in KEYS or (key == "within" and kind != "number")]
    if unknown:
        return f"{kind} takes no {shortened(str(unknown[0]))!r}"
    within = value.get("within", 0)
    if not (_is_number(within) and within >= 0):
        return "'within' is not a number from 0 up"
    return KINDS[kind].problem(value.get("value"))


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number that float holds."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value else "'value' is not a text"


def _texts(value: Any) -> str:
    is_list = isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)
    return "" if is_list else "'value' is not a list of texts"


def _number(value: Any) -> str:
    return "" if _is_number(value) else "'value' is not a number"


def _expression(value: Any) -> str:
    if problem := _text(value):
        return problem
    try:
        regex.compile(value)
    except (regex.error, RecursionError, OverflowError) as error:
        return f"{shortened(value)!r} is not a regular expression: {error}"
    return ""


def _schema(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict | bool):
        return "'value' is not a JSON schema"
    with required("the assert is-json", "eval"):
        import jsonschema
    if isinstance(value, dict) and not isinstance(value.get("$schema", ""), str):
        return "'value' is not a JSON schema: its $schema is not a text"
    try:
        jsonschema.validators.validator_for(value).check_schema(value)  # type: ignore[arg-type]
    except jsonschema.SchemaError as error:
        return f"'value' is not a JSON schema: {error.message}"
    return ""


def _calls(value: Any) -> str:
    calls = value if isinstance(value, list) else [value]
    fits = all(isinstance(one, dict) and isinstance(one.get("name"), str) and set(one) <= {"name", "arguments"}
               for one in calls)  # fmt: skip
    return "" if fits else "'value' is not a call, with 'name' and 'arguments', or a list of calls"


def _has_number(one: Assert, said: Said) -> bool:
    """Whether the last number of the text is the wanted one."""
    found = NUMBER.findall(said.text)
    return bool(found) and abs(float(found[-1].replace(",", "").replace("−", "-")) - one.value) <= one.within


def _fits_schema(one: Assert, said: Said) -> bool:
    try:
        value = json.loads(said.text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    if one.value is None:
        return True
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind = jsonschema.validators.validator_for(one.value)
    try:
        return bool(kind(one.value, registry=Registry()).is_valid(value))  # an empty registry fetches no reference
    except OverflowError:  # multipleOf cannot divide 1e400
        return False
    except (Unresolvable, RecursionError) as error:
        raise UndecidedError from error


def _refuse(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(name)


def _has_calls(one: Assert, said: Said) -> bool:
    """Whether the calls are the wanted ones, in their order, and no others."""
    wanted = one.value if isinstance(one.value, list) else [one.value]
    return [dict(call) for call in said.calls] == [{"arguments": {}, **call} for call in wanted]


KINDS = {
    "equals": Kind(_text, lambda one, said: said.text.strip() == one.value.strip()),
    "contains": Kind(_text, lambda one, said: one.value in said.text),
    "icontains": Kind(_text, lambda one, said: one.value.casefold() in said.text.casefold()),
    "contains-any": Kind(_texts, lambda one, said: any(text in said.text for text in one.value)),
    "contains-all": Kind(_texts, lambda one, said: all(text in said.text for text in one.value)),
    "starts-with": Kind(_text, lambda one, said: said.text.lstrip().startswith(one.value)),
    "regex": Kind(_expression, lambda one, said: regex.search(one.value, said.text, timeout=REGEX_SECONDS) is not None),
    "number": Kind(_number, _has_number),
    "is-json": Kind(_schema, _fits_schema),
    "tool-call": Kind(_calls, _has_calls),
}
"""Type of an assert → what it takes and means."""
