"""What is said when the machine has no more memory or disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratune.errors import Exit, LoratuneError
from loratune.model.memory import is_out_of_memory
from loratune.recipe.sections import Recipe
from loratune.writing import disk_errors_explained


@contextmanager
def machine_errors_explained(recipe: Recipe) -> Iterator[None]:
    """Turn a lack of memory or disk into one message; for memory with advice, cheapest change first."""
    try:
        with disk_errors_explained(Path(recipe.output)):
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise LoratuneError("out of memory; try, cheapest first\n" + _memory_advice(recipe), Exit.IO) from error


def _memory_advice(recipe: Recipe) -> str:
    training = recipe.training
    smaller = {"batch_size": 1, "gradient_accumulation": training.batch_size * training.gradient_accumulation}
    if training.tokens_per_batch:
        smaller = {"tokens_per_batch": max(8, training.tokens_per_batch // 2)}
    flags = " ".join(f"--training.{name} {value}" for name, value in smaller.items())
    advice = [
        f"{flags}  (the same step in smaller parts)",
        "--training.gradient_checkpointing  (slower, far less memory)",
        "--model.quantization nf4  (a quarter of the base's memory)",
        f"--training.max_length {max(8, training.max_length // 2)}  (if few rows are that long)",
    ]
    return "\n".join(f"  {line}" for line in advice)
