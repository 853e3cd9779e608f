"""Says of a wrong command line what is meant by it, and how the whole line goes.

What takes long to import is imported where a line is wrong, since help and running commands need none of it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer import Context

from loratune.cli.commands import command_lines
from loratune.commands import Command
from loratune.errors import Exit, LoratuneError, Problem, bullet_list
from loratune.nearest import MISSPELT, nearest
from loratune.plain_files import is_file, is_folder
from loratune.printable import shortened

CHOICE = re.compile(r"(?:Value error, )?(?P<told>'(?P<given>.*)' is not one of (?P<known>'.*'))\.")
"""Typer's message of a value that is none of an option's choices."""

SWITCHED = {"true", "false", "yes", "no", "on", "off", "0", "1"}
"""Values that other tools' switches take, and flags here do not."""


@dataclass(frozen=True)
class _Kind:
    """What a word without a flag may be, and the flags that take it."""

    told: str
    fits: Callable[[str], object]
    flags: tuple[str, ...]


def _is_recipe(word: str) -> bool:
    from loratune.recipe.loading import is_recipe_name

    return is_recipe_name(word)


def _is_rows(word: str) -> bool:
    from loratune.data.sources import file_kind, hub_name

    return bool(file_kind(word) or hub_name(word))


KINDS = (
    _Kind("a recipe is given as", _is_recipe, ("--config",)),
    _Kind("rows are given as", _is_rows, ("--data.train", "--input", "--tests")),
    _Kind("a model is given as", lambda word: is_file(Path(word) / "config.json"), ("--model",)),
    _Kind("an adapter is given as", is_folder, ("--adapter",)),
)
PROMPT = _Kind("a prompt is given as", lambda word: word[0] != "-" and ("/" not in word or " " in word), ("--prompt",))
"""What words of no other kind may be; without quotes, a shell makes several of one prompt."""


def advised_message(error: Any, options: Sequence[Any], words: Sequence[str]) -> str:
    """Return the message of a usage error, with what is meant.

    Args:
        error: Click's.
        options: of the command, without hidden ones.
        words: of its line that are given without a flag.
    """
    message = str(error.message)
    if hasattr(error, "possibilities"):
        return message + _flag_meant(error, [name for one in options for name in one.opts])
    if match := CHOICE.fullmatch(message):
        near = nearest(match["given"], (name.strip("'") for name in match["known"].split(", ")), MISSPELT)
        return match["told"] + (f"; did you mean {near}?" if near else f". {error.param.help}")
    if "unexpected extra argument" in message:
        switched = [word for word in words if word.lower() in SWITCHED]
        told = ["; a flag to switch on or off takes no value: --NAME, or --no-NAME"] if switched else []
        others = _flags_of([word for word in words if word not in switched], options)
        return "".join([message, *told, *(f"; {kind.told} {shlex.join((flag, word))}" for word, kind, flag in others)])
    return message.replace("Input should be", "it must be")


def whole_line(missing: Sequence[Any], free: Sequence[Any], words: Sequence[str], line: Sequence[str]) -> LoratuneError:
    """Return the error of a line that lacks options, with the line that has them.

    Args:
        missing: the options and arguments that it lacks.
        free: the options that it does not give, those that it lacks among them.
        words: see `advised_message`; they become values of the free options that they are meant for. The others become
            those of the missing options if there are as many, and are left out otherwise.
        line: the words of the line but for these.
    """
    meant, left = _placed(words, free, missing)
    flags, arguments, chosen = list[str](), list[str](), dict[str, str]()
    for one in missing:
        value = str(one.name).upper()
        if (flag := _flag_of(one)) in meant:
            value = meant.pop(flag)
        else:
            chosen[value] = _about(one)
        if flag:
            flags += [flag, value]
        else:
            arguments.append(value)
    flags += [part for given in meant.items() for part in given]
    end = line.index("--") if "--" in line else len(line)  # what follows is never a flag
    named = {_flag_of(one) or str(one.name).upper(): _about(one) for one in missing}
    apart = f"\nleft out below, since no flag is given for it: {shortened(shlex.join(left))}" if left else ""
    return LoratuneError(
        f"{told_as_lacking(named)}{apart}",
        Exit.USAGE,
        [Command("the whole line", (*line[:end], *flags, *line[end:], *arguments), chosen)],
        [Problem(about, key=name, remedy=f"give {name}") for name, about in named.items()],
    )


def told_as_lacking(named: Mapping[str, str]) -> str:
    """Return what a command needs that its line lacks: name of a flag or argument → what it is."""
    return f"the command needs:\n{bullet_list([f'{name}: {about}' for name, about in named.items()])}"


def _placed(words: Sequence[str], free: Sequence[Any], missing: Sequence[Any]) -> tuple[dict[str, str], list[str]]:
    """Return flag → the word that is meant as its value, and the words that are left."""
    meant = {flag: word for word, _, flag in _flags_of(words, free)}
    lacking = list[str]()
    for one in missing:
        flag, choices = _flag_of(one), {*str(one.metavar).split("|")} - {one.metavar}
        if chosen := [word for word in words if word in choices]:
            meant[flag] = chosen[-1]
        elif flag not in meant and not choices:
            lacking.append(flag)
    left = [word for word in words if word not in meant.values()]
    return (meant | dict(zip(lacking, left, strict=True)), []) if len(left) == len(lacking) else (meant, left)


def _about(option: Any) -> str:
    text = str(option.help or "").removesuffix(".")
    return f"{text}: {option.metavar}" if "|" in str(option.metavar) else text


def _flag_of(option: Any) -> str:
    """Return the long flag of an option; empty for an argument."""
    return max(option.opts, key=len) if option.param_type_name == "option" else ""


def _flag_meant(error: Any, known: list[str]) -> str:
    """Return the end of the sentence on an unknown flag; Click's own names are kept if there is nothing better."""
    from loratune.recipe.suggestions import suggestion

    names = {name.removeprefix("--") for name in known if name.startswith("--")}
    takes_settings = any("." in name for name in names)
    advice = suggestion(error.option_name.lstrip("-"), names, "--") if takes_settings else ""
    if not advice and (others := _commands_with(error.option_name, error.ctx.find_root().command)):
        advice = f"; {', '.join(others[:3])} {'takes' if len(others) == 1 else 'take'} it"
    error.possibilities = None if advice else error.possibilities
    return advice


def _commands_with(flag: str, root: Any) -> list[str]:
    """Return the commands that have a flag."""
    found = []
    for line in command_lines():
        command, context = root, Context(root)
        for word in line:
            command = command.get_command(context, word) if hasattr(command, "get_command") else None
        if command and any(flag in one.opts for one in command.params if not getattr(one, "hidden", False)):
            found.append(" ".join(line))
    return found


def _flags_of(words: Sequence[str], options: Sequence[Any]) -> Iterator[tuple[str, _Kind, str]]:
    """Yield each word that one of the options takes, with its kind and the flag; no flag is given two words."""
    known = {name for one in options for name in one.opts}
    for word in words:
        kind = next((kind for kind in KINDS if kind.fits(word)), None)
        flag = next((flag for flag in kind.flags if flag in known), "") if kind else ""
        if kind and flag:
            known.remove(flag)
            yield word, kind, flag
    others = [word for word in words if PROMPT.fits(word) and not any(kind.fits(word) for kind in KINDS)]
    if others and known & {*PROMPT.flags}:
        yield " ".join(others), PROMPT, PROMPT.flags[0]
