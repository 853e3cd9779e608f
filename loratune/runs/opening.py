"""Opens an adapter for later commands: files, record, settings of its base, and consistency checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import is_file, is_folder, read_json_object, require_folder
from loratune.printable import shortened
from loratune.recipe.sections import ModelSettings, PromptSettings
from loratune.runs.checkpoint import SEAL, Checkpoint
from loratune.runs.folder import ADAPTER, CHECKPOINTS, MANIFEST, RECIPE, STATUS, VERIFICATION
from loratune.runs.going_on import following_command, newest_checkpoint, next_command, state_now
from loratune.runs.intact import require_intact
from loratune.runs.lock import lock_holder
from loratune.runs.manifest import Manifest, TrainedBase, read_manifest, run_record
from loratune.runs.merged import Combined
from loratune.runs.record import RunRecord
from loratune.runs.seals import (
    ADAPTER_CONFIG,
    ALL_SEALED,
    TO_INFER,
    TO_PROMPT,
    changed_files,
    open_sealed,
    require_same_settings,
    require_unchanged,
)
from loratune.runs.status import read_status
from loratune.runs.tokenizer_files import TOKENIZER_CONFIG
from loratune.runs.verification import MergedModel, prompt_of, read_verification


@dataclass(frozen=True)
class AdapterSource:
    """An adapter and what is known about its training."""

    adapter: Path
    """PEFT folder."""
    record: RunRecord | None
    """None for a plain PEFT folder."""
    manifest: Manifest | None
    run: Path | None
    """Run folder; None for a plain PEFT folder."""
    changed: tuple[str, ...] = ()
    """Its files that are not as the run left them, if that was let through."""
    combined: Combined | None = None
    """How it was made of several adapters, if it was."""
    checkpoint: Checkpoint | None = None
    """The checkpoint, whose seal records its training, if it is one."""
    notes: tuple[str, ...] = ()
    """What the verification of an exported adapter could not tell, or was let through."""

    @property
    def prompt(self) -> PromptSettings:
        """Prompt settings of the training; defaults if unknown."""
        if self.record is None:
            return PromptSettings()
        # Earlier versions did not add generation prompts.
        is_recorded = self.manifest is not None and self.manifest.template.generation_prompt is not None
        update = {} if is_recorded else {"generation_prompt": "template"}
        return self.record.prompt.model_copy(update=update)

    @property
    def trained_base(self) -> TrainedBase:
        """The run's base from its manifest.

        Raises:
            LoratuneError: the manifest lacks it.
        """
        if self.manifest is None or self.manifest.base is None:
            raise LoratuneError(f"{self.run}/{MANIFEST}: damaged: it does not say what the base was", Exit.MODEL)
        return self.manifest.base

    @property
    def title(self) -> str:
        """What to call it: its folder, or the adapters that it was combined of."""
        if self.combined is None:
            return str(self.adapter)
        parts = [f"{one.weight:g} × {shortened(name)}" for name, one in self.combined.adapters.items()]
        return f"{self.combined.method} of {', '.join(parts)}"

    @property
    def trained_day(self) -> str | None:
        """The date in the prompts of the training, if the template writes one."""
        return self.manifest.template.date if self.manifest else None

    @property
    def remarks(self) -> list[str]:
        """Warnings about its files, one line each."""
        changed = [f"changed since the run ended: {', '.join(self.changed)}"] if self.changed else []
        unsealed = [
            f"{self.run}: its {MANIFEST} carries no seal (an earlier version of loratune wrote it, or the seal was "
            "removed), so whether it has been changed since cannot be told"
        ]
        is_unsealed = self.manifest is not None and not self.manifest.is_sealed
        return [*self.notes, *changed, *(unsealed if is_unsealed else [])]

    @property
    def place(self) -> Path:
        """The path for command lines: the run folder for a run's own adapter, otherwise its folder."""
        is_run_s = self.run is not None and self.adapter.absolute() == (self.run / ADAPTER).absolute()
        return self.run if self.run is not None and is_run_s else self.adapter

    def tokenizer_folder(self, base: Path) -> Path:
        """Return the folder of the training's tokenizer; for a checkpoint it is the base's."""
        return self.adapter if (self.adapter / TOKENIZER_CONFIG).is_file() else base


def open_adapter(path: Path, force: bool = False) -> AdapterSource:
    """Find the adapter at a path: a run folder, its adapter, one of its checkpoints, or a plain PEFT folder.

    All commands open adapters here. Hashes are checked before recipe, adapter or tokenizer are read.

    Args:
        path: the folder.
        force: accept changed files.

    Raises:
        LoratuneError: there is no adapter, or its files have changed.
    """
    require_folder(path)
    if is_run(path):
        return _open_run(path, path / ADAPTER, force)
    for place in dict.fromkeys((path.absolute(), path.resolve())):  # a link into a run belongs to that run
        if place.name == ADAPTER and is_run(place.parent):
            return _open_run(place.parent, path, force)
        if place.parent.name == CHECKPOINTS and is_run(place.parent.parent):
            return _open_checkpoint(place.parent.parent, path, force)
    if (path / SEAL).is_file():
        checkpoint, changed = open_sealed(path, force)
        return AdapterSource(path, None, None, None, tuple(changed), checkpoint=checkpoint)
    if (path / ADAPTER_CONFIG).is_file():
        return AdapterSource(path, None, None, None, notes=tuple(require_intact(path, force)))
    if is_file(path / "config.json"):
        raise LoratuneError(
            f"{path}: a whole model, not an adapter; give it with --model, which infer, serve and export take",
            Exit.MODEL,
        )
    raise LoratuneError(f"{path}: neither a run folder nor an adapter (no {ADAPTER_CONFIG} in it)", Exit.MODEL)


