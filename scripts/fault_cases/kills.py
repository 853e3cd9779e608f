"""SIGKILL at every file operation of a save, and at random times."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_cases.runner import Runner

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


def watch(folder: Path, at: Callable[[str], None]) -> None:
    """Call `at` before each write access to a file in a folder, and before and after each library's save."""
    import safetensors.torch
    import torch

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in EVENTS and details and isinstance(details[0], str | bytes | os.PathLike):
            if event == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR):
                return
            place = os.fsdecode(details[0])
            if place.startswith(str(folder)) and not place.endswith((".lock", ".lock-owner.json")):
                at(f"{event} {re.sub('[0-9a-f]{32}', '…', str(Path(place).relative_to(folder)))}")

    def both_sides(save: Callable[..., Any]) -> Callable[..., Any]:
        def saving(*arguments: Any, **settings: Any) -> Any:
            at("before a library's save")
            result = save(*arguments, **settings)
            at("after a library's save")
            return result

        return saving

    sys.addaudithook(hook)
    torch.save = both_sides(torch.save)
    safetensors.torch.save_file = both_sides(safetensors.torch.save_file)


def boundaries(runner: Runner) -> list[str]:
    """Return all file operations of an uninterrupted run."""
    log = runner.place / "boundaries"

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(what + "\n")

    runner.run("noted", sabotage=lambda: watch(runner.place / "noted", note))
    return log.read_text().splitlines()


def kill_at(folder: Path, number: int) -> Callable[[], None]:
    """Return a sabotage that kills the process before its n-th file operation."""

    def sabotage() -> None:
        seen: list[str] = []

        def count(what: str) -> None:
            seen.append(what)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        watch(folder, count)

    return sabotage


def at_file_boundaries(runner: Runner) -> Iterator[str | None]:
    """Kill at each operation from the start of the second save on: saves, rotation, final adapter, report."""
    events = boundaries(runner)
    saves = [number for number, what in enumerate(events) if what == "os.mkdir checkpoints/.loratune-…"]
    begin = saves[1]
    for number in range(begin + 1, len(events) + 1):
        if events[number - 1] == events[number - 2]:
            continue  # creating an existing folder
        name = f"boundary{number}"
        code = runner.run(name, sabotage=kill_at(runner.place / name, number))
        if code != -signal.SIGKILL:
            yield runner.failed(f"killed before {events[number - 1]!r}, ended with {code}")
        yield runner.resumed(name)


def at_random_moments(runner: Runner) -> Iterator[str | None]:
    """Kill at random times; a run may be killed several times."""
    for number in range(runner.kills):
        name = f"moment{number}"
        for _ in range(runner.random.choice([1, 1, 2, 3])):
            runner.run(name, "--resume=auto", kill_after=runner.random.uniform(0, runner.seconds))
        yield runner.resumed(name)


CASES = {"SIGKILL at file boundaries": at_file_boundaries, "SIGKILL at random moments": at_random_moments}
