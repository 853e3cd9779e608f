"""Loads a Recipe from YAML and flags, reports all problems in one message, and writes a Recipe as YAML."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from loratune import console
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import is_file, open_plain
from loratune.recipe.data_sections import SourceSettings
from loratune.recipe.flag_values import parse_flag
from loratune.recipe.names import current_name, drop_keys, rename_keys
from loratune.recipe.sections import Recipe, iterate_settings, settings_with_dropped
from loratune.recipe.suggestions import suggestion
from loratune.recipe.yaml_reader import SURROGATE, Document, read_yaml, write_yaml

FORMS = ("text", "settings")
"""Tags of the two forms of a data.train entry, which pydantic adds to an error's location."""
MOST_BYTES = 2**20
"""Maximum size of a recipe in bytes; parsing this much takes about a second."""
PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"
# An installed wheel has configs/ and data/ in its assets; a checkout has them next to the package.
SHIPPED = ASSETS if (ASSETS / "configs").is_dir() else PACKAGE.parent


def shipped_recipes() -> list[Path]:
    return sorted((SHIPPED / "configs").glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the path of a recipe file, or of a shipped recipe given by name.

    Raises:
        LoratuneError: there is neither.
    """
    path = Path(name)
    if is_file(path):
        return path
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    bare = name.removesuffix(".yaml")
    if bare in shipped:
        return shipped[bare]
    close = difflib.get_close_matches(bare, shipped, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
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
    return _validated(document, path, flags, is_own=False)


def load_written_recipe(path: Path) -> Recipe:
    """Load the recipe.yaml of a run, which an earlier version may have written.

    Renamed settings are read under their present names, and dropped ones as in a user's recipe, but without notices.

    Raises:
        LoratuneError: lists all problems.
    """
    return _validated(_read(path), path, {}, is_own=True)


def _validated(document: Document, path: Path | None, flags: dict[str, Any], is_own: bool) -> Recipe:
    problems = [(line, f"line {line}: {message}") for line, message in document.problems]
    values, recipe = document.values, None
    if values is None and not problems:
        problems.append((0, "the file is empty; a recipe needs at least model.base and data.train"))
    elif not isinstance(values, dict) and not problems:
        problems.append((0, "the file must hold settings (section: …) at its top, not a list or a single value"))
    if isinstance(values, dict):
        problems += [(0, problem) for problem in _rename(document, str(path), is_own)]
        flags = _renamed_flags(flags)
        wrong_flags = _lay_over(values, flags)
        problems += [(0, f"--{dotted}: {message}") for dotted, message in wrong_flags.items()]
        try:
            drop_keys(values, (lambda notice: None) if is_own else console.say)
        except ValueError as error:
            problems.append((0, str(error)))
        used_flags = flags.keys() - wrong_flags
        try:
            recipe = Recipe.model_validate(_with_sections(values))
        except ValidationError as error:
            known_lines = {line for line, _ in document.problems}
            # A value with a syntax problem is reported as missing too; its line is already listed.
            described = _describe_all(error.errors(), document.lines, used_flags)
            problems += [(line, message) for line, message in described if line not in known_lines]
    if problems or recipe is None:
        source = str(path) if path else "flags alone, without --config"
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        listed = bullet_list([message for _, message in sorted(problems, key=lambda problem: problem[0])], limit=40)
        raise LoratuneError(f"{source}: the recipe has {count}:\n{listed}", Exit.USAGE)
    return _with_found_data(recipe, path)


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


def _renamed_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return flags under their present names, with a notice for each renamed one.

    Raises:
        LoratuneError: a setting is given under both names.
    """
    present: dict[str, Any] = {}
    for name, value in flags.items():
        now = current_name(name) or name
        if now in present or (now != name and now in flags):
            raise LoratuneError(f"--{name} is now called --{now}, and both are given; remove --{name}", Exit.USAGE)
        if now != name:
            console.say(f"--{name} is now --{now} (the old name still works)")
        present[now] = value
    return present


def dump_recipe(recipe: Recipe, is_ascii: bool = False) -> str:
    """Return a recipe as YAML that `load_recipe` reads back to an equal Recipe."""
    return write_yaml(recipe.model_dump(), is_ascii)


def _read(path: Path) -> Document:
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


def _describe_all(details: list[ErrorDetails], lines: dict[str, int], flags: set[str]) -> list[tuple[int, str]]:
    """Return line and text of each problem; errors for the branches of a union are merged into one."""
    messages: dict[tuple[int, str], list[str]] = {}
    for detail in details:
        line, where, message = _describe(detail, lines, flags)
        messages.setdefault((line, where), []).append(message)
    return [(line, where + _joined(found)) for (line, where), found in messages.items()]


def _joined(messages: list[str]) -> str:
    """Join the messages about one value: `must be a valid number, or must be a valid list; got True`."""
    if len(messages) == 1:
        return messages[0]
    parts = [message.partition("; got ") for message in messages]
    value = next((value for _, got, value in parts if got), "nothing")
    return f"{', or '.join(head for head, _, _ in parts)}; got {value}"


def _describe(detail: ErrorDetails, lines: dict[str, int], flags: set[str]) -> tuple[int, str, str]:
    """Return line, place with setting, and message of one pydantic error."""
    names = [str(part) for part in detail["loc"] if part not in FORMS]
    known = {name for name, _ in iterate_settings()} | set(Recipe.model_fields)
    line = _line(".".join(names), lines)
    while names and ".".join(names) not in known and detail["type"] != "extra_forbidden":
        names.pop()  # within a list or union: name the setting itself
    setting = ".".join(names)
    message = _message(detail, setting)
    if setting in flags:
        return 0, f"--{setting}: ", message
    place = f"line {line}: " if line else ""
    return line, f"{place}{setting}: " if setting else place, message


def _line(dotted: str, lines: dict[str, int]) -> int:
    while dotted and dotted not in lines:
        dotted = dotted.rpartition(".")[0]
    return lines.get(dotted, 0)


def _message(detail: ErrorDetails, setting: str) -> str:
    value = _shortened(repr(detail.get("input")))
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            is_section = isinstance(detail.get("input"), dict) and "." not in setting
            known = Recipe.model_fields if is_section else (name for name, _ in iterate_settings())
            return f"no such setting{suggestion(setting, known)}"
        case "missing":
            return f"must be given, in the recipe or as --{setting}"
        case "literal_error":
            return f"expected {context['expected']}; got {value}"
        case "value_error":
            return f"{context['error']}" + (f"; got {value}" if setting else "")
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "model_type" | "model_attributes_type":
            return f"must hold settings of its own, one per line; got {value}"
        case _:
            return f"{detail['msg'].replace('Input should be', 'must be')}; got {value}"


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _with_found_data(recipe: Recipe, path: Path | None) -> Recipe:
    """Resolve data files that do not exist in the working folder relative to the recipe."""
    places = [path.parent, path.parent.parent, SHIPPED] if path else [SHIPPED]

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
