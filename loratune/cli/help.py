"""Help pages that fit a terminal of 80 columns: a line for an option's name, value and default, its meaning below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from typer.core import TyperCommand

from loratune import console
from loratune.cli.again import remember


class Command(TyperCommand):
    """A subcommand whose help is a page of loratune's own; Typer's table cuts long option names off."""

    implied: ClassVar[dict[str, str]] = {"--resume": "newest"}
    """What an option means that is given without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Give such options their value."""
        remember(ctx.command_path, args)
        known = {name for parameter in self.params for name in parameter.opts}
        filled: list[str] = []
        for argument, after in zip(args, [*args[1:], "-"], strict=False):
            filled.append(argument)
            if argument in self.implied and argument in known and after.startswith("-"):
                filled.append(self.implied[argument])
        return super().parse_args(ctx, filled)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        console.help_page(self.get_usage(ctx), self.help or "", option_panels(self.get_params(ctx)))


def option_panels(parameters: Iterable[Any]) -> dict[str, list[tuple[str, str, str]]]:
    """Panel → (spelling, default, help) of each of its parameters; generated flags come in panels by section."""
    panels: dict[str, list[tuple[str, str, str]]] = {}
    for parameter in parameters:
        if parameter.hidden:
            continue
        kind = "arguments" if parameter.param_type_name == "argument" else "options"
        panel = getattr(parameter, "rich_help_panel", None) or kind
        panels.setdefault(panel, []).append((_spelling(parameter), _default(parameter), parameter.help or ""))
    return panels


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    names = sorted(parameter.opts, key=len)
    if parameter.secondary_opts:
        names = [f"--[no-]{names[-1].removeprefix('--')}"]
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return ", ".join(names) + value


def _default(parameter: Any) -> str:
    shown = parameter.show_default
    if isinstance(shown, str):
        return shown
    value = parameter.default
    if value is None or isinstance(value, bool) or value == "":
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
