"""Says what is wrong with the arguments of a call, and with the settings among them: all of it at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from loratune.errors import Exit, LoratuneError, Problem, bullet_list
from loratune.mcp_server.wording import RENAMED
from loratune.nearest import nearest
from loratune.recipe.problems import message_of
from loratune.recipe.sections import iterate_settings
from loratune.recipe.suggestions import suggestion

if TYPE_CHECKING:
    from mcp.server.mcpserver.tools import Tool

SETTINGS = dict(iterate_settings())


def require_arguments(tool: Tool, arguments: dict[str, Any]) -> None:
    """Check the names and the values of a call's arguments.

    Raises:
        LoratuneError: lists all that is wrong.
    """
    known = tool.parameters.get("properties", {})
    missing = [Problem("must be given", key=one) for one in tool.parameters.get("required", ()) if one not in arguments]
    others = [Problem(f"no such argument; {_place_of(one, known)}", key=one) for one in arguments if one not in known]
    if problems := missing + others + list(_value_problems(tool, arguments)):
        listed = bullet_list([f"{one.key}: {one.message}" for one in problems])
        raise LoratuneError(f"the arguments of {tool.name} are not usable:\n{listed}", Exit.USAGE, problems=problems)


def meant(name: str, known: Iterable[str]) -> str:
    """Return which of the known names a name may stand for, as the end of a sentence."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"there are {', '.join(known)}"


def _place_of(name: str, known: Mapping[str, Any]) -> str:
    """Return where an argument belongs that a tool does not have."""
    own = [one for one in SETTINGS if one == name or one.startswith(f"{name}.")]
    if own and "settings" in known:
        return f"it is for settings: {_as_dotted(own[:1])}"
    return meant(RENAMED.get(name, name), known)


def _value_problems(tool: Tool, arguments: dict[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the values of the arguments that a tool has."""
    found: dict[str, str] = {}
    try:
        tool.fn_metadata.validate_arguments(arguments)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0])
            if detail["type"] != "missing":
                found.setdefault(name, message_of(detail, name))
    yield from (Problem(message, key=name) for name, message in found.items())


def setting_problems(settings: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the names of settings, which are dotted: no other flag can be given in this way."""
    found = []
    for name in settings.keys() - SETTINGS.keys():
        of_section = [one for one in SETTINGS if one.startswith(f"{name}.")]
        if not of_section:
            found.append(Problem(f"no such setting{suggestion(name, SETTINGS)}", key=name))
            continue
        nested = [f"{name}.{one}" for one in settings[name]] if isinstance(settings[name], dict) else []
        right = [one for one in nested if one in SETTINGS] or of_section[:1]
        found.append(Problem(f"a section; write its settings by dotted name: {_as_dotted(right)}", key=name))
        found += setting_problems(dict.fromkeys(one for one in nested if one not in SETTINGS))
    return sorted(found, key=lambda problem: problem.key or "")


def _as_dotted(names: list[str]) -> str:
    return "{" + ", ".join(f'"{name}": …' for name in names) + "}"


def refused_settings(problems: list[Problem], others: Mapping[str, Any] | None = None) -> LoratuneError:
    """Return the error of settings.

    Args:
        problems: with their names.
        others: the document of the error with their values and the recipe, if there is one.
    """
    listed = bullet_list([f"{one.key}: {one.message}" for one in problems])
    message = f"settings:\n{listed}\n`loratune schema recipe` lists the settings, such as training.max_steps"
    if others:
        message += f"\n{others['message']}"
        problems = [*problems, *(Problem(**one) for one in others["problems"])]
    return LoratuneError(message, Exit.USAGE, problems=problems)
