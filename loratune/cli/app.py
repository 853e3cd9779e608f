"""The `loratune` command: registers subcommands, and turns exceptions into messages and exit codes."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

from loratune import __version__, console
from loratune.cli.commands import COMMANDS, GROUPED, command_meant, command_module
from loratune.cli.completion import complete_if_asked
from loratune.cli.documents import await_document
from loratune.cli.failures import DEBUG, failures_told
from loratune.cli.help import Command, option_panels
from loratune.errors import Exit, LoratuneError, OutputLost
from loratune.imports import defer_imports
from loratune.runtime import silence_libraries
from loratune.streams import make_steady

_HELP_NAMES = {"help_option_names": ["-h", "--help"]}
CACHED_KERNELS = 256
"""Kernels that oneDNN keeps: one for each shape of a 16-bit product on a CPU, about 0.67 MB and 0.5 ms to make.

Its own bound is 1,024, so passes and prompts of many lengths would take 0.7 GB as time goes by. A layer's shapes are
used again by all others of a pass, so fewer kernels cost little.
"""


@functools.cache
def _command(module_name: str, name: str, summary: str) -> Any:
    """Build a typer command from its function, with an option for each setting."""
    module = command_module(module_name)
    single = typer.Typer(add_completion=False, context_settings=_HELP_NAMES)
    single.command(name, cls=Command, help=f"{summary}\n\n{module.DETAILS}")(module.command)
    return typer.main.get_command(single)


class CommandGroup(TyperGroup):
    """A command group that imports a subcommand when it runs."""

    table: ClassVar[dict[str, str]]
    """Command → its one-line help."""
    prefix = ""
    """Prefix of the subcommands' module names."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a subcommand; return None for an unknown name."""
        if cmd_name not in self.table:
            return None
        return _command(f"{self.prefix}{cmd_name}", cmd_name, self.table[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of a line; a name that there is not is told with the one that is meant."""
        meant = "" if args[0] in self.table else command_meant(args[0], self.table)
        if meant:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant}?")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        panels = {"commands": [(name, "", text) for name, text in self.table.items()]}
        panels |= option_panels(self.get_params(ctx))
        console.help_page(self.get_usage(ctx), self.help or "", panels)


def _group_class(name: str) -> type[CommandGroup]:
    return type(f"{name.capitalize()}Group", (CommandGroup,), {"table": GROUPED[name], "prefix": f"{name}_"})


GROUPS = {name: _group_class(name) for name in GROUPED}


class Group(CommandGroup):
    """The top-level group: user errors become one message, bugs keep their traceback."""

    table = COMMANDS

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a subcommand or create a group; return None for an unknown name."""
        if cmd_name not in GROUPS:
            return super().get_command(ctx, cmd_name)
        group = typer.Typer(
            cls=GROUPS[cmd_name], no_args_is_help=True, add_completion=False, context_settings=_HELP_NAMES
        )
        group.callback(help=COMMANDS[cmd_name])(lambda: None)
        made = typer.main.get_command(group)
        made.name = cmd_name
        return made

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Accept --debug anywhere on the line, because users append it to a command that has just failed."""
        if "--debug" in args:
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        await_document(args)
        with failures_told():
            complete_if_asked(ctx, self.params, args)
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand.

        Raises:
            typer.Exit: with the exit code of a failure.
        """
        with failures_told():
            _require_working_folder()
            return super().invoke(ctx)


def _require_working_folder() -> None:
    """Raise if the working folder is gone, because some libraries then abort the process.

    Raises:
        LoratuneError: the folder was removed or is not accessible.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise LoratuneError(
            f"the working folder is gone or not accessible ({error.strerror}); change to another one", Exit.IO
        ) from error


app = typer.Typer(
    name="loratune",
    cls=Group,
    help="Verified LoRA fine-tuning of Qwen-family models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP_NAMES,
)


def _print_version(value: bool) -> None:
    if value:
        console.write_result(f"loratune {__version__}")
        raise typer.Exit(int(Exit.OK))


@app.callback(invoke_without_command=False)
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


def main() -> None:
    """Entry point of the console script."""
    make_steady()
    silence_libraries()
    defer_imports()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Batches and answers of many lengths fragment GPU memory; torch reads this when it is imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of its connections between processes
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(CACHED_KERNELS))
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a notebook's backend may not be there
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # rows are encoded in one process
    try:
        sys.exit(app(prog_name="loratune"))  # also for `python -m loratune`, as messages suggest command lines
    except OutputLost as lost:
        if lost.has_no_reader:
            sys.exit(128 + signal.SIGPIPE)  # silently, as is usual for a closed pipe
        console.error(f"standard output: the result cannot be written: {lost}")
        sys.exit(int(Exit.IO))
