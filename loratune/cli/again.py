"""The command that is running as a line to type again, with other flags."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import click
from click.core import ParameterSource

from loratune.commands import Command


def repeated(purpose: str, flags: Set[str]) -> Command:
    """The running command with flags added.

    Args:
        purpose: as of `Command`.
        flags: names without values; those that are given already are not given twice.
    """
    context = click.get_current_context()
    words = ["loratune", *context.command_path.split()[1:]]
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name))
        if isinstance(parameter, click.Option) and given == ParameterSource.COMMANDLINE:
            words += [word for word in _words(parameter, context.params[str(parameter.name)]) if word not in flags]
    return Command(purpose, (*words, *sorted(flags)))


def _words(option: click.Option, value: Any) -> Iterator[str]:
    """An option as it was given."""
    name = next(name for name in option.opts if name.startswith("--"))
    if option.is_flag:
        yield name if value else next(iter(option.secondary_opts), name)
        return
    for one in value if option.multiple else [value]:
        yield from (name, str(one))
