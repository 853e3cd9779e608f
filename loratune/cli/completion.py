"""The completion of shells: Typer's, for a shell that may be named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from loratune.printable import shortened

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
FLAGS = ("--show-completion", "--install-completion")


def complete_if_asked(ctx: Any, options: Sequence[Any], args: Sequence[str]) -> None:
    """Print or install a completion and end the program, if the command line begins with such a flag.

    Args:
        ctx: context of the top-level command.
        options: its options.
        args: the command line. The word after the flag names a shell; without one it is the shell that asks.

    Raises:
        typer.BadParameter: Typer knows no completion for the shell.
    """
    if not args or args[0] not in FLAGS:
        return
    option = next(option for option in options if args[0] in option.opts)
    shell = next((word for word in args[1:2] if not word.startswith("-")), None)
    if shell is None or shell in SHELLS:
        try:
            option.callback(ctx, option, shell or True)  # ends the program
        except typer.Exit:
            shell = "the shell that asks"
    known = ", ".join(SHELLS)
    raise typer.BadParameter(f"no completion for {shortened(str(shell))}; there is one for {known}", ctx, option)
