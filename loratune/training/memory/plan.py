"""The answer of `loratune plan`: what a recipe takes, whether it fits, and the changes that would make it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import TypedDict

from loratune import console
from loratune.commands import Command, loratune, setting_flags
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import layer_count
from loratune.progress import counted_progress
from loratune.recipe.loading import dump_recipe, with_settings
from loratune.recipe.sections import Recipe
from loratune.runs.report import read_report
from loratune.runs.typed_json import WRITTEN_BESIDE
from loratune.training.memory.changes import Change, Outcome, fitting, outcomes, possible_changes
from loratune.training.memory.planning import Place, Planner
from loratune.training.memory.prediction import Prediction, PredictionValues
from loratune.writing import write_text


class ChangeValues(TypedDict):
    """A change, and what the recipe would take with it alone."""

    settings: dict[str, Any]
    """Dotted setting → value."""
    price: str
    peak_bytes: int
    fits: bool


class PlanValues(TypedDict):
    """The memory of a recipe, and the changes that would make it fit."""

    base: str
    fits: bool
    """The exit code is 6 if not."""
    place: str
    room_bytes: int
    """Memory of the place, for each process."""
    spare_bytes: int
    """Of it, what is left; negative if it does not fit."""
    prediction: Annotated[PredictionValues, WRITTEN_BESIDE]
    seconds_per_step: float | None
    """Of the last run in the recipe's output folder; null if there is none of this base."""
    changes: list[ChangeValues]
    """Those that save memory, the cheapest first; none if it fits."""
    fit: dict[str, Any] | None
    """The settings with which it fits; null if all changes do not suffice."""
    fitted_bytes: int | None
    """The peak with these; null if nothing is to be changed or nothing suffices."""


@dataclass(frozen=True)
class Plan:
    """What was computed of a recipe."""

    recipe: Recipe
    place: Place
    prediction: Prediction
    changes: tuple[Outcome, ...] = ()
    """Those that save memory, the cheapest first; none if it fits."""
    fit: tuple[Change, ...] | None = ()
    """Those with which it fits; None if all of them do not suffice."""
    fitted_bytes: int | None = None
    """The peak with these."""
    seconds_per_step: float | None = None
    """Of the last run in the recipe's output folder on this machine; None if there is none of this base."""

    @property
    def fits(self) -> bool:
        return self.prediction.peak_bytes <= self.place.room_bytes

    @property
    def fitted(self) -> Recipe | None:
        """The recipe with the changes with which it fits."""
        return None if self.fit is None else with_settings(self.recipe, self.fit_settings)

    @property
    def fit_settings(self) -> dict[str, Any]:
        return {name: value for change in self.fit or () for name, value in change.settings.items()}

    def values(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "base": self.recipe.model.base,
            "fits": self.fits,
            "place": self.place.name,
            "room_bytes": self.place.room_bytes,
            "spare_bytes": self.place.room_bytes - self.prediction.peak_bytes,
            **self.prediction.values(),
            "seconds_per_step": self.seconds_per_step,
            "changes": [
                {
                    "settings": dict(one.change.settings),
                    "price": one.change.price,
                    "peak_bytes": one.peak_bytes,
                    "fits": one.fits,
                }
                for one in self.changes
            ],
            "fit": None if self.fit is None else self.fit_settings,
            "fitted_bytes": self.fitted_bytes,
        }


