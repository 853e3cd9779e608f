"""Help pages for terminals of 80 columns: name, value and default on one line, the description below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from typer.core import TyperCommand

from loratune import console
from loratune.cli.advice import advised_message, whole_line
from loratune.cli.again import remember
from loratune.cli.flags import ADAPTER_FLAGS, RENAMED_BESIDE_AN_ADAPTER, RENAMED_FLAGS
from loratune.errors import Exit, LoratuneError


class _FlagGiven(NamedTuple):
    """A flag as it was typed, with its value if that is in the same word."""

    name: str
    value: str | None

    @classmethod
    def of(cls, argument: str) -> _FlagGiven:
        """Take a word apart: `--name=value`, or `-nvalue`."""
        name, sign, value = argument.partition("=")
        if argument.startswith("-") and not argument.startswith("--") and len(argument) > 2:
            return cls(argument[:2], argument[2:])
        return cls(name, value if sign else None)


class Command(TyperCommand):
    """A subcommand with its own help page, because Typer's table truncates long option names."""

    implied: ClassVar[dict[str, str]] = {"--resume": "newest"}
    """Value of an option that is given without one."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Add implied values, and replace renamed flags."""
        args = self._with_present_names(args)
        remember(ctx.command_path, args)
        known = {name for one in self.params if not getattr(one, "is_flag", False) for name in one.opts}
        filled: list[str] = []
        for argument, after in zip(args, [*args[1:], "-"], strict=False):
            filled.append(argument)
            if argument in self.implied and argument in known and after.startswith("-"):
                filled.append(self.implied[argument])
        try:
            return super().parse_args(ctx, filled)
        except Exception as error:
            if hasattr(error, "message"):  # Click's, and not that help was shown
                self._advise(error, ctx, args)
            raise

    def _advise(self, error: Any, ctx: Any, args: list[str]) -> None:
        """Have an error of the line say what is meant.

        Raises:
            LoratuneError: something is missing, of which Click tells the first alone.
        """
        options = [one for one in self.params if not getattr(one, "hidden", False)]
        arguments = [one for one in options if one.param_type_name == "argument"]
        end = args.index("--") if "--" in args else len(args)
        places = [place for place in self._places_of_flags(args) if not args[place].startswith("-")]
        places += range(end + 1, len(args))
        words = [] if arguments else [args[place] for place in places if args[place]]
        strays = [] if arguments else [*places, end]
        if hasattr(error, "param_type"):
            flags = {_FlagGiven.of(args[place]).name for place in self._places_of_flags(args)}
            given = [one for one in options if flags & {*one.opts}] + arguments[: len(places)]
            free = [one for one in options if one not in given]
            missing = [one for one in free if one.required]
            kept = [word for place, word in enumerate(args) if place not in strays]
            raise whole_line(missing, free, words, ["loratune", *ctx.command_path.split()[1:], *kept]) from error
        error.message = advised_message(error, options, words)

    def _with_present_names(self, args: list[str]) -> list[str]:
        """Replace flags of earlier versions, with a notice for each.

        Raises:
            LoratuneError: a flag is given under both names.
        """
        given = [_FlagGiven.of(argument) for argument in args]
        places = self._places_of_flags(args)
        names = {given[place].name for place in places}
        renamed = RENAMED_FLAGS.get(str(self.name), {})
        if names & {*ADAPTER_FLAGS}:
            renamed = renamed | RENAMED_BESIDE_AN_ADAPTER.get(str(self.name), {})
        present = list(args)
        for place in places:
            flag = given[place]
            if flag.name not in renamed:
                continue
            new = renamed[flag.name]
            if new in names:
                raise LoratuneError(
                    f"{flag.name} is now called {new}, and both are given; remove {flag.name}", Exit.USAGE
                )
            console.say(f"{flag.name} is now {new} (the old name still works)")
            present[place] = new if flag.value is None else f"{new}={flag.value}"
        return present

    def _places_of_flags(self, args: list[str]) -> list[int]:
        """Which arguments are flags, not values of flags, nor what follows `--`."""
        with_value = {name for option in self.params if not getattr(option, "is_flag", False) for name in option.opts}
        with_value |= {old for old, new in RENAMED_FLAGS.get(str(self.name), {}).items() if new in with_value}
        end = args.index("--") if "--" in args else len(args)
        return [place for place in range(end) if not place or args[place - 1] not in with_value]

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
