"""What the tools may read and write: files below some folders, and nothing over the network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import read_json_object
from loratune.recipe.loading import SHIPPED, shipped_recipes
from loratune.recipe.sections import TINY_QWEN
from loratune.runs.folder import MANIFEST

LOCAL_TRACKERS = {"none", "tensorboard"}
"""Trackers that write files alone."""


@dataclass(frozen=True)
class Bounds:
    """The folders of a server; links are followed before a path is judged."""

    root: Path
    """Resolved. Relative paths are relative to it, and results are written below it alone."""
    readable: tuple[Path, ...]
    """Resolved. Further folders to read from."""

    def to_write(self, path: str) -> Path:
        """Return the path of a result.

        Raises:
            LoratuneError: it is not below the root.
        """
        return self._within(path, (self.root,))

    def to_read(self, path: str) -> Path:
        """Return the path of an input.

        Raises:
            LoratuneError: it is in none of the folders.
        """
        return self._within(path, (self.root, *self.readable))

    def _within(self, path: str, folders: tuple[Path, ...]) -> Path:
        if "\0" in path:
            raise LoratuneError(f"{path!r} is no path; leave out the character NUL", Exit.USAGE)
        found = Path(os.path.realpath(self.root / _expanded(path)))
        if not any(found.is_relative_to(folder) for folder in folders):
            read = ", or have the server started with --read for its folder" if len(folders) > 1 else ""
            raise LoratuneError(f"{path} is outside of {self.root}; give a path below it{read}", Exit.USAGE)
        return found

    def recipe(self, name: str) -> str:
        """Return the path of a recipe, or the name of a shipped one."""
        bare = name.removesuffix(".yaml")
        is_shipped = any(path.stem == bare for path in shipped_recipes())
        return bare if is_shipped and not (self.root / name).exists() else str(self.to_read(name))

    def model(self, name: str) -> str:
        """Return a model: the path of a folder, or a name that is no path, such as a hub id."""
        is_path = name.startswith(("/", ".", "~")) or (self.root / name).exists()
        return str(self.to_read(name)) if is_path and name != TINY_QWEN else name

    def adapter(self, path: str) -> Path:
        """Return the folder of an adapter, whose base may be read too."""
        folder = self.to_read(path)
        for base in _bases(folder):
            self.model(base)
        return folder

    def require_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Check all that a resolved recipe reads, writes and connects to.

        Raises:
            LoratuneError: lists all that is outside of the bounds.
        """
        data = recipe["data"]
        validation = data["validation"] if isinstance(data["validation"], list) else []
        checks = [(self.to_write, recipe["output"]), (self.model, recipe["model"]["base"])]
        checks += [(self._rows, one if isinstance(one, str) else one["path"]) for one in [*data["train"], *validation]]
        problems = []
        for check, name in checks:
            try:
                check(name)
            except LoratuneError as error:
                problems.append(error.message)
        if recipe["model"]["hub"] != "huggingface":
            problems.append("model.hub modelscope would download; give model.base a folder")
        if remote := set(recipe["tracking"]["report_to"]) - LOCAL_TRACKERS:
            problems.append(f"tracking.report_to {', '.join(sorted(remote))} would connect; take none or tensorboard")
        if problems:
            raise LoratuneError(f"the recipe goes beyond this server:\n{bullet_list(problems)}", Exit.USAGE)

    def _rows(self, source: str) -> None:
        if source.startswith("ms:"):
            raise LoratuneError(f"{source} would be downloaded; give a file", Exit.USAGE)
        plain = re.sub(r"(#\d*x?)+$", "", source)
        if not source.startswith("hf:") and not Path(plain).is_relative_to(SHIPPED / "data"):
            self.to_read(plain)


def _expanded(path: str) -> Path:
    """Return a path with the home that its ~ stands for; one of nobody is a name like others."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _bases(adapter: Path) -> Iterator[str]:
    """Yield the bases that an adapter's files name, folders or hub ids: its run's manifest, and PEFT's config."""
    places = [adapter / MANIFEST, *(parent / MANIFEST for parent in list(adapter.parents)[:2])]
    for path in places:
        if path.is_file():
            base = read_json_object(path).get("base")
            yield from _text(base.get("path") if isinstance(base, dict) else None)
    for path in (adapter / "adapter_config.json", adapter / "adapter" / "adapter_config.json"):
        if path.is_file():
            yield from _text(read_json_object(path).get("base_model_name_or_path"))


def _text(base: Any) -> Iterator[str]:
    if isinstance(base, str):
        yield base
