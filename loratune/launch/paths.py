"""Replaces the paths of a recipe by those that a job sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loratune.data.sources import hub_name, parse_source
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.files import local_folder
from loratune.plain_files import is_file, nearest_told
from loratune.recipe.data_sections import SourceSettings
from loratune.recipe.loading import SHIPPED
from loratune.recipe.sections import TINY_QWEN, Recipe

Entry = str | SourceSettings
"""Of data.train or data.validation."""


@dataclass(frozen=True)
class Placed:
    """A recipe as the job reads it."""

    recipe: Recipe
    moved: dict[str, str]
    """Path on this machine → path in the job, of the inputs that are here and that loratune itself does not have."""


def placed(recipe: Recipe, at: Callable[[Path], str], output: str, own: str | None = None) -> Placed:
    """Return a recipe with the paths of the job.

    Args:
        recipe: with paths of this machine.
        at: absolute path of an input on this machine → its path in the job.
        output: the run folder in the job.
        own: a folder that the job alone has; paths below it stay as they are, and are not looked up here.

    Raises:
        LoratuneError: lists the inputs that are not here.
    """
    placing = _Placing(at, own)
    data, sources = recipe.data, {"train": recipe.data.train}
    if isinstance(data.validation, list):
        sources["validation"] = data.validation
    data = data.model_copy(update={name: [placing.source(entry) for entry in each] for name, each in sources.items()})
    model = recipe.model.model_copy(update={"base": placing.base(recipe)})
    if placing.problems:
        listed = bullet_list([problem.message for problem in placing.problems])
        raise LoratuneError(f"the job's inputs have problems:\n{listed}", placing.problems[0].exit_code)
    return Placed(recipe.model_copy(update={"data": data, "model": model, "output": output}), placing.moved)


def below(root: str, path: str, folder: str) -> str:
    """Return the place below a root of a path of this machine.

    Args:
        root: absolute path in the job.
        path: kept if it is below the root; a relative one, or one below the working folder, stays as it is there.
        folder: folder below the root for other paths, of which the name is kept.
    """
    if PurePosixPath(path).is_relative_to(root):
        return path
    here = Path.cwd()
    full = Path(os.path.normpath(here / path))
    inside = full.relative_to(here) if full.is_relative_to(here) else Path(folder, full.name)
    return str(PurePosixPath(root, inside))


class _Placing:
    """Looks up the inputs of a recipe."""

    def __init__(self, at: Callable[[Path], str], own: str | None) -> None:
        self._at, self._own = at, own
        self.moved: dict[str, str] = {}
        self.problems: list[LoratuneError] = []

    def source(self, entry: Entry) -> Entry:
        """Return an entry of data.train or data.validation with the job's path."""
        if isinstance(entry, SourceSettings):
            return entry.model_copy(update={"path": self.source(entry.path)})
        try:
            name = parse_source(entry).name
            if hub_name(name) or self._is_own(name):
                return entry
            if not is_file(Path(name)):
                raise LoratuneError(f"{name}: no such file{nearest_told(Path(name), is_file)}", Exit.DATA)
        except LoratuneError as problem:
            self.problems.append(problem)
            return entry
        return self._place(Path(name)) + entry[len(name) :]

    def base(self, recipe: Recipe) -> str:
        """Return model.base with the job's path, where it is a folder."""
        base = recipe.model.base
        if base == TINY_QWEN or self._is_own(base):
            return base
        try:
            folder = local_folder(recipe.model)
        except LoratuneError as problem:
            self.problems.append(problem)
            return base
        return self._place(folder) if folder else base

    def _is_own(self, path: str) -> bool:
        return self._own is not None and PurePosixPath(path).is_relative_to(self._own)

    def _place(self, path: Path) -> str:
        full = path.absolute()
        if self._own is not None and full.is_relative_to(SHIPPED / "data"):
            return str(full.relative_to(SHIPPED))  # the job's own loratune finds them by this name
        if str(full) not in self.moved:
            there = PurePosixPath(self._at(full))
            if str(there) in self.moved.values():
                there = there.with_name(f"{len(self.moved)}-{there.name}")
            self.moved[str(full)] = str(there)
        return self.moved[str(full)]
