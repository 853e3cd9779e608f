"""Loads a Recipe from YAML and flags, reports all problems in one message, and writes a Recipe as YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune import console
from loratune.errors import Exit, LoratuneError, Problem
from loratune.nearest import nearest
from loratune.plain_files import is_file, nearest_beside, open_plain
from loratune.recipe.flag_values import parse_flag
from loratune.recipe.method_sections import METHOD, METHOD_SECTIONS
from loratune.recipe.names import drop_keys, rename_keys, renamed_flags
from loratune.recipe.problems import described_problems, refused_recipe, with_place
from loratune.recipe.row_places import drop_examples, with_found_rows
from loratune.recipe.sections import Recipe, settings_with_dropped
from loratune.recipe.sweep_section import SWEEP, SweepSettings
from loratune.recipe.yaml_reader import SURROGATE, Document, read_yaml, write_yaml

MOST_BYTES = 2**20
"""Maximum size of a recipe in bytes; parsing this much takes about a second."""
ROWS = re.compile(r"\.(jsonl|csv|parquet)(\.(gz|zst))?$")
"""Ends of names that files of rows have and recipes don't; JSON may be either."""
PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"
# An installed wheel has configs/ and data/ in its assets; a checkout has them next to the package.
SHIPPED = ASSETS if (ASSETS / "configs").is_dir() else PACKAGE.parent


def shipped_recipes() -> list[Path]:
    return sorted((SHIPPED / "configs").glob("*.yaml"))


def shipped_sweeps() -> list[Path]:
    return sorted((SHIPPED / "configs" / "sweeps").glob("*.yaml"))


def shipped_rows(path: str) -> str:
    """Return what recipes call a file of rows that loratune ships, such as data/general.json; empty for other files."""
    shipped = SHIPPED.resolve()
    return str(Path(path).relative_to(shipped)) if Path(path).is_relative_to(shipped / "data") else ""


def is_recipe_name(word: str) -> bool:
    """Return whether a word of a command line is the name of a YAML file or of a shipped recipe."""
    return Path(word).suffix in (".yaml", ".yml") or word in {path.stem for path in shipped_recipes()}


