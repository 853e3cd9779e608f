"""Flags that errors name are those of the command that fails."""

from __future__ import annotations

import ast
import functools
import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import typer

from loratune.cli.app import app
from loratune.cli.commands import COMMANDS, command_lines, command_module

PACKAGE = Path(__file__).resolve().parent.parent / "loratune"
COMMAND_OR_FLAG = re.compile(r"loratune [a-z][^;\n]*|(?<![\w-])(--[a-z][\w-]*(?:\.\w+)*)")
OF_OTHER_PROGRAMS = {"--node-rank"}  # torchrun's
FILLED_IN = "…"
"""In place of what a message is given when it is raised; no flag is followed by it directly."""
CALLS = 4
"""Functions deep that a command is followed beyond the modules of `cli`; further on, too much depends on arguments."""
NEVER_THERE = {
    ("sft", "require_intact"),  # it is called with force, which only warns
    ("verify", "job_of"),  # the merge is not asked for anything but the proof
    ("verify", "require_apart"),  # its folder is a temporary one
    ("sweep", "prepare_output"),  # it is called with overwrite
}
"""Command and a function whose message cannot come there, since the arguments exclude it."""


@functools.cache
def options_of(line: tuple[str, ...]) -> frozenset[str]:
    """The flags of a command, and those of every command."""
    root: Any = typer.main.get_command(app)
    found: Any = root
    for word in line:
        found = found.get_command(typer.Context(found), word)
    return frozenset(name for one in (*found.params, *root.params) for name in (*one.opts, *one.secondary_opts))


@functools.cache
def tree_of(module: str) -> ast.Module:
    path = PACKAGE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def text_of(node: ast.AST) -> str:
    """The text of an expression, with what is not known here left out."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        return FILLED_IN
    return "".join(text_of(inner) for inner in ast.iter_child_nodes(node))


def flags_of_errors(tree: ast.AST) -> set[tuple[str, frozenset[str]]]:
    """The flags that the errors of some code name, but for those of whole command lines.

    Each comes with the commands that its message names, such as sft in "sft takes them with --data.train".
    """
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    messages = [
        text_of(call.args[0]) for call in calls if getattr(call.func, "id", "") == "LoratuneError" and call.args
    ]
    found = set()
    for message in messages:
        named = COMMANDS.keys() & set(re.findall(r"[\w-]+", message))
        found |= {(flag, frozenset(named)) for flag in COMMAND_OR_FLAG.findall(message) if flag}
    return {(flag, named) for flag, named in found if flag not in OF_OTHER_PROGRAMS}


def definitions(module: str) -> dict[str, ast.AST]:
    return {node.name: node for node in tree_of(module).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@functools.cache
def called_by(module: str, name: str) -> frozenset[tuple[str, str]]:
    """Module and name of what a function or class of loratune uses by name."""
    imports = (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom))
    known = {one.name: str(node.module) for node in imports for one in node.names}
    used = {node.id for node in ast.walk(definitions(module)[name]) if isinstance(node, ast.Name)}
    places = {(known.get(one, module), one) for one in used}
    return frozenset((place, one) for place, one in places if place.startswith("loratune."))


def run_by(module: str) -> set[tuple[str, str]]:
    """Module and name of what a command uses by name, a few calls deep."""
    todo, seen = deque([(module, "command", 0)]), set[tuple[str, str]]()
    while todo:
        place, name, depth = todo.popleft()
        if (place, name) in seen or name not in definitions(place):
            continue
        seen.add((place, name))
        if depth < CALLS:
            todo += [(*one, depth + (not one[0].startswith("loratune.cli."))) for one in called_by(place, name)]
    return seen


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_errors_of_a_command_name_flags_that_it_has(line: tuple[str, ...]) -> None:
    for place, name in run_by(command_module("_".join(line)).__name__):
        if (" ".join(line), name) in NEVER_THERE:
            continue
        for flag, named in flags_of_errors(definitions(place)[name]):
            own = options_of(line).union(*(options_of((one,)) for one in named))
            assert flag in own, f"{place}.{name}"


def test_errors_name_flags_that_some_command_has() -> None:
    every = frozenset().union(*map(options_of, command_lines()))
    for path in PACKAGE.rglob("*.py"):
        named = {flag for flag, _ in flags_of_errors(ast.parse(path.read_text(encoding="utf-8")))}
        assert named <= every, path


def test_a_flag_that_there_is_not_is_found_in_a_message() -> None:
    code = 'raise LoratuneError(f"{path}: no; run loratune nosuch --there; " f"or give --{one} or --no-such.{two}", 2)'
    assert flags_of_errors(ast.parse(code)) == {("--no-such", frozenset())}
    code = 'raise LoratuneError("an adapter, which infer takes with --adapter", 2)'
    assert flags_of_errors(ast.parse(code)) == {("--adapter", frozenset({"infer"}))}
    assert not flags_of_errors(ast.parse('console.warn("--nosuch is not of an error")'))
    assert ("loratune.writing", "check_new_file") in run_by("loratune.cli.launch_slurm")
