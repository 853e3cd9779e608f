"""What the processes of a sweep do: rehearse its recipes without models, or train one for a share of its steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

from loratune.data.assembly.split import Split
from loratune.errors import Exit, LoratuneError, Paused, bullet_list
from loratune.model.hardware import detect_hardware, visible_gpus
from loratune.model.memory import peak_memory_bytes
from loratune.recipe.sections import Recipe
from loratune.runs.folder import values_sha256
from loratune.sweep.start import Rehearsal
from loratune.training.checkpoints.resuming import AUTO, Resume
from loratune.training.gate import pass_gate
from loratune.training.run import train
from loratune.training.steps import plan_steps


def rehearse(recipes: Sequence[Recipe]) -> Rehearsal:
    """Prepare the rows of recipes, once for those that share them, and count the steps.

    Raises:
        LoratuneError: rows are refused, there are none to validate on, or recipes validate on different ones.
    """
    prepared = {key: pass_gate(recipe).checked() for key, recipe in {_rows_key(one): one for one in recipes}.items()}
    if len({_validation(data.validation) for data in prepared.values()}) > 1:
        raise LoratuneError(
            "the settings of the sweep change which rows, or which of their tokens, are validated on, so losses cannot "
            "be compared; give data.validation files of its own, or do not vary what shortens or removes rows",
            Exit.USAGE,
        )
    steps, problems = [], dict[str, None]()
    for recipe in recipes:
        try:
            steps.append(plan_steps(recipe.training, len(prepared[_rows_key(recipe)].train)).steps)
        except LoratuneError as error:
            problems[error.message] = None
    if problems:
        raise LoratuneError(f"the sweep cannot start:\n{bullet_list(list(problems))}", Exit.USAGE)
    digests = [hashlib.sha256(data.train.pool.digests.tobytes()).hexdigest() for data in prepared.values()]
    rows = values_sha256({"training": digests, "validation": _validation(next(iter(prepared.values())).validation)})
    date = next(iter(prepared.values())).prompt.date
    return Rehearsal(tuple(steps), rows, date, visible_gpus())


def train_share(recipe: Recipe, share: Fraction) -> int:
    """Start or continue a run, up to a share of its steps.

    Returns:
        The peak memory in bytes.

    Raises:
        LoratuneError: as `train` does.
        Interrupted: by a signal, before that.
    """
    with suppress(Paused):
        train(recipe, resume=Resume(AUTO), share=share)
    return peak_memory_bytes(detect_hardware())


def _rows_key(recipe: Recipe) -> str:
    """Return what recipes with the same rows have in common."""
    values = recipe.model_dump(mode="json", include={"model", "data", "prompt", "seed"})
    return values_sha256(values | {"max_length": recipe.training.max_length})


def _validation(split: Split | None) -> str:
    """Return what identifies validation rows, and how many of their tokens count."""
    if split is None:
        raise LoratuneError(
            "a sweep compares validation losses, and there are no validation rows: set data.validation", Exit.DATA
        )
    digest = hashlib.sha256(split.pool.digests.tobytes())
    return f"{digest.hexdigest()} {len(split)} {split.trained_tokens}"
