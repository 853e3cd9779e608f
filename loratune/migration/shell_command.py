"""Finds the training command in a shell script, and its options. The script is split into words and never executed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loratune.recipe.yaml_reader import read_yaml

PROGRAMS = {
    ("swift", "sft"): "swift",
    ("swift", "pt"): "swift pt",
    ("megatron", "sft"): "megatron",
    ("megatron", "pt"): "megatron pt",
    ("trl", "sft"): "trl",
}
SCRIPTS = {"cli/sft.py": "swift", "cli/pt.py": "swift pt", "cli/_megatron/sft.py": "megatron", "scripts/sft.py": "trl"}
"""End of the path of a script that torchrun or accelerate starts → program."""
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
ARITHMETIC = re.compile(r"\$\(expr (\d+) ([*/]) (\d+)\)|\$\(\( *(\d+) *([*/]) *(\d+) *\)\)")
OPTION = re.compile(r"--?([A-Za-z]\w*(?:[-.]\w+)*)(?:=(.*))?", re.DOTALL)
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
SEPARATORS = ";&|\n"


@dataclass(frozen=True)
class ShellCommand:
    """The options of a training command."""

    program: str
    options: dict[str, Any]
    environment: dict[str, str]


def read_command(text: str) -> ShellCommand | None:
    """Return the first training command of a script; None if there is none or the quotes do not match."""
    variables: dict[str, str] = {}
    try:
        for words in _commands(text):
            words = [_filled(word, variables) for word in words]
            rest = [word for word in words if word != "export"]
            while rest and (assigned := ASSIGNMENT.fullmatch(rest[0])):
                variables[assigned[1]] = assigned[2]
                rest = rest[1:]
            for place in range(len(rest)):
                if program := _program(rest[place : place + 2]):
                    started = dict(_options(rest[:place]))
                    if processes := started.get("nproc_per_node"):
                        variables["NPROC_PER_NODE"] = str(processes)
                    return ShellCommand(program, dict(_options(rest[place:])), variables)
    except ValueError:  # of shlex: quotes that do not match
        return None
    return None


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lexer = shlex.shlex(re.sub(r"\\(\n|\Z)", " ", "\n".join(lines)), posix=True, punctuation_chars=SEPARATORS)
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    words: list[str] = []
    is_comment = False
    for word in lexer:
        is_end = bool(word) and set(word) <= set(SEPARATORS)
        is_comment = is_comment or word.startswith("#")
        if is_end and words:
            yield words
            words = []
        is_comment = is_comment and not (is_end and "\n" in word)
        if is_end or is_comment:
            continue
        if words and words[-1].count("(") > words[-1].count(")"):  # $(expr 16 / 2) is one word
            words[-1] += f" {word}"
        else:
            words.append(word)
    yield words


def _filled(word: str, variables: dict[str, str]) -> str:
    """Return a word with the variables that the script has set, and with simple integer arithmetic done."""
    word = VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)
    return ARITHMETIC.sub(_computed, word)


def _computed(match: re.Match[str]) -> str:
    left, sign, right = match[1] or match[4], match[2] or match[5], match[3] or match[6]
    if len(left + right) > 20 or int(right) == 0:
        return match[0]
    return str(int(left) * int(right) if sign == "*" else int(left) // int(right))


def _program(words: list[str]) -> str:
    for names, program in PROGRAMS.items():
        if tuple(words) == names:
            return program
    return next((program for end, program in SCRIPTS.items() if words[0].endswith(end)), "")


def _options(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield options with their values: true without one, and a list of several."""
    name, values = "", list[str]()
    for word in [*words, "--"]:
        match = OPTION.fullmatch(word) if not NUMBER.fullmatch(word) else None
        if not match and word != "--":
            values.append(word)
            continue
        if name:
            read = [_value(value) for value in values]
            yield name.replace("-", "_"), True if not read else read[0] if len(read) == 1 else read
        name, values = (match[1], [match[2]] if match[2] is not None else []) if match else ("", [])


def _value(text: str) -> Any:
    """Return a number or truth value as such; any other text as it is."""
    value = read_yaml(text).values if NUMBER.fullmatch(text) or text.lower() in ("true", "false") else text
    return text if value is None else value
