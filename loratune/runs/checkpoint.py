"""Checkpoints of a run: named by step, and sealed with hashes of all files.

checkpoints/step-000050/
  checkpoint.json   written last: step, size and sha256 of every other file, identity, and progress of the run
  adapter_config.json, adapter_model.safetensors
  optimizer.pt, scheduler.pt, rng_state.pth (one per process), trainer_state.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import read_json_object
from loratune.printable import shortened
from loratune.runs.file_hashes import are_records, compare_files
from loratune.runs.folder import CHECKPOINTS, sealed, values_sha256
from loratune.writing import write_json

SEAL = "checkpoint.json"
FORMAT_VERSION = 1
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match their hashes."""

    folder: Path
    step: int
    identity: dict[str, Any]
    """Everything that affects the result: settings, data, base, versions, processes."""
    progress: dict[str, Any]
    """State of the callbacks."""


class UnknownFormatError(LoratuneError):
    """An intact checkpoint in the format of another loratune version."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint; leading zeros sort the names by step."""
    return checkpoints / f"{PREFIX}{step:06d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Return the steps with a checkpoint folder, in order."""
    names = (folder.name.removeprefix(PREFIX) for folder in checkpoints.glob(f"{PREFIX}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def seal_checkpoint(folder: Path, step: int, identity: dict[str, Any], progress: dict[str, Any]) -> None:
    """Record the hashes of the folder's files; nothing is written into it afterwards.

    Args:
        folder: folder with all files of the checkpoint.
        step: number of completed steps.
        identity: everything that affects the result.
        progress: state of the callbacks.
    """
    files = {path.name: sealed(path) for path in sorted(folder.iterdir()) if path.name != SEAL}
    values = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": files,
        "identity": identity,
        "progress": progress,
    }
    write_json(folder / SEAL, {**values, "sha256": values_sha256(values)})


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after comparing all its files with their hashes.

    Raises:
        LoratuneError: lists the files that are missing or changed.
        UnknownFormatError: another version wrote it.
    """
    values = read_json_object(folder / SEAL)
    version = values.get("format_version")
    if values.pop("sha256", None) != values_sha256(values):
        raise LoratuneError(f"{folder / SEAL}: has been changed", Exit.MODEL)
    if version != FORMAT_VERSION:
        raise UnknownFormatError(
            f"{folder}: written in format {version}, this loratune reads {FORMAT_VERSION}; resume with the version "
            f"that wrote it, or from an earlier checkpoint with --resume STEP",
            Exit.MODEL,
        )
    try:
        files, step = values["files"], int(values["step"])
        if not are_records(files):
            raise ValueError("it does not say which files it has")
        check = compare_files(folder, files)
        checkpoint = Checkpoint(folder, step, dict(values["identity"]), dict(values["progress"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoratuneError(f"{folder / SEAL}: damaged ({error})", Exit.MODEL) from error
    problems = [f"{name} is missing" for name in check.missing]
    problems += [f"{name} has been changed" for name in check.changed]
    if problems:
        raise LoratuneError(f"{folder}: damaged\n{bullet_list(problems)}", Exit.MODEL)
    return checkpoint


def newest_checkpoint(
    run: Path, strict: bool = False, check: Callable[[Checkpoint], None] = lambda _: None
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint of a run, and the problems of newer ones.

    Args:
        run: run folder.
        strict: raise for a damaged checkpoint instead of using an older one.
        check: raises LoratuneError for a checkpoint that is damaged although its hashes match.

    Raises:
        LoratuneError: the newest checkpoint is damaged, with `strict`.
        UnknownFormatError: another version wrote a newer checkpoint, which is not damage to skip.
    """
    damaged: list[str] = []
    for step in reversed(checkpoint_steps(run / CHECKPOINTS)):
        try:
            checkpoint = open_checkpoint(step_folder(run / CHECKPOINTS, step))
            check(checkpoint)
        except LoratuneError as error:
            if strict or isinstance(error, UnknownFormatError):
                raise
            damaged.append(str(error))
        else:
            return checkpoint, damaged
    return None, damaged


def named_checkpoint(run: Path, name: str) -> Checkpoint:
    """Return a checkpoint by its step, name, or path.

    Raises:
        LoratuneError: there is none, or it is damaged.
    """
    checkpoints = run / CHECKPOINTS
    folder = step_folder(checkpoints, int(name)) if name.isdecimal() else checkpoints / Path(name).name
    if not folder.is_dir():
        there = ", ".join(str(step) for step in checkpoint_steps(checkpoints)) or "none"
        raise LoratuneError(
            f"--resume {shortened(name)}: {run} has no such checkpoint; steps that have one: {there}; give one of "
            "them, auto, or --resume alone for the newest",
            Exit.MODEL,
        )
    return open_checkpoint(folder)
