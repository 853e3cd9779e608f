"""Selects the checkpoint to resume from, and checks that everything that affects the result is unchanged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune import console
from loratune.commands import Command
from loratune.errors import Exit, LoratuneError, counted
from loratune.model.hardware import Hardware
from loratune.recipe.effects import OF_SEVERAL_PROCESSES, TOLD_OR_KEPT, is_among
from loratune.recipe.names import ACCUMULATION, BATCH_SIZE, EARLIER_DEFAULTS, with_current_names
from loratune.recipe.sections import Recipe, default_settings, flat_settings
from loratune.runs.checkpoint import Checkpoint, named_checkpoint, newest_checkpoint
from loratune.runs.fingerprint import FULL
from loratune.runs.folder import ADAPTER, CHECKPOINTS, MANIFEST, RECIPE, STATUS
from loratune.runs.going_on import next_command
from loratune.runs.manifest import Manifest, read_manifest
from loratune.runs.output import check_links
from loratune.runs.status import read_status
from loratune.training.checkpoints.states import check_states

PASS_TOKENS = "tokens_per_pass"
"""In a checkpoint's progress: maximum tokens of a pass. Earlier versions, which drew rows in another order, lack it."""
ATTENTION = "attention"
"""In a checkpoint's progress: name of the attention implementation."""
PACKED = "packed"
"""In a checkpoint's progress: whether rows are packed. Earlier versions, which computed int8 otherwise, lack it."""
BEST_EXACT = "best_exact_answers"
"""In a checkpoint's progress: share of exact answers of the best validation. Earlier versions, which lack it, did not
count them."""
BEST_BY = "checkpoints.best_by"
NEWEST, AUTO = "newest", "auto"
FREE = (
    *TOLD_OR_KEPT,
    *OF_SEVERAL_PROCESSES,
    *("data.train", "data.validation", "prompt.date", "prompt.generation_prompt"),
    *("training.tokens_per_pass", "training.gradient_checkpointing"),
)
"""Settings and sections that do not affect the adapter; files and templates are compared by content."""
DATE = "date in prompts"
DEVICE = "device"
WHOLE_BASE = f"base {FULL}"
LENGTHS = ("training.epochs", "training.max_steps")
"""These may be increased."""
PATIENCE = "evaluation.early_stopping"
"""This may be increased too, since it does not affect earlier steps; None counts as the largest value."""


@dataclass(frozen=True)
class Resume:
    """The --resume flags."""

    checkpoint: str
    """newest, auto (resume, or start if there is no checkpoint), or a checkpoint's name."""
    strict: bool = False
    """Fail on a damaged checkpoint instead of using an older one."""
    allow_changes: bool = False
    """Resume even if something that affects the result has changed."""


def find_start(output: Path, resume: Resume) -> Checkpoint | None:
    """Return the checkpoint to resume from; None to start from the beginning.

    Raises:
        LoratuneError: there is no checkpoint, it is damaged, or the run's folder links outside itself.
    """
    check_links(output)
    if resume.checkpoint not in (NEWEST, AUTO):
        named = named_checkpoint(output, resume.checkpoint)
        check_states(named)
        return named
    checkpoint, damaged = newest_checkpoint(output, resume.strict, check_states)
    for problem in damaged:
        console.warn(f"{problem}\n  using the previous one" if checkpoint else problem)
    if checkpoint is None and resume.checkpoint == NEWEST:
        what = "has no complete checkpoint" if (output / STATUS).is_file() else "is not a run"
        raise LoratuneError(
            f"{output} {what} to resume from; --resume auto starts from the beginning where there is none", Exit.MODEL
        )
    if checkpoint is None and (output / ADAPTER).exists():
        raise LoratuneError(
            f"{output} holds an adapter but no complete checkpoint; to train again, replace it with --overwrite",
            Exit.MODEL,
        )
    if checkpoint is None:
        console.say(f"no checkpoint in {output / CHECKPOINTS}: starting from the beginning")
    return checkpoint