def plan(recipe: Recipe, place: Place, is_here: bool) -> Plan:
    """Predict the memory of a recipe, and of its changes if it does not fit.

    Args:
        recipe: the recipe.
        place: where it would run.
        is_here: whether that is this machine, where earlier runs took place.

    Raises:
        LoratuneError: base, rows or settings are not usable; as `sft` says it.
    """
    with console.status("planning"):
        planner = Planner(recipe, place)
        found = planner.predict(recipe)
    seconds = _seconds_per_step(recipe) if is_here else None
    room = place.room_bytes
    if found.peak_bytes <= room:
        return Plan(recipe, place, found, seconds_per_step=seconds)
    layers = layer_count(planner.config)
    possible = list(possible_changes(recipe, found.tokens, layers, place.hardware.processes))
    with counted_progress("changes tried", len(possible)) as tell:
        changes = outcomes(recipe, possible, planner.predict, room, tell)
    with counted_progress("changes together", len(changes)) as tell:
        fit = fitting(recipe, changes, planner.predict, room, tell)
    made = Plan(recipe, place, found, tuple(changes), None if fit is None else tuple(fit), None, seconds)
    if made.fitted is None:
        return made
    return Plan(recipe, place, found, made.changes, made.fit, planner.predict(made.fitted).peak_bytes, seconds)


def _seconds_per_step(recipe: Recipe) -> float | None:
    try:
        report = read_report(Path(recipe.output))
    except (LoratuneError, OSError):
        return None
    is_same = report.base == recipe.model.base and report.seconds and report.steps
    return report.seconds / report.steps if is_same and report.seconds else None


def write_fitted(found: Plan, path: Path) -> None:
    """Write the recipe that fits.

    Raises:
        LoratuneError: there is none.
    """
    if found.fitted is None:
        raise LoratuneError(f"no change known here makes it fit, so {path} is not written", Exit.IO)
    write_text(path, dump_recipe(found.fitted))


def show_plan(found: Plan, config: str | None, flags: Mapping[str, Any], written: Path | None) -> None:
    """Print terms, verdict, changes, and the next command."""
    prediction = found.prediction
    passes = f"passes of {prediction.tokens:,} tokens"
    passes += ", activations computed twice" if prediction.gradient_checkpointing else ""
    each = f", each of {prediction.processes} processes" if prediction.processes > 1 else ""
    rows = [(name, console.memory(size)) for name, size in prediction.terms.items()]
    console.table([*rows, ("peak", f"{console.memory(prediction.peak_bytes)}, in {prediction.moment}")], "memory")
    for note in prediction.notes:
        console.say(note)
    console.say(f"{passes}{each}; {_verdict(found)}", style="bold")
    if found.seconds_per_step:
        console.say(f"a step took {found.seconds_per_step:.1f} s in the last run in {found.recipe.output}")
    _show_changes(found)
    console.next_step(_next(found, config, flags, written))


def _verdict(found: Plan) -> str:
    spare = found.place.room_bytes - found.prediction.peak_bytes
    size = console.memory(abs(spare))
    room = f"{console.memory(found.place.room_bytes)} of {found.place.name}"
    return f"it fits into {room}, with {size} to spare" if found.fits else f"{size} more than the {room}"


def _show_changes(found: Plan) -> None:
    if found.fits:
        return
    rows = [("change", "peak", "fits", "price")]
    for one in found.changes:
        peak = console.memory(one.peak_bytes)
        rows.append((one.change.words, peak, "yes" if one.fits else "no", one.change.price))
    if len(rows) > 1:
        console.comparison(rows, is_text=True)
    if found.fit is None:
        console.say("all of them together do not suffice: a smaller base, a larger card, or more of them with sharding")
    elif len(found.fit) > 1:
        console.say(f"it fits with {len(found.fit)} of them together: {console.memory(found.fitted_bytes or 0)}")


def _next(found: Plan, config: str | None, flags: Mapping[str, Any], written: Path | None) -> Command:
    given = {"--config": config, **setting_flags(flags)}
    gpus: dict[str, Any] = {"--gpus": found.prediction.processes} if found.prediction.processes > 1 else {}
    if written:
        return loratune("train it", "sft", {"--config": written} | gpus)
    if found.fits:
        return loratune("train it", "sft", given | gpus)
    if found.fit is None:
        return loratune("see what a step is made of", "plan", given | {"--json": True})
    return loratune(
        "train what fits", "sft", {"--config": config} | setting_flags({**flags, **found.fit_settings}) | gpus
    )
