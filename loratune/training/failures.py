"""Messages for exhausted memory or disk, and warnings for optional steps that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import text_values
from loratune.model.files import local_folder
from loratune.model.memory import is_out_of_memory
from loratune.plain_files import read_json_object
from loratune.recipe.sections import Recipe
from loratune.writing import disk_errors_explained

ADVICE_LIMIT = 3
SHORTEST = 8
"""Minimum of training.max_length."""
MANY_LAYERS = 8
Made = TypeVar("Made")


def attempted(what: str, make: Callable[[], Made], warn: Callable[[str], None] = console.warn) -> Made | None:
    """Run an optional step of a finished run.

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
def machine_errors_explained(recipe: Recipe, held: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Turn out-of-memory and disk errors into one message.

    Args:
        recipe: the settings that can be changed.
        held: memory use by part, as far as known.

    Raises:
        LoratuneError: for memory, with the parts and the changes that help, the cheapest first.
    """
    try:
        with disk_errors_explained(Path(recipe.output)):
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sizes = ", ".join(f"{name} {size}" for name, size in held.items())
        lines = ["out of memory" + (f" with {sizes}" if sizes else "") + "; cheapest first:", *memory_advice(recipe)]
        raise LoratuneError("\n  ".join(lines), Exit.IO) from error


def _layers(recipe: Recipe) -> int:
    """Return the base's number of layers; a large enough number if it is not a local folder."""
    try:
        folder = local_folder(recipe.model)
        known = text_values(read_json_object(folder / "config.json")).get("num_hidden_layers") if folder else None
    except LoratuneError:  # not the error to report here
        known = None
    return known if isinstance(known, int) else 2 * MANY_LAYERS


def memory_advice(recipe: Recipe) -> list[str]:
    """Return flags that save memory and are not used yet, the cheapest first."""
    training, lora = recipe.training, recipe.lora
    advice = []
    if training.tokens_per_pass is None or training.tokens_per_pass > training.max_length:
        smaller = max(training.max_length, (training.tokens_per_pass or 0) // 2)
        advice.append(f"--training.tokens_per_pass {smaller}  (the same step in smaller parts)")
    if not training.gradient_checkpointing:
        advice.append("--training.gradient_checkpointing  (a third slower, far less memory)")
    if recipe.trains_base:
        advice.append("--method lora  (float32 weights, gradients and AdamW's averages of the adapter alone)")
    elif recipe.model.quantization != "nf4":
        advice.append("--model.quantization nf4  (a quarter of the base's memory)")
    if training.max_length > SHORTEST:
        advice.append(f"--training.max_length {max(SHORTEST, training.max_length // 2)}  (if few rows are that long)")
    if lora.target_modules == "all-linear" and not recipe.trains_base:
        advice.append("--lora.target_modules q_proj --lora.target_modules v_proj  (fewer matrices)")
    if lora.layers is None and not recipe.trains_base:
        layers = min(MANY_LAYERS, max(1, _layers(recipe) // 2))
        advice.append(f"--lora.layers 'last {layers}'  (no activations of earlier layers)")
    return advice[:ADVICE_LIMIT]
