"""Writes a translated config as a recipe: what differs from the defaults, with comments where a meaning has changed."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from loratune.migration.sheet import MOST, SETTINGS, Entry, Sheet
from loratune.printable import printable, shortened
from loratune.recipe.loading import validate_settings
from loratune.recipe.sections import Recipe
from loratune.recipe.yaml_reader import read_yaml, write_yaml

WIDTH = 100
STAND_INS = {"model.base": "owner/name", "data.train": ["rows.jsonl"]}
"""Values for the check of a recipe that has none of these settings yet."""


def settle(sheet: Sheet, flags: dict[str, Any], source: Path) -> tuple[dict[str, Any], Recipe | None]:
    """Return a recipe's settings by section, and the recipe; None for it if it lacks base or rows.

    Args:
        sheet: the translation; what is missing is recorded as a loss.
        flags: dotted setting → value as typed; they override the config.
        source: the config.

    Raises:
        LoratuneError: flags or settings are refused.
    """
    values: dict[str, Any] = {}
    for setting, field in SETTINGS.items():
        if setting in sheet.recipe and (sheet.recipe[setting] != field.get_default() or setting in sheet.comments):
            _put(values, setting, sheet.recipe[setting])
    missing = [setting for setting in STAND_INS if setting not in sheet.recipe and setting not in flags]
    for setting in missing:
        sheet.lost.append(Entry((), "", setting, f"nothing of the config gives it; give --{setting}"))
        _put(values, setting, STAND_INS[setting])
    recipe = validate_settings(values, flags, source)
    return _ordered(values, frozenset(missing)), None if missing else recipe


def _ordered(values: dict[str, Any], left_out: frozenset[str]) -> dict[str, Any]:
    """Return settings in the order of their declaration, and whole numbers as such."""
    found: dict[str, Any] = {}
    for setting in SETTINGS:
        section, _, name = setting.rpartition(".")
        place = values.get(section) or {} if section else values
        if name in place and setting not in left_out:
            value = place[name]
            is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= MOST
            _put(found, setting, int(value) if is_whole else value)
    return found


def _put(values: dict[str, Any], setting: str, value: Any) -> None:
    section, _, name = setting.rpartition(".")
    (values.setdefault(section, {}) if section else values)[name] = value


def recipe_text(sheet: Sheet, values: dict[str, Any], source: Path) -> str:
    """Return the recipe's file.

    Args:
        sheet: the translation.
        values: section → setting → value, as `settle` returns them.
        source: the config.
    """
    text = write_yaml(values) if values else ""
    above: dict[int, list[str]] = {}
    for setting, at in read_yaml(text).lines.items():
        above.setdefault(at, []).extend(sheet.comments.get(setting, ()))
    lines = _commented(f"From {source.name} of {sheet.tool}, by loratune import.", "")
    if sheet.lost:
        lines += _commented("Not taken, although the result is another without it:", "")
        for entry in sheet.lost:
            lines += _commented(f"- {', '.join(entry.names) or entry.setting or 'default'}: {entry.reason}", "")
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        indent = line[: len(line) - len(line.lstrip())]
        for comment in above.get(number, ()):
            lines += _commented(comment, indent)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _commented(text: str, indent: str) -> list[str]:
    """Return a text as lines of a comment; what files hold in it can end no line."""
    plain = printable(shortened(" ".join(text.split()), 600))
    return textwrap.wrap(plain, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