def completion(output: Path, start: Checkpoint, steps: int, patience: int | None) -> str | None:
    """Return a message if the run is complete; None if steps are left, or its adapter is no longer there.

    Args:
        output: run folder.
        start: the checkpoint to resume from.
        steps: requested number of steps.
        patience: present value of evaluation.early_stopping.
    """
    if read_status(output).state != "finished" or not (output / ADAPTER).is_dir():
        return None
    if start.step >= steps:
        return f"{output} is complete: step {start.step} of {steps}"
    if not stays_stopped(start.progress, patience):
        return None
    without = counted(start.progress["validations_since_best"], "validation")
    return (
        f"{output} is complete: it stopped early at step {start.step} of {steps}, after {without} without a better "
        "one, so more epochs or steps change nothing. To train on, raise --evaluation.early_stopping, or switch it "
        "off with --evaluation.early_stopping null"
    )


def stays_stopped(progress: dict[str, Any], patience: int | None) -> bool:
    """Return whether a run that stopped early would stop again at the same step with the present patience."""
    return bool(progress["stopped_early"]) and patience is not None and progress["validations_since_best"] >= patience


def begun_manifest(output: Path, start: Checkpoint | None) -> Manifest | None:
    """Return the manifest of a run that is resumed; None for a new run, and where there is none."""
    return read_manifest(output) if start and (output / MANIFEST).is_file() else None


def as_begun(recipe: Recipe, manifest: Manifest | None, start: Checkpoint | None = None) -> tuple[Recipe, str | None]:
    """Return the recipe and the date with which a run began, where the recipe does not fix them.

    Args:
        recipe: the recipe of the resumed run.
        manifest: see `begun_manifest`.
        start: the checkpoint from which the run goes on.

    Returns:
        The recipe, with the defaults of the version that began the run, and with generation prompts as it began
        (earlier versions did not add any), and the date in prompts.
    """
    if manifest is None:
        return recipe, None
    if start is not None:
        recipe = _with_earlier_defaults(recipe, start.identity["settings"])
    known = manifest.template
    if "generation_prompt" not in recipe.prompt.model_fields_set:
        update = {"generation_prompt": known.generation_prompt or "template"}
        recipe = recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update=update)})
    is_of_before = known.generation_prompt is None  # such versions rendered the start's date without recording it
    return recipe, (manifest.created[:10] if is_of_before else known.date) or None


def _with_earlier_defaults(recipe: Recipe, begun: dict[str, Any]) -> Recipe:
    """Return a recipe whose unset settings have the defaults of an earlier version, where a run began with them."""
    kept = []
    for name, value in EARLIER_DEFAULTS.items():
        section, _, setting = name.partition(".")
        settings = getattr(recipe, section)
        if setting not in settings.model_fields_set and begun.get(name) == value:
            recipe = recipe.model_copy(update={section: settings.model_copy(update={setting: value})})
            kept.append(f"{name} {value:g}")
    if kept:
        console.say(f"{', '.join(kept)}, as the run began: the recipe leaves them out")
    return recipe


