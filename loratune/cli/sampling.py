"""Generates the sampling flags, with help, default and range from their declaration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from loratune.cli.options import with_options
from loratune.engine.sampling import NUMBERS, NumberSetting, Sampling

SHORT = {"temperature": "-t"}
KINDS = {int: "integer", float: "number"}


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each sampling setting to a command, which gets them all as `sampling`."""
    options = [_parameter(name) for name in Sampling.model_fields]

    def collected(typed: dict[str, Any]) -> Sampling:
        given = {name: value for name, value in typed.items() if value not in (None, [])}
        values = {name: NUMBERS[name].read(text, flag(name)) for name, text in given.items() if name in NUMBERS}
        return Sampling.model_validate(values | {"stop": tuple(given.get("stop", ()))})

    return with_options(command, "sampling", options, collected)


def _parameter(name: str) -> inspect.Parameter:
    option = _number_option(NUMBERS[name]) if name in NUMBERS else _text_option(name)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)


def _number_option(setting: NumberSetting) -> Any:
    """Return the option of a numeric setting; its type is text, because the setting does the parsing."""
    names = [flag(setting.name), *filter(None, [SHORT.get(setting.name)])]
    option = typer.Option(
        *names,
        metavar=KINDS[setting.kind],
        show_default=f"{setting.default:g}" if setting.default is not None else setting.unset,
        help=f"{setting.about} [{setting.range}]",
    )
    return Annotated[str | None, option]


def _text_option(name: str) -> Any:
    return Annotated[
        list[str] | None, typer.Option(flag(name), metavar="text", help=Sampling.model_fields[name].description)
    ]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
