"""Where a run goes on: which checkpoint, and whether what it hangs on is still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import console
from loratune.errors import Exit, LoratuneError, counted
from loratune.plain_files import read_json_object
from loratune.recipe.names import with_current_names
from loratune.recipe.sections import Recipe, default_settings, flat_settings
from loratune.runs.checkpoint import Checkpoint, named_checkpoint, newest_checkpoint
from loratune.runs.fingerprint import FULL
from loratune.runs.folder import ADAPTER, CHECKPOINTS, MANIFEST, STATUS
from loratune.runs.manifest import Manifest, read_manifest
from loratune.runs.output import check_links
from loratune.training.checkpoints.states import check_states

NEWEST, AUTO = "newest", "auto"
FREE = (
    *("output", "tracking", "checkpoints.keep", "checkpoints.every_steps", "data.train", "data.validation"),
    *("prompt.date", "prompt.generation_prompt", "evaluation.questions_share"),
)
"""Settings and sections without a bearing on the adapter; files and templates count by what they hold."""
DATE = "date in prompts"
WHOLE_BASE = f"base {FULL}"
LENGTHS = ("training.epochs", "training.max_steps")
"""A run may be made longer."""
PATIENCE = "evaluation.early_stopping"
"""So may the wait of a run that stops early, which has no bearing on the steps before; none is the longest."""


@dataclass(frozen=True)
class Resume:
    """What the command line says about going on."""

    checkpoint: str
    """newest, auto (go on, or start if there is nothing to go on with), or a checkpoint's name."""
    strict: bool = False
    """Refuse to go back behind a damaged checkpoint."""
    allow_changes: bool = False
    """Go on although what exactness hangs on has changed."""


def find_start(output: Path, resume: Resume) -> Checkpoint | None:
    """The checkpoint to go on from; None is a start from the beginning.

    Raises:
        LoratuneError: there is none, it is damaged, or going on would write outside the run's folder.
    """
    check_links(output)
    if resume.checkpoint not in (NEWEST, AUTO):
        named = named_checkpoint(output, resume.checkpoint)
        check_states(named)
        return named
    checkpoint, damaged = newest_checkpoint(output, resume.strict, check_states)
    for problem in damaged:
        console.warn(f"{problem}\n  the one before it is taken" if checkpoint else problem)
    if checkpoint is None and resume.checkpoint == NEWEST:
        what = "has no whole checkpoint" if (output / STATUS).is_file() else "is no run"
        raise LoratuneError(
            f"{output} {what} to resume from; --resume auto starts from the beginning where there is none", Exit.MODEL
        )
    if checkpoint is None and (output / ADAPTER).exists():
        raise LoratuneError(
            f"{output} holds an adapter but no whole checkpoint; to train it anew, replace it with --overwrite",
            Exit.MODEL,
        )
    if checkpoint is None:
        console.say(f"no checkpoint in {output / CHECKPOINTS}: starting from the beginning")
    return checkpoint


def completion(output: Path, start: Checkpoint, steps: int, patience: int | None) -> str | None:
    """What is said where nothing is left to do; None if there is.

    Args:
        output: run folder.
        start: the checkpoint to go on from.
        steps: that are wanted.
        patience: evaluation.early_stopping as it is now.
    """
    if read_json_object(output / STATUS).get("state") != "finished":
        return None
    if start.step >= steps:
        return f"{output} is complete: step {start.step} of {steps}"
    if not stays_stopped(start.progress, patience):
        return None
    without = counted(start.progress["validations_since_best"], "validation")
    return (
        f"{output} is complete: it stopped early at step {start.step} of {steps}, after {without} without a better "
        "loss, so more epochs or steps change nothing. To train on, raise --evaluation.early_stopping, or switch it "
        "off with --evaluation.early_stopping null"
    )


def stays_stopped(progress: dict[str, Any], patience: int | None) -> bool:
    """Whether a run that stopped early would do so again at the same place, with the patience that it is given now."""
    return bool(progress["stopped_early"]) and patience is not None and progress["validations_since_best"] >= patience


