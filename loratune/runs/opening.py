"""Opens an adapter for later commands: files, record, settings of its base, and consistency checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import is_file, is_folder, read_json_object
from loratune.recipe.loading import load_written_recipe
from loratune.recipe.sections import ModelSettings, PromptSettings
from loratune.runs.checkpoint import SEAL, Checkpoint
from loratune.runs.folder import ADAPTER, CHECKPOINTS, MANIFEST, RECIPE, STATUS, VERIFICATION
from loratune.runs.lock import lock_holder
from loratune.runs.manifest import Manifest, TrainedBase, read_manifest
from loratune.runs.record import RunRecord
from loratune.runs.seals import ADAPTER_CONFIG, changed_files, open_sealed, require_same_settings, require_unchanged
from loratune.runs.tokenizer_files import TOKENIZER_CONFIG, count_tokens
from loratune.runs.typed_json import as_typed
from loratune.runs.verification import Combined, MergedModel, read_verification


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
        return changed + (unsealed if self.manifest is not None and not self.manifest.is_sealed else [])

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
    if not is_folder(path):
        raise LoratuneError(f"{path}: no such folder", Exit.MODEL)
    if _is_run(path):
        return _open_run(path, path / ADAPTER, force)
    for place in dict.fromkeys((path.absolute(), path.resolve())):  # a link into a run belongs to that run
        if place.name == ADAPTER and _is_run(place.parent):
            return _open_run(place.parent, path, force)
        if place.parent.name == CHECKPOINTS and _is_run(place.parent.parent):
            return _open_checkpoint(place.parent.parent, path, force)
    if (path / SEAL).is_file():
        checkpoint, changed = open_sealed(path, force)
        return AdapterSource(path, None, None, None, tuple(changed), checkpoint=checkpoint)
    if (path / ADAPTER_CONFIG).is_file():
        return AdapterSource(path, None, None, None)
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
        holder = lock_holder(folder) if is_file(folder / STATUS) else None
        if holder:
            raise LoratuneError(
                f"{folder} is in use by {holder}, which trains there; wait until it has ended, or copy one of its "
                "checkpoints elsewhere and take that",
                Exit.USAGE,
            )
    return open_adapter(path, force)


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
    known = {"enable_thinking": merged.thinking, "generation_prompt": merged.generation_prompt, "date": merged.date}
    return as_typed(PromptSettings, known, folder / VERIFICATION)


def check_same_template(source: AdapterSource, sha256: str) -> None:
    """Check that the chat template equals that of the training.

    Args:
        source: the adapter.
        sha256: hash of the present template, `Encoder.template_sha256`.

    Raises:
        LoratuneError: the template differs.
    """
    sealed = source.checkpoint.identity.get("rest", {}).get("template") if source.checkpoint else None
    known = sealed or (source.manifest.template.sha256 if source.manifest else None)
    if source.manifest and known != sha256:
        raise LoratuneError(
            f"{source.adapter}: the prompt template is not the one of the training: the base's chat template has "
            "changed since; restore it, or use the run folder rather than a checkpoint",
            Exit.MODEL,
        )


def check_vocabulary(source: AdapterSource, base: Path, base_rows: int, rows: int) -> list[str]:
    """Compare the number of embedding rows with the number of the tokenizer's tokens.

    Args:
        source: the adapter.
        base: the base's folder.
        base_rows: embedding rows of the base.
        rows: embedding rows with the adapter.

    Returns:
        Warnings about a resized vocabulary.

    Raises:
        LoratuneError: the adapter's tokenizer has tokens without a row, while the base's has not.
    """
    tokens = 0 if source.manifest else count_tokens(source.tokenizer_folder(base))
    if tokens > rows and tokens > count_tokens(base):
        raise LoratuneError(
            f"{source.adapter}: its tokenizer has {tokens} tokens and the model {rows} rows: its vocabulary was "
            "resized in training, and the new rows are not in the adapter's file. Save it again where it was trained, "
            "with PEFT's save_pretrained(…, save_embedding_layers=True)",
            Exit.MODEL,
        )
    if rows == base_rows:
        return []
    return [f"{source.adapter} was trained with a vocabulary of {rows} rows and brings them; the base has {base_rows}"]


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run's; a PEFT folder may also contain the recipe of its training."""
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    return (folder / MANIFEST).is_file() or (not is_adapter and (folder / RECIPE).is_file())


def _open_run(run: Path, adapter: Path, force: bool) -> AdapterSource:
    manifest = read_manifest(run)
    if not adapter.is_dir():
        checkpoints = sorted(str(folder) for folder in (run / CHECKPOINTS).glob("step-*"))
        state = read_json_object(run / STATUS).get("state", "unknown") if (run / STATUS).is_file() else "unknown"
        hint = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
        raise LoratuneError(f"{run}: the run has no adapter yet (state: {state}){hint}", Exit.MODEL)
    changed = changed_files(run, manifest, with_adapter=True)
    require_unchanged(run, changed, force)
    return AdapterSource(adapter, run_record(run, manifest), manifest, run, tuple(changed))


def _open_checkpoint(run: Path, folder: Path, force: bool) -> AdapterSource:
    checkpoint, damage = open_sealed(folder, force)
    manifest = read_manifest(run)
    changed = changed_files(run, manifest, with_adapter=False)
    require_unchanged(run, changed, force)
    record = run_record(run, manifest)
    other = require_same_settings(checkpoint, run, record, force) if checkpoint else []
    return AdapterSource(folder, record, manifest, run, (*damage, *changed, *other), checkpoint=checkpoint)


def run_record(run: Path, manifest: Manifest) -> RunRecord:
    """Return the record of a run; for earlier versions it is derived from the recipe.

    Raises:
        LoratuneError: the recipe of such a run cannot be read.
    """
    if manifest.record:
        return manifest.record
    try:
        return RunRecord.of(load_written_recipe(run / RECIPE))
    except LoratuneError as error:
        raise LoratuneError(str(error), Exit.MODEL) from error
