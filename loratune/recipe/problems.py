"""Describes pydantic's errors about a recipe by setting, with the line or the flag, and suggests names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pydantic_core import ErrorDetails

from loratune.commands import loratune
from loratune.errors import Exit, LoratuneError, Problem, bullet_list, counted
from loratune.printable import shortened
from loratune.recipe.sections import Recipe, iterate_settings
from loratune.recipe.suggestions import suggestion
from loratune.recipe.sweep_section import SWEEP

FORMS = ("text", "settings")
"""Tags of the two forms of a data.train entry, which pydantic adds to an error's location."""

NEEDED = {dotted for dotted, field in iterate_settings() if field.is_required()}
"""Settings without a default."""
RECIPE_OR_FLAGS = "give a recipe with --config: a file, or the name of a shipped one; or give what is missing as flags"


def described_problems(details: list[ErrorDetails], lines: dict[str, int], flags: set[str]) -> list[Problem]:
    """Return each problem with its place; errors for the branches of a union are merged into one."""
    messages: dict[tuple[int | None, str | None], list[str]] = {}
    for detail in details:
        line, key, message = _describe(detail, lines, flags)
        messages.setdefault((line, key), []).append(message)
    return [Problem(_joined(found), line=line, key=key) for (line, key), found in messages.items()]


def with_place(problem: Problem) -> str:
    """Return a problem as a line of a message: `line 3: training.epochs: must be …`."""
    places = (f"line {problem.line}" if problem.line else None, problem.key)
    return ": ".join([*filter(None, places), problem.message])


def refused_recipe(problems: list[Problem], path: Path | None, flags: Iterable[str]) -> LoratuneError:
    """Return the error of a recipe, whose headline says where its problems are.

    Args:
        problems: at least one.
        path: the recipe's file; None where there are flags alone.
        flags: dotted settings that are given as flags.
    """
    ordered = sorted(problems, key=lambda problem: problem.line or 0)
    count = counted(len(ordered), "problem") if len(ordered) > 1 else "a problem"
    listed = bullet_list([with_place(problem) for problem in ordered], limit=40)
    of_flags = [problem for problem in ordered if _is_flag(problem)]
    if path is None and not {*flags} >= NEEDED:
        message = f"no recipe is given, and the flags alone have {count}:\n{listed}\n{RECIPE_OR_FLAGS}"
        commands = [loratune("a first training, with the practice model", "sft", {"--config": "quickstart"})]
        return LoratuneError(message, Exit.USAGE, commands, ordered)
    if path is None or len(of_flags) == len(ordered):
        is_placed = len(ordered) == len(of_flags) == 1
        message = listed.strip() if is_placed else f"the settings have {count}:\n{listed}"
    else:
        head = f"{path}, with the settings that override it, has" if of_flags else f"{path}: the recipe has"
        message = f"{head} {count}:\n{listed}"
    placed = [one if path is None or _is_flag(one) else replace(one, file=str(path)) for one in ordered]
    return LoratuneError(message, Exit.USAGE, problems=placed)


def _is_flag(problem: Problem) -> bool:
    """Return whether a problem is one of the command line, not of the recipe's file."""
    return problem.key is not None and problem.key.startswith("--")


def _joined(messages: list[str]) -> str:
    """Join the messages about one value: `must be a valid number, or must be a valid list; got True`."""
    if len(messages) == 1:
        return messages[0]
    parts = [message.partition("; got ") for message in messages]
    value = next((value for _, got, value in parts if got), "nothing")
    return f"{', or '.join(head for head, _, _ in parts)}; got {value}"


def _describe(detail: ErrorDetails, lines: dict[str, int], flags: set[str]) -> tuple[int | None, str | None, str]:
    """Return line, setting or flag, and message of one pydantic error."""
    names = [str(part) for part in detail["loc"] if part not in FORMS]
    known = {name for name, _ in iterate_settings()} | set(Recipe.model_fields)
    line = _line(".".join(names), lines)
    while names and ".".join(names) not in known and detail["type"] != "extra_forbidden":
        names.pop()  # within a list or union: name the setting itself
    setting = ".".join(names)
    message = message_of(detail, setting)
    if setting in flags:
        return None, f"--{setting}", message
    return line or None, setting or None, message


def _line(dotted: str, lines: dict[str, int]) -> int:
    while dotted and dotted not in lines:
        dotted = dotted.rpartition(".")[0]
    return lines.get(dotted, 0)


def message_of(detail: ErrorDetails, setting: str) -> str:
    """Return what is wrong with a setting's value, and the value."""
    value = shortened(repr(detail.get("input")))
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden" if setting == SWEEP:
            return "a recipe trains once; loratune sweep reads the section: run that, or leave the section out"
        case "extra_forbidden":
            is_section = isinstance(detail.get("input"), dict) and "." not in setting
            known = Recipe.model_fields if is_section else (name for name, _ in iterate_settings())
            return f"no such setting{suggestion(setting, known)}"
        case "missing":
            return f"must be given, in the recipe or as --{setting}"
        case "literal_error":
            return f"expected {context['expected']}; got {value}"
        case "value_error":
            return f"{context['error']}" + (f"; got {value}" if setting else "")
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "model_type" | "model_attributes_type":
            return f"must hold settings of its own, one per line; got {value}"
        case _:
            return f"{detail['msg'].replace('Input should be', 'must be')}; got {value}"
