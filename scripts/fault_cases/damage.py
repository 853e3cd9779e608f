"""Damaged checkpoints, a full disk, changed data and settings."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fault_cases.runner import Runner
from fault_cases.signals import at_step


def cut(path: Path) -> None:
    """Truncate a file to half its size."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def interrupted(runner: Runner, name: str) -> Path:
    """Return a run with two checkpoints."""
    runner.run(name, sabotage=at_step(signal.SIGTERM, 3))
    return runner.place / name


def every_file(damage: Callable[[Path], None], runner: Runner) -> Iterator[str | None]:
    """Damage each file of the newest checkpoint: it has to be reported, and the previous checkpoint used."""
    newest = interrupted(runner, "damaged") / "checkpoints" / "step-000004"
    for file in sorted(path.name for path in newest.iterdir()):
        name = f"damaged-{file}"
        damage(runner.copy("damaged", name) / "checkpoints" / "step-000004" / file)
        (runner.place / f"{name}.log").write_text("")
        if runner.run(name, "--resume", "--strict-resume") != 4:
            yield runner.failed(f"{file}: --strict-resume took it")
        yield runner.resumed(name)
        if file not in (runner.place / f"{name}.log").read_text():
            yield runner.failed(f"{file}: not named")


def full_disk(runner: Runner) -> Iterator[str | None]:
    """Limit the size of files to that of some of a checkpoint's files."""
    sizes = sorted(
        path.stat().st_size for path in (runner.place / "whole" / "checkpoints").rglob("*") if path.is_file()
    )
    for limit in (sizes[-1] - 1, sizes[len(sizes) // 2]):
        name = f"full{limit}"

        def sabotage(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code = runner.run(name, sabotage=sabotage)
        if code != 6:
            yield runner.failed(f"files of {limit} bytes: ended with {code}: {runner.last_line(name)}")
        if list((runner.place / name).rglob(".loratune-*")):
            yield runner.failed(f"files of {limit} bytes: something unfinished is left")
        yield runner.resumed(name)


def changes(runner: Runner) -> Iterator[str | None]:
    """Change data, seed or learning rate: resuming has to be refused, and nothing may be changed."""
    run = interrupted(runner, "changed")
    for flag in ("--seed=7", "--training.learning_rate=0.5", "--lora.rank=2", "--training.batch_size=3"):
        if runner.run("changed", "--resume", flag) != 2:
            yield runner.failed(f"{flag} was taken")
    rows = runner.rows.read_text()
    runner.rows.write_text(rows.replace("It is 3.", "It is 4."))
    if runner.run("changed", "--resume") != 2:
        yield runner.failed("other data was taken")
    runner.rows.write_text(rows)
    if not (run / "checkpoints" / "step-000004").is_dir():
        yield runner.failed("a checkpoint is gone")
    yield runner.resumed("changed")


CASES = {
    "every file of a checkpoint cut off": partial(every_file, cut),
    "every file with one bit flipped": partial(every_file, flip),
    "every file deleted": partial(every_file, Path.unlink),
    "disk full": full_disk,
    "changed data, seed, learning rate": changes,
}