def as_begun(recipe: Recipe, output: Path, start: Checkpoint | None) -> tuple[Recipe, str | None]:
    """What a run has begun with where its recipe leaves it open.

    Args:
        recipe: to go on with.
        output: run folder.
        start: the checkpoint to go on from; None begins anew, and leaves everything open.

    Returns:
        The recipe, with prompts completed only if they were, which earlier versions did not do; and the day that a
        template which writes one has written.
    """
    if start is None or not (output / MANIFEST).is_file():
        return recipe, None
    manifest = read_manifest(output)
    known = manifest.template
    if "generation_prompt" not in recipe.prompt.model_fields_set:
        update = {"generation_prompt": known.generation_prompt or "template"}
        recipe = recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update=update)})
    is_of_before = known.generation_prompt is None  # such versions wrote the day of the start, and did not note it
    return recipe, (manifest.created[:10] if is_of_before else known.date) or None


def identity_of(recipe: Recipe, manifest: Manifest, processes: int) -> dict[str, Any]:
    """What the bits of an adapter hang on.

    Args:
        recipe: the whole recipe.
        manifest: base, template, data and versions, as the run's manifest has them.
        processes: that train together.
    """
    settings = {name: value for name, value in flat_settings(recipe).items() if not _is_free(name)}
    files = {
        f"data {number} {Path(use.path).name}": f"{use.rows} rows of {use.sha256[:12]}"
        for number, use in enumerate(manifest.data)
    }
    hashes = manifest.base.hashes if manifest.base else {}
    base = {f"base {name}": value for name, value in hashes.items() if name.endswith("sha256")}
    template = manifest.template
    written = {"answers begin with": template.answer_start, DATE: template.date}
    prompts = {"template": template.sha256, **{name: value for name, value in written.items() if value}}
    return {
        "settings": settings,
        "rest": {**files, **base, **prompts, "processes": processes},
        "versions": dict(manifest.versions),
    }


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any], allow_changes: bool) -> None:
    """Compare what a checkpoint was made with and what would go on from it.

    Raises:
        LoratuneError: with a line for each difference, unless they are allowed.
    """
    versions = _differences(checkpoint.identity["versions"], identity["versions"])
    if versions:
        console.warn("the checkpoint was written with other versions, so bits may differ:\n" + _lines(versions))
    known = {"settings": _settings_of(checkpoint), "rest": checkpoint.identity["rest"]}
    if DATE in identity["rest"] and DATE not in known["rest"]:  # written by a version that did not know
        date = identity["rest"][DATE]
        console.warn(
            f"the checkpoint does not say which date its prompts had; that of the run's start, {date}, is taken"
        )
        known["rest"] = known["rest"] | {DATE: date}
    if WHOLE_BASE in identity["rest"] and WHOLE_BASE not in known["rest"]:
        console.warn("the checkpoint is of an earlier version and knows its base by samples of the weights alone")
        known["rest"] = known["rest"] | {WHOLE_BASE: identity["rest"][WHOLE_BASE]}
    different = [difference for part in known for difference in _differences(known[part], identity[part])]
    longer = [difference for difference in different if _makes_longer(*difference)]
    if longer:
        console.say(f"to be longer than before:\n{_lines(longer)}")
    if any(name in LENGTHS for name, *_ in longer):
        console.say(f"steps after {checkpoint.step} follow the learning rate schedule of the longer run")
    changed = [difference for difference in different if difference not in longer]
    if not changed:
        return
    if not allow_changes:
        raise LoratuneError(
            f"{checkpoint.folder} was made otherwise:\n{_lines(changed)}\nresume with what it was, start anew with "
            "--overwrite, or go on with --allow-changes, to another adapter than either would give",
            Exit.USAGE,
        )
    console.warn(
        f"from step {checkpoint.step} on with other settings; the adapter is that of neither alone:\n{_lines(changed)}"
    )


def _settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint was made with, by present names; a setting that it does not know had today's default."""
    defaults = {name: value for name, value in default_settings().items() if not _is_free(name)}
    return defaults | with_current_names(checkpoint.identity["settings"])


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = sorted(old.keys() | new.keys())
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _makes_longer(name: str, old: Any, new: Any) -> bool:
    if name == PATIENCE:
        return old is not None and (new is None or new > old)
    return name in LENGTHS and old is not None and new is not None and new > old


def _lines(differences: list[tuple[str, Any, Any]]) -> str:
    return "\n".join(f"  {name}: {_shown(old)} → {_shown(new)}" for name, old, new in differences)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)[:60]
