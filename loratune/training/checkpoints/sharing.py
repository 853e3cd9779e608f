"""Gives every process the checkpoint to resume from, also on machines that do not share the first one's disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from loratune.errors import Exit, LoratuneError
from loratune.runs.checkpoint import SEAL, Checkpoint, checkpoint_steps
from loratune.runs.folder import CHECKPOINTS
from loratune.training.processes.group import from_all, from_first


@contextmanager
def readable_everywhere(start: Checkpoint | None) -> Iterator[Checkpoint | None]:
    """Yield a checkpoint in a folder that this process can read; each process has to call this.

    Args:
        start: the checkpoint in the first process's run folder.
    """
    if start is None:
        yield None
        return
    seal = from_first((start.folder / SEAL).read_bytes)
    is_missing = not _is_there(start.folder, seal)
    if not any(from_all(is_missing)):
        yield start
        return
    files = from_first(lambda: {path.name: path.read_bytes() for path in sorted(start.folder.iterdir())})
    if not is_missing:
        yield start
        return
    with TemporaryDirectory(prefix="loratune-checkpoint-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield replace(start, folder=Path(folder))


def require_run_of_first(output: Path) -> None:
    """Refuse to begin anew where the run to resume is on the machine of another process than the first one.

    Args:
        output: the run's folder, on each machine; each process has to call this.

    Raises:
        LoratuneError: with the number of that process.
    """
    seen = from_all(bool(checkpoint_steps(output / CHECKPOINTS)))
    if any(seen) and not seen[0]:
        raise LoratuneError(
            f"{output}: its checkpoints are on the machine of process {seen.index(True)}, and the first process has "
            "none; make that machine the first one, as with torchrun's --node-rank 0",
            Exit.USAGE,
        )


def _is_there(folder: Path, seal: bytes) -> bool:
    """Whether a folder holds this checkpoint, and not one of the same step of another run."""
    try:
        return (folder / SEAL).read_bytes() == seal
    except OSError:
        return False
