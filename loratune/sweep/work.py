"""What the processes of a sweep do: rehearse its recipes without models, or train one for a share of its steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from loratune.data.assembly.dataset import as_dataset
from loratune.data.assembly.split import Split
from loratune.data.preparation import PreparedData
from loratune.errors import Exit, LoratuneError, Paused, bullet_list
from loratune.model.files import find_tokenizer
from loratune.model.hardware import detect_hardware, visible_gpus
from loratune.model.memory import peak_memory_bytes
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.sections import Recipe
from loratune.runs.folder import STATUS, values_sha256
from loratune.runs.status import read_status
from loratune.sweep.forgetting import measure_forgetting
from loratune.sweep.messages import Rehearsal, Trained
from loratune.training.checkpoints.resuming import AUTO, Resume
from loratune.training.failures import attempted
from loratune.training.gate import pass_gate
from loratune.training.run import train
from loratune.training.steps import plan_steps

OTHER_VALIDATION = (
    "the settings of the sweep change which rows, or which of their tokens, are validated on, so losses cannot be "
    "compared; give data.validation files of its own, or do not vary what shortens or removes rows"
)
SAME_SIZE = 1.01
"""Ratio up to which two texts count as one that tokenizers write differently, such as a space before it."""


def rehearse(recipes: Sequence[Recipe]) -> Rehearsal:
    """Prepare the rows of recipes, once for those that share them, and count the steps.

    Raises:
        LoratuneError: rows are refused, there are none to validate on, or recipes validate on different ones.
    """
    prepared = {key: pass_gate(recipe).checked() for key, recipe in {_rows_key(one): one for one in recipes}.items()}
    bases = {recipe.model.base: recipe for recipe in recipes}
    for base in bases:
        keys = {_rows_key(recipe) for recipe in recipes if recipe.model.base == base}
        if len({_validation(prepared[key].validation) for key in keys}) > 1:
            raise LoratuneError(OTHER_VALIDATION, Exit.USAGE)
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
    per_byte = _bits_per_byte(bases, prepared) if len(bases) > 1 else {}
    return Rehearsal(tuple(steps), rows, date, visible_gpus(), per_byte)


def train_share(recipe: Recipe, share: Fraction) -> Trained:
    """Start or continue a run, up to a share of its steps; after the last one, measure what it has forgotten.

    Raises:
        LoratuneError: as `train` does.
        Interrupted: by a signal, before that.
    """
    run = Path(recipe.output)
    was_complete = (run / STATUS).is_file() and read_status(run).state == "finished"
    try:
        train(recipe, resume=Resume(AUTO), share=share)
    except Paused:
        return Trained(peak_memory_bytes(detect_hardware()))
    peak = None if was_complete else peak_memory_bytes(detect_hardware())
    return Trained(peak, attempted("the measurement of what was forgotten", lambda: measure_forgetting(run)))


def _bits_per_byte(bases: Mapping[str, Recipe], prepared: Mapping[str, PreparedData]) -> dict[str, float]:
    """Return what turns each base's loss per token into bits per byte of the same answers.

    Raises:
        LoratuneError: the bases are validated on different answers, such as where rows are too long for one of them.
    """
    splits = {base: prepared[_rows_key(recipe)].validation for base, recipe in bases.items()}
    sizes = {base: _answer_bytes(recipe, splits[base]) for base, recipe in bases.items()}
    rows = {(split.pool.digests.tobytes(), len(split)) for split in splits.values() if split}
    if len(rows) > 1 or max(sizes.values()) > SAME_SIZE * min(sizes.values()):
        raise LoratuneError(OTHER_VALIDATION, Exit.USAGE)
    bits = max(sizes.values()) * math.log(2)
    return {base: split.trained_tokens / bits for base, split in splits.items() if split}


def _answer_bytes(recipe: Recipe, split: Split | None) -> int:
    """Return the bytes of the text that is validated on, in UTF-8 and without special tokens."""
    tokenizer = load_tokenizer(find_tokenizer(recipe.model))
    answers = ([label for label in row["labels"] if label >= 0] for row in as_dataset(split)) if split else ()
    return sum(len(tokenizer.decode(labels, skip_special_tokens=True).encode()) for labels in answers)


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
