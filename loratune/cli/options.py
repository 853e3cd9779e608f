"""Generates a flag for every setting of the recipe, with help, default and bounds from its declaration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from loratune.recipe.findings import Finding
from loratune.recipe.flag_values import is_list
from loratune.recipe.names import DROPPED, RENAMED
from loratune.recipe.section import Section
from loratune.recipe.sections import settings_with_dropped

SYMBOLS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option per setting to a command, which gets the used ones as `flags`: dotted setting → value as typed."""
    settings = settings_with_dropped()
    fields = settings | {old: settings[new] for old, new in RENAMED.items()}
    names = {dotted.replace(".", "__"): dotted for dotted in fields}

    def used(typed: dict[str, Any]) -> dict[str, Any]:
        return {names[name]: value for name, value in typed.items() if value not in (None, [])}

    hidden = RENAMED.keys() | DROPPED.keys()
    options = {name: _option(dotted, fields[dotted], dotted in hidden) for name, dotted in names.items()}
    generated = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in options.items()
    ]
    return with_options(command, "flags", generated, used)


def with_options(
    command: Callable[..., None],
    name: str,
    generated: list[inspect.Parameter],
    collected: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """Replace one parameter of a command with generated options.

    Args:
        command: a Typer command with the parameter.
        name: name of the parameter.
        generated: the options.
        collected: converts the options' values, by name, into the parameter's value.
    """

    def wrapped(**arguments: Any) -> None:
        typed = {option.name: arguments.pop(option.name) for option in generated}
        command(**arguments, **{name: collected(typed)})

    own = [parameter for known, parameter in _parameters(command).items() if known != name]
    wrapped.__signature__ = inspect.Signature([*own, *generated])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *generated]}
    wrapped.__doc__ = command.__doc__
    return wrapped


def _parameters(command: Callable[..., None]) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(command, eval_str=True)
    return {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in signature.parameters.items()
    }


def _option(dotted: str, field: FieldInfo, is_hidden: bool) -> Any:
    section = dotted.rpartition(".")[0]
    is_flag = field.annotation in (bool, bool | None)
    # Typer uses the name before the slash for True, and the one after it for False.
    spelled = f"--{dotted}/--no-{dotted}" if is_flag else f"--{dotted}"
    option = typer.Option(
        spelled,
        help=f"{' '.join((field.description or '').split())}{'' if is_flag else _bounds(field)}",
        metavar=None if is_flag else type_name(field.annotation),
        show_default=default_text(field),
        rich_help_panel=section or "run",
        hidden=is_hidden,
    )
    kind: Any = bool if is_flag else list[str] if is_list(field.annotation) else str
    return Annotated[kind | None, option]


def _bounds(field: FieldInfo) -> str:
    text = bounds_text(field)
    return f" [{text}]" if text else ""


def bounds_text(field: FieldInfo) -> str:
    """Return the numeric bounds of a setting, such as `≥ 1, ≤ 4096`."""
    bounds = [
        f"{symbol} {getattr(rule, name)}"
        for rule in field.metadata
        for name, symbol in SYMBOLS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join(bounds)


def default_text(field: FieldInfo) -> Any:
    """Return the default as shown in help and docs; False if there is none."""
    if field.is_required():
        return "required"
    default = field.default
    if default in (None, "", [], {}):
        return False
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return ", ".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def type_name(kind: Any) -> str:
    """Return a setting's type as shown in help and docs: its choices, or a placeholder."""
    if kind is Finding:
        return "name"  # the setting's description lists the many choices
    if get_origin(kind) is Annotated:
        return type_name(get_args(kind)[0])
    if isinstance(kind, type) and issubclass(kind, Section):
        return "{" + ", ".join(f"{name}: …" for name in kind.model_fields) + "}"
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, type(int | str)):
        return "|".join(dict.fromkeys(type_name(part) for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) is list:
        return type_name(get_args(kind)[0])
    if get_origin(kind) is dict:
        return "name=value"
    return {str: "text", int: "integer", float: "number", bool: "true|false"}[kind]