def open_settled_adapter(path: Path, force: bool = False) -> AdapterSource:
    """Open an adapter like `open_adapter`, but not during a training in its folder, which could replace files.

    Args:
        path: a run folder, one of its checkpoints, or a plain PEFT folder.
        force: accept changed files of a run.

    Raises:
        LoratuneError: a process is training there (with pid and host), or there is no adapter.
    """
    for folder in (path, *path.absolute().parents[:2]):
        _require_settled(folder, can_copy=True)
    return open_adapter(path, force)


def open_whole_run(run: Path) -> AdapterSource:
    """Open a run to verify it: all of its sealed files are compared, those too that no adapter needs.

    Args:
        run: a folder with a manifest.

    Raises:
        LoratuneError: a process is training there, the run has no adapter, or a file has changed.
    """
    _require_settled(run)
    manifest = read_manifest(run)
    _require_adapter(run, run / ADAPTER)
    require_unchanged(run, changed_files(run, manifest, ALL_SEALED))
    return AdapterSource(run / ADAPTER, run_record(run, manifest), manifest, run)


def _require_settled(folder: Path, can_copy: bool = False) -> None:
    """Raise if a process is training in a folder; can_copy says that the command takes a checkpoint from elsewhere."""
    holder = lock_holder(folder) if is_file(folder / STATUS) else None
    if holder:
        newest = newest_checkpoint(folder)
        instead = f", or copy its newest checkpoint, {newest}, elsewhere and take that" if can_copy and newest else ""
        raise LoratuneError(
            f"{folder} is in use by {holder}, which trains there; wait until it has ended{instead}",
            Exit.USAGE,
            [following_command(folder)],
        )


def base_settings(source: AdapterSource, model: str | None) -> ModelSettings:
    """Return the settings of an adapter's base as in training, at another location if one is given.

    Args:
        source: the adapter.
        model: hub id or folder of the base; None uses the recorded one.

    Raises:
        LoratuneError: a plain PEFT folder names a base that is not a local folder; such names are never downloaded.
    """
    if source.record and source.manifest:
        known, place = source.record.model, source.trained_base.path
        return known.model_copy(update={"base": model or (place if is_folder(Path(place)) else known.base)})
    named = read_json_object(source.adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if model is None and not (isinstance(named, str) and named and is_folder(Path(named))):
        raise LoratuneError(
            f"{source.adapter} names its base {named!r}, which is not followed; give the base with --base-model",
            Exit.MODEL,
        )
    return ModelSettings(base=model or str(named))


def merged_prompt(folder: Path) -> PromptSettings:
    """Return the prompt settings of a model without adapter: those of training, if loratune merged one into it.

    The merged template includes the other settings; the thinking mode is an argument of the template.
    """
    verification = read_verification(folder)
    if verification is None:
        return PromptSettings()
    merged = verification.proved if isinstance(verification.proved, MergedModel) else MergedModel()
    return prompt_of(merged, folder / VERIFICATION)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's; a PEFT folder may also contain the recipe of its training."""
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    return (folder / MANIFEST).is_file() or (not is_adapter and (folder / RECIPE).is_file())


def _open_run(run: Path, adapter: Path, force: bool) -> AdapterSource:
    manifest = read_manifest(run)
    _require_adapter(run, adapter)
    changed = changed_files(run, manifest, TO_INFER)
    if not force:
        require_unchanged(run, changed, can_insist=True)
    return AdapterSource(adapter, run_record(run, manifest), manifest, run, tuple(changed))


def _require_adapter(run: Path, adapter: Path) -> None:
    if adapter.is_dir():
        return
    holder, newest = lock_holder(run), newest_checkpoint(run)
    if holder:
        instead = f"take its newest checkpoint meanwhile, {newest}" if newest else "there is no checkpoint yet either"
        raise LoratuneError(
            f"{run}: {holder} is still training it, so it has no adapter yet; {instead}",
            Exit.MODEL,
            [following_command(run)],
        )
    state = state_now(run, read_status(run)) if (run / STATUS).is_file() else "unknown"
    advised = next_command(run, "interrupted" if state == "finished" else state)  # its adapter has been removed
    hint = f"; its newest checkpoint is {newest}" if newest else ""
    raise LoratuneError(
        f"{run}: the run has no adapter (state: {state}){hint}", Exit.MODEL, [advised] if advised else []
    )


def _open_checkpoint(run: Path, folder: Path, force: bool) -> AdapterSource:
    checkpoint, damage = open_sealed(folder, force)
    manifest = read_manifest(run)
    changed = changed_files(run, manifest, TO_PROMPT)
    if not force:
        require_unchanged(run, changed, can_insist=True)
    record = run_record(run, manifest)
    other = require_same_settings(checkpoint, run, record, force) if checkpoint else []
    return AdapterSource(folder, record, manifest, run, (*damage, *changed, *other), checkpoint=checkpoint)
