"""Translates a config file into a recipe's text, with the lists of what became of each setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from loratune.commands import Command, loratune
from loratune.errors import counted
from loratune.migration.config_file import read_config
from loratune.migration.recipe_text import recipe_text, settle
from loratune.migration.recognition import recognised
from loratune.migration.sheet import Context, Entry, Sheet
from loratune.migration.tool import Tool
from loratune.recipe.sections import Recipe

MOST_DEVICES = 65536


class TranslationValues(TypedDict):
    """What became of a config."""

    config: str
    tool: str
    taken: list[Entry]
    """Settings that are taken over."""
    changed: list[Entry]
    """Settings that mean something else here."""
    lost: list[Entry]
    """Settings that are not taken, and without which the result is another."""
    unneeded: list[Entry]
    recipe: str
    """Its text."""


@dataclass(frozen=True)
class Translation:
    """A config in loratune's words."""

    source: Path
    tool: str
    sheet: Sheet
    text: str
    """The recipe's file."""
    recipe: Recipe | None
    """None if the config names no base or no rows."""

    @property
    def lost(self) -> list[Entry]:
        """What changes the result and is not taken."""
        return self.sheet.lost

    @property
    def lists(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Title and rows of each list, for the terminal."""
        sheet = self.sheet
        kinds = {
            "taken over": sheet.taken,
            "changed in meaning": sheet.changed,
            "not needed": sheet.unneeded,
            "not taken, and the result is another": sheet.lost,
        }
        return [(f"{title} ({_count(entries)})", self._rows(entries)) for title, entries in kinds.items()]

    def _rows(self, entries: list[Entry]) -> list[tuple[str, str]]:
        """Return names and what is told of them; names of which the same is told are together."""
        names: dict[str, list[str]] = {}
        for entry in entries:
            is_known = entry.setting in self.sheet.recipe
            here = f"{entry.setting}: {self.sheet.recipe[entry.setting]}" if is_known else entry.setting
            told = "; ".join(part for part in (here, entry.reason) if part)
            named = [*entry.names, *(f"{name} (default)" for name in entry.defaults)]
            names.setdefault(told, []).extend(named or ["(default)" if is_known else "(missing)"])
        return [("\n".join(dict.fromkeys(several)), told) for told, several in names.items()]

    def values(self) -> TranslationValues:
        """Return lists and recipe as JSON has them."""
        sheet = self.sheet
        return {
            "config": str(self.source),
            "tool": self.tool,
            "taken": sheet.taken,
            "changed": sheet.changed,
            "lost": sheet.lost,
            "unneeded": sheet.unneeded,
            "recipe": self.text,
        }

    def next_command(self, file: Path) -> Command:
        """Return the command that checks the rows of the written recipe."""
        return loratune("check its rows", "data check", {"--config": file})


def translate(
    source: Path, tool: Tool | None, flags: dict[str, Any], devices: int | None, dataset_info: Path | None
) -> Translation:
    """Translate a config.

    Args:
        source: the file.
        tool: the tool that it is for; None to recognise it.
        flags: dotted setting → value as typed; they override the config.
        devices: number of devices that the tool trained on; None if unknown.
        dataset_info: LLaMA-Factory's descriptions of data sets; None to look where it does.

    Raises:
        LoratuneError: the file cannot be read, is of no known tool, or flags are wrong.
    """
    config = read_config(source)
    tool = tool or recognised(config)
    told = devices or _devices_of(config.environment)
    sheet = tool.translate(config, Context(source.parent, config.program, told, dataset_info))
    for setting in flags:
        sheet.comments.pop(setting, None)  # it is about the value that the flag replaces
    values, recipe = settle(sheet, flags, source)
    return Translation(source, tool.name, sheet, recipe_text(sheet, values, source), recipe)


def _devices_of(environment: dict[str, str]) -> int | None:
    """Return the number of processes that the variables of a shell script ask for; None if they ask for none."""
    processes, nodes = environment.get("NPROC_PER_NODE", ""), environment.get("NNODES", "1")
    if not processes.isdecimal() or not nodes.isdecimal():
        return None
    return max(1, min(int(processes[:6]) * int(nodes[:6]), MOST_DEVICES))


def _count(entries: list[Entry]) -> str:
    return counted(len({name for entry in entries for name in entry.names}), "setting")
