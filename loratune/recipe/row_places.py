"""Finds the rows that a recipe names, and tells its own from others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loratune.plain_files import is_file
from loratune.recipe.data_sections import SourceSettings
from loratune.recipe.sections import Recipe


def drop_examples(values: dict[str, Any], path: Path | None, flags: dict[str, Any], shipped: Path) -> None:
    """Leave out what a shipped recipe has for the placeholders of its own rows, if only other rows are trained on.

    Args:
        values: section → setting → value of the recipe.
        path: of the recipe.
        flags: dotted setting → value.
        shipped: folder of what loratune ships.
    """
    data, given = values.get("data"), flags.get("data.train") or ()
    if not path or not path.resolve().is_relative_to(shipped / "configs") or not given or not isinstance(data, dict):
        return
    if {*([given] if isinstance(given, str) else given)}.isdisjoint(map(str, data.get("train") or ())):
        data.pop("placeholders", None)


def with_found_rows(recipe: Recipe, path: Path | None, shipped: Path) -> Recipe:
    """Resolve files of rows that do not exist in the working folder: relative to the recipe, or those of loratune.

    Args:
        recipe: the recipe.
        path: of its file; None if there is none.
        shipped: folder of what loratune ships.
    """
    places = [path.parent, path.parent.parent, shipped] if path else [shipped]

    def find(entry: str | SourceSettings) -> str | SourceSettings:
        if isinstance(entry, SourceSettings):
            return entry.model_copy(update={"path": find(entry.path)})
        plain = re.sub(r"(#\d*x?)+$", "", entry)
        if is_file(Path(plain)) or Path(plain).is_absolute() or plain.startswith(("hf:", "ms:")):
            return entry
        return next((str((place / entry).resolve()) for place in places if is_file(place / plain)), entry)

    data = recipe.data
    validation = data.validation if isinstance(data.validation, float) else [find(entry) for entry in data.validation]
    found = data.model_copy(update={"train": [find(entry) for entry in data.train], "validation": validation})
    return recipe.model_copy(update={"data": found})
