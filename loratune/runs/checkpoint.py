"""Checkpoints of a run: named by step, sealed with hashes, found again, and compared with what is about to continue.

checkpoints/step-000050/
  checkpoint.json   written last: step, size and sha256 of every other file, what exactness hangs on, where the
                    run stood
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
from loratune.runs.file_hashes import compare_files
from loratune.runs.folder import CHECKPOINTS, sealed, values_sha256
from loratune.writing import write_json

SEAL = "checkpoint.json"
FORMAT_VERSION = 1
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written."""

    folder: Path
    step: int
    identity: dict[str, Any]
    """What exactness hangs on: settings, data, base, versions, processes."""
    progress: dict[str, Any]
    """Where callbacks stood."""


class UnknownFormatError(LoratuneError):
    """A checkpoint that is whole, but of a version of loratune that writes them otherwise."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of a step's checkpoint; the zeros make names sort by step."""
    return checkpoints / f"{PREFIX}{step:06d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps that have a checkpoint folder, in order."""
    names = (folder.name.removeprefix(PREFIX) for folder in checkpoints.glob(f"{PREFIX}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def seal_checkpoint(folder: Path, step: int, identity: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write down what the folder holds; nothing is written into it afterwards.

    Args:
        folder: with all files of the checkpoint.
        step: that it was made after.
        identity: what exactness hangs on.
        progress: where callbacks stood.
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
    """Read a checkpoint, all of whose files are compared with their hashes.

    Raises:
        LoratuneError: with every file that is missing or changed.
        UnknownFormatError: another version has written it.
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
        files, step = dict(values["files"]), int(values["step"])
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
    """The newest checkpoint of a run that is whole, and what is wrong with newer ones.

    Args:
        run: its folder.
        strict: do not go back behind a damaged one.
        check: raises LoratuneError for one that is as it was sealed and damaged nevertheless.

    Raises:
        LoratuneError: the newest is damaged, with `strict`.
        UnknownFormatError: another version has written a newer one than those that are whole; that is no damage to go
            back behind.
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
    """A checkpoint by its step, its name, or its path.

    Raises:
        LoratuneError: there is none, or it is damaged.
    """
    checkpoints = run / CHECKPOINTS
    folder = step_folder(checkpoints, int(name)) if name.isdecimal() else checkpoints / Path(name).name
    if not folder.is_dir():
        there = ", ".join(str(step) for step in checkpoint_steps(checkpoints)) or "none"
        raise LoratuneError(f"{run} has no checkpoint {name}; steps that have one: {there}", Exit.MODEL)
    return open_checkpoint(folder)