def identity_of(recipe: Recipe, manifest: Manifest, hardware: Hardware) -> dict[str, Any]:
    """Return everything that affects the bits of the adapter.

    Args:
        recipe: the whole recipe.
        manifest: the run's manifest with base, template, data and versions.
        hardware: number of processes, and the device.
    """
    settings = {name: value for name, value in flat_settings(recipe).items() if not is_among(name, FREE)}
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
        "rest": {**files, **base, **prompts, "processes": hardware.processes},
        "versions": {**manifest.versions, DEVICE: hardware.name},
    }


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any], allow_changes: bool) -> None:
    """Compare a checkpoint's identity with the present one.

    Raises:
        LoratuneError: lists the differences, unless they are allowed.
    """
    earlier = {DEVICE: identity["versions"][DEVICE]} | checkpoint.identity["versions"]  # once not recorded
    if versions := _differences(earlier, identity["versions"]):
        console.warn(
            f"the checkpoint was written with other versions or hardware; bits may differ:\n{_lines(versions)}"
        )
    if PASS_TOKENS not in checkpoint.progress:
        console.warn(
            "the checkpoint is of an earlier version, which drew rows in another order: until the end of its epoch, "
            "some rows may be trained on twice and others not at all"
        )
    known = {"settings": _settings_of(checkpoint), "rest": checkpoint.identity["rest"]}
    if BEST_EXACT not in checkpoint.progress and identity["settings"][BEST_BY] != "exact":
        console.say("the checkpoint is of an earlier version, which counted no exact answers: the lowest loss is best")
        known["settings"][BEST_BY] = identity["settings"][BEST_BY]
    if DATE in identity["rest"] and DATE not in known["rest"]:  # written by a version that did not know
        date = identity["rest"][DATE]
        console.warn(
            f"the checkpoint does not say which date its prompts had; the date of the run's start, {date}, is used"
        )
        known["rest"] = known["rest"] | {DATE: date}
    if WHOLE_BASE in identity["rest"] and WHOLE_BASE not in known["rest"]:
        console.warn("the checkpoint is of an earlier version and identifies its base only by samples of the weights")
        known["rest"] = known["rest"] | {WHOLE_BASE: identity["rest"][WHOLE_BASE]}
    different = [difference for part in known for difference in _differences(known[part], identity[part])]
    longer = [difference for difference in different if _makes_longer(*difference)]
    if longer:
        console.say(f"extended:\n{_lines(longer)}")
    if any(name in LENGTHS for name, *_ in longer):
        console.say(f"steps after {checkpoint.step} follow the learning rate schedule of the longer run")
    changed = [difference for difference in different if difference not in longer]
    if not changed:
        return
    if not allow_changes:
        is_restored = any(name in identity["settings"] for name, *_ in changed)
        raise LoratuneError(
            f"{checkpoint.folder} was made with different settings:\n{_lines(changed)}\nrestore them, start over with "
            "--overwrite, or continue with --allow-changes, which gives an adapter that neither would give alone",
            Exit.USAGE,
            _with_own_settings(checkpoint.folder.parent.parent) if is_restored else (),
        )
    console.warn(
        f"different settings from step {checkpoint.step} on; neither alone gives this adapter:\n{_lines(changed)}"
    )


def _with_own_settings(run: Path) -> list[Command]:
    """Return the command that resumes a run with the recipe in its folder."""
    found = next_command(run, "interrupted") if (run / RECIPE).is_file() else None
    return [replace(found, purpose="go on with the settings that it began with")] if found else []


def changed_passes(start: Checkpoint, attention: str, is_packed: bool, quantization: str) -> list[str]:
    """Return what makes the passes of a resumed run others than before, so that bits may differ.

    Args:
        start: the checkpoint from which the run goes on.
        attention: name of the present implementation.
        is_packed: whether rows are packed now.
        quantization: of the base.
    """
    begun, told = start.progress, []
    if (before := begun.get(ATTENTION, attention)) != attention:
        told.append(f"attention is {attention}, {before} before the interruption")
    if begun.get(PACKED, is_packed) != is_packed:
        now, before = ("packed", "padded") if is_packed else ("padded", "packed")
        told.append(f"rows are {now}, {before} before the interruption")
    if PACKED not in begun and quantization == "int8":
        told.append(
            "the checkpoint is of an earlier version, which computed LoRA beside int8 in other steps and may have "
            "padded rows that are packed now"
        )
    return told


def _settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's settings by present names; settings that it does not know have their present defaults."""
    settings = checkpoint.identity["settings"]
    known = default_settings() | with_current_names(settings)
    if ACCUMULATION in settings:  # with it, batch_size was the rows of one process
        known[BATCH_SIZE] *= checkpoint.identity["rest"].get("processes", 1)
    return {name: value for name, value in known.items() if not is_among(name, FREE) and value != {}}


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
