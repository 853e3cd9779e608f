"""A sweep as its command line, or its folder, defines it; all problems are told before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.recipe.loading import load_sweep, with_settings
from loratune.recipe.problems import message_of
from loratune.recipe.sections import Recipe, flat_settings
from loratune.recipe.sweep_section import SweepSettings
from loratune.runs.output import prepare_output
from loratune.sweep.plan import Plan, shares_of
from loratune.sweep.report import KIND, SWEEP_REPORT
from loratune.sweep.space import Choices, Range, Settings, Space, grid, require_valid, space_of, text_of, written
from loratune.sweep.study import random_trials

SWEEP_RECIPE, TRIALS, LOGS = "sweep.yaml", "trials", "logs"
DEFAULT_FOLDER = "out/sweep"
DEFAULT_TRIALS = 16
QUESTIONS, BASE = "evaluation.questions_share", "model.base"


@dataclass(frozen=True)
class Sweep:
    """A sweep, checked as far as it can be without reading rows or a model."""

    folder: Path
    recipe: Recipe
    """Of all trials, without what they vary."""
    settings: SweepSettings
    space: Space
    sampler: str
    plan: Plan
    chosen: tuple[Settings, ...]
    """The settings of the trials; none for tpe, which chooses them one by one."""

    @property
    def varies_base(self) -> bool:
        """Whether trials have different bases, so that losses are in bits per byte of the answers."""
        bases = self.space.get(BASE)
        return isinstance(bases, Choices) and len(bases.values) > 1

    def run_folder(self, name: str) -> Path:
        """Return the folder of a trial's run."""
        return self.folder / TRIALS / name

    def recipe_of(self, settings: Settings, name: str, seed: int | None = None) -> Recipe:
        """Return the recipe of a trial.

        Args:
            settings: what the trial varies.
            name: of its run folder.
            seed: another seed, which leaves the rows as they are; None for the recipe's own.

        Raises:
            LoratuneError: the settings do not fit together.
        """
        own: dict[str, Any] = {"output": str(self.run_folder(name)), QUESTIONS: 0.0}
        if seed is not None:
            rows = self.recipe.seed if self.recipe.data.seed is None else self.recipe.data.seed
            own |= {"seed": seed, "data.seed": rows}
        return with_settings(self.recipe, own | dict(settings))


def open_sweep(config: str | None, flags: Mapping[str, Any], sweep_flags: Mapping[str, Any], resume: bool) -> Sweep:
    """Return the sweep of a command line, or with `resume` the one that its folder holds.

    Args:
        config: recipe, or None.
        flags: settings of the recipe as typed.
        sweep_flags: settings of the sweep.
        resume: whether the folder may hold the sweep.

    Raises:
        LoratuneError: lists all problems; or the folder holds something else.
    """
    if resume and config is None and not flags.keys() - {"output"}:
        stored = Path(str(flags.get("output", DEFAULT_FOLDER))) / SWEEP_RECIPE
        if not stored.is_file():
            raise LoratuneError(f"{stored.parent} holds no sweep to resume; give its recipe with --config", Exit.USAGE)
        config = str(stored)
    sweep = _defined(config, flags, sweep_flags)
    stored = sweep.folder / SWEEP_RECIPE
    if stored.is_file() and not resume:
        raise LoratuneError(
            f"{sweep.folder} already holds a sweep; continue or join it with --resume, or choose another folder with "
            "--output",
            Exit.USAGE,
        )
    prepare_output(sweep.folder, overwrite=True, kind=KIND, marker=SWEEP_REPORT)
    if not stored.is_file():
        return sweep
    budget = {"budget": sweep.settings.budget} if sweep.settings.budget else {}
    begun = _defined(str(stored), {"output": str(sweep.folder)}, budget)
    _require_same(sweep, begun)
    return begun


def _defined(config: str | None, flags: Mapping[str, Any], sweep_flags: Mapping[str, Any]) -> Sweep:
    recipe, section = load_sweep(config, dict(flags), dict(sweep_flags))
    folder = Path(recipe.output if "output" in recipe.model_fields_set else DEFAULT_FOLDER)
    recipe = with_settings(recipe, {"output": str(folder)})
    if not recipe.data.validation:
        raise LoratuneError("a sweep compares validation losses: set data.validation", Exit.USAGE)
    settings, space = _checked(section, recipe)
    has_range = any(isinstance(axis, Range) for axis in space.values())
    sampler = settings.sampler or ("tpe" if has_range else "grid")
    _require_fitting(settings, sampler, has_range)
    chosen = grid(space) if sampler == "grid" else []
    count = len(chosen) or settings.trials or DEFAULT_TRIALS
    if sampler == "random":
        chosen = random_trials(space, recipe.seed, count)
    require_valid(chosen, recipe)
    is_halved = sampler != "tpe" if settings.halving is None else settings.halving
    plan = Plan(count, shares_of(count, is_halved), settings.seeds, recipe.seed, recipe.checkpoints.best_by)
    settings = settings.model_copy(update={"over": {name: written(axis) for name, axis in space.items()}})
    return Sweep(folder, recipe, settings, space, sampler, plan, tuple(chosen))


def _checked(section: Mapping[str, Any], recipe: Recipe) -> tuple[SweepSettings, Space]:
    if not section["over"]:
        raise LoratuneError(
            "nothing to vary; give a setting and its values, such as --over training.learning_rate=1e-4,2e-4,4e-4",
            Exit.USAGE,
        )
    problems = list[str]()
    try:
        settings = SweepSettings.model_validate(section)
    except ValidationError as error:
        problems += [f"sweep.{one['loc'][0]}: {message_of(one, str(one['loc'][0]))}" for one in error.errors()]
    try:
        space = space_of(section["over"], recipe)
    except LoratuneError as error:
        problems += error.message.splitlines()
    if problems:
        raise LoratuneError(f"the sweep cannot start:\n{bullet_list(problems, limit=40)}", Exit.USAGE)
    return settings, space


def _require_fitting(settings: SweepSettings, sampler: str, has_range: bool) -> None:
    problems = []
    if sampler == "grid" and has_range:
        problems.append("a grid needs values; for a range, take --sampler random or tpe")
    if sampler == "grid" and settings.trials is not None:
        problems.append("--trials is for random and tpe; a grid tries every combination")
    if sampler == "tpe" and settings.halving:
        problems.append("tpe learns from whole runs, so it cannot halve; take --sampler random, or leave halving out")
    if problems:
        raise LoratuneError(f"the sweep cannot start:\n{bullet_list(problems)}", Exit.USAGE)


def _all_settings(sweep: Sweep) -> dict[str, Any]:
    """Return what a later command may not change: all but the budget."""
    over = {f"--over {name}": values for name, values in sweep.settings.over.items()}
    return {**flat_settings(sweep.recipe), **sweep.settings.model_dump(exclude={"budget", "over"}), **over}


def _require_same(asked: Sweep, begun: Sweep) -> None:
    """Refuse to continue a sweep as another one."""
    mine, known = map(_all_settings, (asked, begun))
    if asked.recipe.prompt.date is None:
        mine["prompt.date"] = known["prompt.date"]  # of the day on which the sweep began
    different = [
        f"{name}: {text_of(known.get(name))} → {text_of(mine.get(name))}"
        for name in sorted(mine.keys() | known.keys())
        if mine.get(name) != known.get(name)
    ]
    if different:
        raise LoratuneError(
            f"{begun.folder} holds a sweep with other settings:\n{bullet_list(different)}\nleave them out to continue "
            "it, or choose another folder with --output",
            Exit.USAGE,
        )