def _is_recipe(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") and is_file(path)


def find_recipe(name: str, known: Iterable[Path] | None = None) -> Path:
    """Return the path of a recipe file, or of a shipped recipe given by name.

    Args:
        name: path or bare name.
        known: the files that a bare name may stand for; default is the shipped recipes.

    Raises:
        LoratuneError: there is neither.
    """
    path = Path(name)
    if is_file(path):
        return path
    shipped = {recipe.stem: recipe for recipe in (shipped_recipes() if known is None else known)}
    bare = name.removesuffix(".yaml")
    if bare in shipped:
        return shipped[bare]
    inner = path / "recipe.yaml"
    meant = str(inner) if is_file(inner) else nearest_beside(path, _is_recipe) or nearest(bare, shipped)
    hint = f"did you mean {meant}? " if meant else ""
    raise LoratuneError(
        f"recipe {name!r}: no such file, and no shipped recipe of that name; {hint}shipped are: {', '.join(shipped)}",
        Exit.USAGE,
    )


def load_recipe(config: str | None, flags: dict[str, Any]) -> Recipe:
    """Read a recipe, override it with flags, and validate the result.

    Args:
        config: path or bare name of a recipe; None to use flags alone.
        flags: dotted setting → text, list of texts, or bool, as given on the command line.

    Raises:
        LoratuneError: lists all problems, each with its line or flag.
    """
    path = find_recipe(config) if config is not None else None
    document = _read(path) if path else Document(values={})
    return with_found_rows(_validated(document, path, flags, is_own=False), path, SHIPPED)


def load_sweep(config: str | None, flags: dict[str, Any], sweep_flags: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """Read a recipe and its section `sweep`, override both with flags, and validate the recipe.

    Args:
        config: path of a recipe, or bare name of a shipped recipe or sweep; None to use flags alone.
        flags: as for `load_recipe`.
        sweep_flags: setting of the sweep → value, which replaces that of the section.

    Returns:
        The recipe, and the section's values, which are not validated.

    Raises:
        LoratuneError: lists all problems of the recipe.
    """
    path = find_recipe(config, [*shipped_recipes(), *shipped_sweeps()]) if config is not None else None
    document = _read(path) if path else Document(values={})
    section = document.values.pop(SWEEP, None) if isinstance(document.values, dict) else None
    section = {} if section is None else section
    over = (section.get("over") or {}) if isinstance(section, dict) else None
    if not isinstance(over, dict):
        raise LoratuneError(
            f"{path}: {SWEEP} must hold settings of its own, one per line, and {SWEEP}.over a line for each setting "
            "with its values",
            Exit.USAGE,
        )
    over = {**over, **sweep_flags.pop("over", {})}
    recipe = with_found_rows(_validated(document, path, flags, is_own=False), path, SHIPPED)
    return recipe, {**section, **sweep_flags, "over": over}


def load_written_recipe(path: Path) -> Recipe:
    """Load the recipe.yaml of a run, which an earlier version may have written.

    Renamed settings are read under their present names, and dropped ones as in a user's recipe, but without notices.

    Raises:
        LoratuneError: lists all problems.
    """
    return with_found_rows(_validated(_read(path), path, {}, is_own=True), path, SHIPPED)


def validate_settings(values: dict[str, Any], flags: dict[str, Any], source: Path) -> Recipe:
    """Validate settings that are not read from a recipe's file; their data files stay as they are written.

    Args:
        values: section → setting → value; the flags are put into it.
        flags: see `load_recipe`.
        source: where the settings come from, for messages.

    Raises:
        LoratuneError: lists all problems.
    """
    return _validated(Document(values=values), source, flags, is_own=False)


def _validated(document: Document, path: Path | None, flags: dict[str, Any], is_own: bool) -> Recipe:
    problems = [Problem(message, line=line) for line, message in document.problems]
    values, recipe = document.values, None
    if values is None and not problems:
        problems.append(Problem("the file is empty; a recipe needs at least model.base and data.train"))
    elif not isinstance(values, dict) and not problems:
        advice = "; give rows with --data.train" if isinstance(values, list) else ""
        told = "the file must hold settings (section: …) at its top, not a list or a single value"
        problems.append(Problem(f"{told}{advice}"))
    if isinstance(values, dict):
        problems += [Problem(problem) for problem in _rename(document, str(path), is_own)]
        flags = renamed_flags(flags)
        drop_examples(values, path, flags, SHIPPED)
        wrong_flags = _lay_over(values, flags)
        problems += [Problem(message, key=f"--{dotted}") for dotted, message in wrong_flags.items()]
        try:
            drop_keys(values, (lambda notice: None) if is_own else console.say)
        except ValueError as error:
            problems.append(Problem(str(error)))
        used_flags = flags.keys() - wrong_flags
        try:
            recipe = Recipe.model_validate(_with_sections(values))
        except ValidationError as error:
            known_lines = {line for line, _ in document.problems}
            # A value with a syntax problem is reported as missing too; its line is already listed.
            described = described_problems(error.errors(), document.lines, used_flags)
            problems += [problem for problem in described if problem.line not in known_lines]
    if problems or recipe is None:
        raise refused_recipe(problems, path, flags)
    return recipe


def _rename(document: Document, path: str, is_own: bool) -> list[str]:
    """Rename settings of earlier versions in place; return the problems."""
    renamed: list[str] = []
    try:
        lines = rename_keys(document.values, document.lines, lambda old, new: renamed.append(f"{old} is now {new}"))
    except ValueError as error:
        return str(error).splitlines()
    document.lines.clear()
    document.lines.update(lines)
    if renamed and not is_own:
        console.say(f"{path}: {'; '.join(renamed)} (the old names still work)")
    return []


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values of some settings; what the recipe leaves to defaults stays so.

    Args:
        recipe: the recipe.
        settings: dotted setting → value, as in a recipe file. With a method among them, what the recipe has for another
            method is left out.

    Raises:
        LoratuneError: lists the problems, one a line.
    """
    values = recipe.model_dump(exclude_unset=True)
    if METHOD in settings:
        values = {name: own for name, own in values.items() if name not in METHOD_SECTIONS or name == settings[METHOD]}
    for dotted, value in settings.items():
        section, _, name = dotted.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    try:
        return Recipe.model_validate(_with_sections(values))
    except ValidationError as error:
        problems = [with_place(problem) for problem in described_problems(error.errors(), {}, set(settings))]
        raise LoratuneError("\n".join(problems), Exit.USAGE) from error


def dump_sweep(recipe: Recipe, sweep: SweepSettings) -> str:
    """Return a recipe and its section `sweep` as YAML that `load_sweep` reads back."""
    return write_yaml({SWEEP: sweep.model_dump(exclude_none=True), **recipe.model_dump(exclude_unset=True)})


def dump_recipe(recipe: Recipe, is_ascii: bool = False) -> str:
    """Return a recipe as YAML that `load_recipe` reads back to an equal Recipe."""
    return write_yaml(recipe.model_dump(), is_ascii)


def _read(path: Path) -> Document:
    if ROWS.search(path.name):
        raise LoratuneError(
            f"{path}: rows, not a recipe; give them with --data.train to sft or data check, and a recipe with --config",
            Exit.USAGE,
        )
    try:
        with open_plain(path) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise LoratuneError(
                f"{path}: larger than {MOST_BYTES:,} bytes, too large for a recipe; put rows into a separate file, "
                "named in data.train",
                Exit.USAGE,
            )
        return read_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LoratuneError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8", Exit.USAGE) from error
    except OSError as error:
        raise LoratuneError(f"{path}: cannot be read: {error.strerror}", Exit.IO) from error


def _with_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Replace missing and null sections with their defaults."""
    sections = [name for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields")]
    return values | {name: {} for name in sections if values.get(name) is None}


def _lay_over(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, str]:
    """Put flags into `values`; return setting → problem for flags that cannot be parsed."""
    problems = {}
    fields = settings_with_dropped()
    for dotted, given in flags.items():
        try:
            if SURROGATE.search("".join(given) if isinstance(given, list) else str(given)):
                raise ValueError(f"not UTF-8 text: {given!r}")
            value = parse_flag(given, fields[dotted])
        except ValueError as error:
            problems[dotted] = str(error)
            continue
        section, _, name = dotted.rpartition(".")
        place = values
        if section:
            place = values.get(section) or {}
            if not isinstance(place, dict):
                continue  # validation reports the section
            values[section] = place
        place[name] = value
    return problems
