"""Help pages for terminals of 80 columns: name, value and default on one line, the description below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from typer.core import TyperCommand

from loratune import console
from loratune.cli.again import remember
from loratune.cli.flags import RENAMED_FLAGS
from loratune.errors import Exit, LoratuneError


class Command(TyperCommand):
    """A subcommand with its own help page, because Typer's table truncates long option names."""

    implied: ClassVar[dict[str, str]] = {"--resume": "newest"}
    """Value of an option that is given without one."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Add implied values, and replace renamed flags."""
        args = self._with_present_names(args)
        remember(ctx.command_path, args)
        known = {name for parameter in self.params for name in parameter.opts}
        filled: list[str] = []
        for argument, after in zip(args, [*args[1:], "-"], strict=False):
            filled.append(argument)
            if argument in self.implied and argument in known and after.startswith("-"):
                filled.append(self.implied[argument])
        return super().parse_args(ctx, filled)

    def _with_present_names(self, args: list[str]) -> list[str]:
        """Replace flags of earlier versions, with a notice for each.

        Raises:
            LoratuneError: a flag is given under both names.
        """
        renamed = RENAMED_FLAGS.get(str(self.name), {})
        with_value = {name for option in self.params if not getattr(option, "is_flag", False) for name in option.opts}
        present: list[str] = []
        for argument in args:
            name, sign, value = argument.partition("=")
            is_value = bool(present) and present[-1] in with_value
            if name not in renamed or is_value or "--" in present:
                present.append(argument)
                continue
            new = renamed[name]
            if any(other.partition("=")[0] == new for other in args):
                raise LoratuneError(f"{name} is now called {new}, and both are given; remove {name}", Exit.USAGE)
            console.say(f"{name} is now {new} (the old name still works)")
            present.append(f"{new}{sign}{value}")
        return present

    def format_help(self, ctx: Any, formatter: Any) -> None:
        console.help_page(self.get_usage(ctx), self.help or "", option_panels(self.get_params(ctx)))


def option_panels(parameters: Iterable[Any]) -> dict[str, list[tuple[str, str, str]]]:
    """Return panel → (spelling, default, help) of its parameters; recipe flags have one panel per section."""
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
