"""What makes a recipe need less memory: the settings to change, the cheapest first, each with its price."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.commands import flag_words, setting_flags
from loratune.errors import LoratuneError
from loratune.progress import Tell
from loratune.recipe.loading import with_settings
from loratune.recipe.sections import Recipe
from loratune.training.memory.prediction import Prediction

SHORTEST = 128
"""Tokens of a row; few have their answers within less."""
SMALLEST_PASS = 256
"""Tokens of a pass; smaller ones save little, and each costs a launch of every kernel."""


@dataclass(frozen=True)
class Change:
    """Settings that save memory."""

    settings: Mapping[str, Any]
    """Dotted setting → value."""
    price: str

    @property
    def flags(self) -> list[str]:
        """The words of a command line that make the change."""
        return flag_words(setting_flags(self.settings))

    @property
    def words(self) -> str:
        """The same as one text, for messages."""
        return " ".join(self.flags)

    def of(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the change."""
        return with_settings(recipe, self.settings)


@dataclass(frozen=True)
class Outcome:
    """A change, and what the recipe would take with it alone."""

    change: Change
    peak_bytes: int
    fits: bool


def possible_changes(recipe: Recipe, tokens: int, layers: int, processes: int = 1) -> Iterator[Change]:
    """Yield the changes that the recipe does not have yet: those that change nothing of what is learnt come first.

    Args:
        recipe: the recipe.
        tokens: of the largest pass.
        layers: of the base.
        processes: among which a base can be divided.
    """
    training, model, lora = recipe.training, recipe.model, recipe.lora
    for smaller in _halves(tokens, SMALLEST_PASS):
        yield Change({"training.tokens_per_pass": smaller}, "the same step in smaller passes, which take longer")
    if not training.gradient_checkpointing:
        yield Change({"training.gradient_checkpointing": True}, "activations are computed twice: a third slower")
    if processes > 1 and model.sharding == "none" and not recipe.trains_base:
        yield Change({"model.sharding": "fsdp"}, "layers are gathered for each pass: needs fast links between GPUs")
    if recipe.trains_base:
        if training.optimizer == "adamw":
            yield Change({"training.optimizer": "adamw_8bit"}, "AdamW's averages are rounded to 8 bits")
        yield Change({"method": "lora"}, "an adapter is trained in place of the base's own weights")
    elif model.quantization != "nf4":
        yield Change({"model.quantization": "nf4"}, "the base is rounded to 4 bits")
    for length in _halves(training.max_length, SHORTEST):
        yield Change({"training.max_length": length}, "longer rows are left out or cut")
    if lora.target_modules == "all-linear" and not recipe.trains_base:
        yield Change({"lora.target_modules": "attention"}, "MLPs learn nothing")
    if not recipe.trains_base and lora.layers is None and layers > 1:
        yield Change({"lora.layers": f"last {layers // 2}"}, "earlier layers learn nothing")


def _halves(most: int, least: int) -> Iterator[int]:
    """Yield the powers of two below a number, down to another one."""
    size = 1 << max(0, most - 1).bit_length() >> 1
    while size >= least and size < most:
        yield size
        size //= 2


def outcomes(
    recipe: Recipe,
    changes: Sequence[Change],
    predict: Callable[[Recipe], Prediction],
    room: int,
    tell: Tell,
) -> list[Outcome]:
    """Predict the memory with each change alone, in order; what saves nothing or does not fit the recipe is left out.

    Of several sizes of one setting, the largest that suffices stays, or else the smallest. Before each prediction, the
    change is told.
    """
    before, found = predict(recipe).peak_bytes, dict[tuple[str, ...], Outcome]()
    for tried, change in enumerate(changes):
        tell(tried, change.words)
        name = tuple(change.settings)
        if name in found and found[name].fits:
            continue
        try:
            peak = predict(change.of(recipe)).peak_bytes
        except LoratuneError:  # such as nf4 on a base that has nothing to quantise
            continue
        if peak < before:
            found[name] = Outcome(change, peak, peak <= room)
    return list(found.values())


def fitting(
    recipe: Recipe, found: list[Outcome], predict: Callable[[Recipe], Prediction], room: int, tell: Tell
) -> list[Change] | None:
    """Return the cheapest changes with which a recipe fits; None if all together do not suffice.

    One that suffices alone is preferred to several. Else the changes are added in order until it fits, and those that
    turn out not to be needed are taken out again.
    """
    alone = next((one.change for one in found if one.fits), None)
    if alone:
        return [alone]
    taken: list[Change] = []
    for one in found:
        tell(len(taken), one.change.words)
        try:
            peak = predict(_with(recipe, [*taken, one.change])).peak_bytes
        except LoratuneError:  # two changes that exclude each other
            continue
        taken.append(one.change)
        if peak <= room:
            return _needed(recipe, taken, predict, room, tell)
    return None


def _needed(
    recipe: Recipe, taken: list[Change], predict: Callable[[Recipe], Prediction], room: int, tell: Tell
) -> list[Change]:
    """Leave out changes without which a recipe still fits, the dearest of the earlier ones first."""
    for change in reversed(taken[:-1]):
        rest = [one for one in taken if one is not change]
        tell(len(rest), f"without {change.words}")
        if predict(_with(recipe, rest)).peak_bytes <= room:
            taken = rest
    return taken


def _with(recipe: Recipe, changes: list[Change]) -> Recipe:
    return with_settings(recipe, {name: value for change in changes for name, value in change.settings.items()})
