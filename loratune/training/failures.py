"""Messages for exhausted memory or disk, and warnings for optional steps that fail."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import text_values
from loratune.model.files import local_folder
from loratune.model.memory import is_out_of_memory
from loratune.plain_files import read_json_object
from loratune.recipe.sections import Recipe
from loratune.training.memory.changes import Change, possible_changes
from loratune.training.memory.prediction import Prediction
from loratune.writing import disk_errors_explained

ADVICE_LIMIT = 3
MANY_LAYERS = 8
Made = TypeVar("Made")


def attempted(what: str, make: Callable[[], Made], warn: Callable[[str], None] = console.warn) -> Made | None:
    """Run an optional step of a run.

    Args:
        what: name of the result, for the warning.
        make: the step.
        warn: called if the step fails.

    Returns:
        The result; None if the step failed.
    """
    try:
        return make()
    except Exception as error:
        warn(f"{what} failed, and the run finishes without it: {type(error).__name__}: {error}")
        return None


@contextmanager
def machine_errors_explained(recipe: Recipe, prediction: Prediction | None = None) -> Iterator[None]:
    """Turn out-of-memory and disk errors into one message.

    Args:
        recipe: the settings that can be changed.
        prediction: of the memory, as far as known.

    Raises:
        LoratuneError: for memory, with the parts and the changes that help, the cheapest first.
    """
    try:
        with disk_errors_explained(Path(recipe.output)):
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = ""
        if prediction:
            sizes = ", ".join(f"{name} {console.memory(size)}" for name, size in prediction.parts.items())
            told = f" with {sizes}, a pass of {prediction.tokens:,} tokens"
        lines = [f"out of memory{told}; cheapest first:", *memory_advice(recipe, prediction)]
        raise LoratuneError("\n  ".join(lines), Exit.IO) from error


def _layers(recipe: Recipe) -> int:
    """Return the base's number of layers; a large enough number if it is not a local folder."""
    try:
        folder = local_folder(recipe.model)
        known = text_values(read_json_object(folder / "config.json")).get("num_hidden_layers") if folder else None
    except LoratuneError:  # not the error to report here
        known = None
    return known if isinstance(known, int) else 2 * MANY_LAYERS


def memory_advice(recipe: Recipe, prediction: Prediction | None = None) -> list[str]:
    """Return flags that save memory and are not used yet, the cheapest first; `loratune plan` computes what each saves.

    Args:
        recipe: the recipe.
        prediction: of its memory, as far as known.
    """
    tokens = prediction.tokens if prediction else recipe.training.tokens_per_pass or recipe.training.max_length
    first = dict[tuple[str, ...], Change]()
    for change in possible_changes(recipe, tokens, _layers(recipe), prediction.processes if prediction else 1):
        first.setdefault(tuple(change.settings), change)
    return [f"{shlex.join(change.flags)}  ({change.price})" for change in first.values()][:ADVICE_LIMIT]
