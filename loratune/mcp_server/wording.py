"""Puts what the command line says of its flags into the words of a tool's caller, who has arguments and settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from loratune.recipe.sections import settings_with_dropped

COMMAND = r"loratune [a-z][^;\n`]*"
"""A whole command line, which stays as it is: a person can run it."""
GIVEN = r"""got (?:'[^'\n]*'|"[^"\n]*")"""
"""A value that was given, which is quoted as it is."""
FLAG = r"(?<![\w-])--(?P<no>no-)?(?P<name>[a-z]\w*(?:[-.]\w+)*)"
PAIR = r"""(?:[^\s='";,)]+|'[^'\n]*')+=(?:[^\s'";,)]+|'[^'\n]*')+|'[^'\n]+=[^'\n]+'"""
PAIRS = rf"(?<![\w-])--(?P<mapped>[a-z]\w*\.\w+) (?:{PAIR})(?: --(?P=mapped) (?:{PAIR}))*"
"""A flag with a name=value, which may be repeated."""
COMMAND_OR_FLAG = re.compile(f"{COMMAND}|{GIVEN}|{PAIRS}|{FLAG}")
RENAMED = {"config": "recipe"}
"""Flag → the argument that takes its value, where the names differ."""
OF_THE_SERVER = {"root", "read"}
"""Flags with which it is started."""
APART = "only on the command line"


def in_arguments(error: Mapping[str, Any], tool: str, tools: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Return the document of an error, with a tool's arguments in place of the flags that they stand for.

    A flag that the tool does not have is told as an argument of another one. If no tool has it, it stays, and is said
    to be one of the command line alone.

    Args:
        error: see `Failure`.
        tool: whose error it is.
        tools: name → the names of its arguments.
    """
    arguments = tools[tool]

    def worded(text: str | None) -> str | None:
        return None if text is None else COMMAND_OR_FLAG.sub(lambda match: _replaced(match, arguments, tools), text)

    problems = [
        one | {"message": worded(one["message"]), "remedy": worded(one["remedy"]), "key": _key(one["key"], arguments)}
        for one in error["problems"]
    ]
    return {**error, "message": worded(error["message"]), "problems": problems}


def _replaced(match: re.Match[str], arguments: Collection[str], tools: Mapping[str, Collection[str]]) -> str:
    flag = match["name"]
    if match["mapped"]:
        if "settings" not in arguments:
            return f"{match[0]} ({APART})"
        pairs = dict(pair.split("=", 1) for pair in shlex.split(match[0])[1::2])
        return f'`settings["{match["mapped"]}"]`: `{json.dumps(pairs, ensure_ascii=False)}`'
    if flag is None or flag in OF_THE_SERVER:
        return match[0]
    argument = _argument(flag)
    if argument in arguments:
        shown = argument
    elif "settings" in arguments and flag in settings_with_dropped():
        shown = f'settings["{flag}"]'
    elif others := [name for name, own in tools.items() if argument in own]:
        return f"`{argument}` of {' and '.join(others)}"
    else:
        return f"{match[0]} ({APART})"
    return f"`{shown}`{': false' if match['no'] else ''}"


def _key(key: str | None, arguments: Collection[str]) -> str | None:
    flag = (key or "").removeprefix("--")
    return _argument(flag) if _argument(flag) in arguments else flag or None


def _argument(flag: str) -> str:
    return RENAMED.get(flag, flag.replace("-", "_"))
