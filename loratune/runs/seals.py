"""Checks that files of runs and checkpoints are unchanged, before anything else is read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import read_json_object
from loratune.recipe.names import with_current_names
from loratune.runs.checkpoint import SEAL, Checkpoint, open_checkpoint
from loratune.runs.file_hashes import Records, compare_files
from loratune.runs.folder import ADAPTER, FINDINGS, MANIFEST, PROBE, RECIPE, REPORT, file_sha256
from loratune.runs.manifest import AS_PLAIN, Manifest, read_manifest
from loratune.runs.record import RunRecord
from loratune.runs.report import Report, read_report
from loratune.runs.status import read_status
from loratune.runs.tokenizer_files import tokenizer_files

ADAPTER_CONFIG = "adapter_config.json"
TO_PROMPT = (RECIPE, PROBE)
"""What every command reads of a run."""
TO_INFER = (*TO_PROMPT, ADAPTER)
ALL_SEALED = (*TO_INFER, REPORT, FINDINGS)
# Files that are read if they exist, so that adding one counts as a change.
READ_IF_THERE = (ADAPTER_CONFIG, "adapter_model.safetensors", "config.json")


def changed_files(
    run: Path, manifest: Manifest, parts: Collection[str], hash_of: Callable[[Path], str] = file_sha256
) -> list[str]:
    """Return the files of a run that differ from its manifest, by hash.

    Args:
        run: run folder.
        manifest: result of `read_manifest`.
        parts: files and folders of the run to check, such as `TO_INFER`.
        hash_of: gives a file's sha256.

    Raises:
        LoratuneError: the manifest has no file records.
    """
    files, with_adapter = _sealed_files(run, manifest, ADAPTER in parts), ADAPTER in parts
    wanted = {name: record for name, record in files.items() if name.partition("/")[0] in parts}
    present = _read_names(run / ADAPTER, f"{ADAPTER}/") if with_adapter else []
    check = compare_files(run, wanted, present, hash_of)
    return [*sorted((*check.changed, *check.missing)), *(f"{name} (added)" for name in check.added)]


def require_unchanged(run: Path, changed: list[str], can_insist: bool = False) -> None:
    """Raise if files of a run have changed.

    Args:
        run: run folder.
        changed: result of `changed_files`.
        can_insist: whether the command accepts changed files with --force.

    Raises:
        LoratuneError: lists the files, with advice.
    """
    if not changed:
        return
    insist = ", or insist with --force" if can_insist else ""
    about = f"; {RECIPE} says how this run was trained: for another one, copy it and give the copy to sft --config"
    raise LoratuneError(
        f"{run}: changed or missing since the run ended: {', '.join(changed)}; restore "
        f"{'it' if len(changed) == 1 else 'them'}{insist}{about if RECIPE in changed else ''}",
        Exit.MODEL,
    )


def open_report(run: Path) -> Report:
    """Read a finished run's report, after comparing it with its hash; earlier versions recorded none.

    Raises:
        LoratuneError: it has changed since, or is damaged.
    """
    if (run / MANIFEST).is_file():
        require_unchanged(run, changed_files(run, read_manifest(run), (REPORT,)))
    return read_report(run)


def open_sealed(folder: Path, force: bool) -> tuple[Checkpoint | None, list[str]]:
    """Open a checkpoint for inference or merging, after comparing all files with their hashes.

    Args:
        folder: folder of the checkpoint.
        force: accept a damaged checkpoint.

    Returns:
        The checkpoint, or None if it is damaged; and its problems.

    Raises:
        LoratuneError: it is damaged, without `force`.
    """
    try:
        if not (folder / SEAL).is_file():
            raise LoratuneError(f"{folder}: no {SEAL} in it, so it is no whole checkpoint", Exit.MODEL)
        checkpoint = open_checkpoint(folder)
        added = sorted(set(_read_names(folder)) - read_json_object(folder / SEAL)["files"].keys())
        if added:
            raise LoratuneError(f"{folder}: added since it was written: {', '.join(added)}", Exit.MODEL)
    except LoratuneError as error:
        if force:
            return None, [str(error)]
        raise LoratuneError(
            f"{error}\nrestore it, take another checkpoint, or insist with --force", Exit.MODEL
        ) from error
    return checkpoint, []


def require_same_settings(checkpoint: Checkpoint, run: Path, record: RunRecord, force: bool) -> list[str]:
    """Compare a run's present settings with those of a checkpoint.

    Returns:
        The forced differences.

    Raises:
        LoratuneError: they differ, because the run continued with --allow-changes, or an old recipe was edited.
    """
    sealed, found = with_current_names(checkpoint.identity.get("settings", {})), record.settings()
    different = [
        f"{name} was {value!r} and is {found.get(name)!r}"
        for name, value in sealed.items()
        if name in found and found[name] != value
    ]
    if different and not force:
        raise LoratuneError(
            f"{checkpoint.folder} was made with other settings than its run has now:\n{bullet_list(different)}\n"
            f"restore {run / RECIPE} and {run / MANIFEST}, or insist with --force",
            Exit.MODEL,
        )
    return [f"settings: {difference}" for difference in different]


def _sealed_files(run: Path, manifest: Manifest, with_adapter: bool) -> Records:
    """Return a manifest's file records; earlier versions recorded none before the end of a run."""
    files, problems = manifest.files, ["what the base was"] if manifest.base is None else []
    if files is None or (with_adapter and not files) or (RECIPE not in files and _has_ended(run)):
        problems.append("what the run's files were")
    if problems:
        raise LoratuneError(
            f"{run / MANIFEST}: damaged: it does not say {' and '.join(problems)}; restore it. "
            f"{AS_PLAIN.format(run / ADAPTER)}",
            Exit.MODEL,
        )
    return files or {}


def _has_ended(run: Path) -> bool:
    try:
        return read_status(run).state == "finished"
    except LoratuneError:  # a missing or damaged status alone does not block the adapter
        return False


def _read_names(folder: Path, prefix: str = "") -> list[str]:
    """Return the files of an adapter's folder that would be read; others have no effect."""
    read = [*(name for name in READ_IF_THERE if (folder / name).is_file()), *tokenizer_files(folder)]
    return [f"{prefix}{name}" for name in read]
