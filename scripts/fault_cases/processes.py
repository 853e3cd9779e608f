"""What can happen to one of two processes of a run: the other one has to end, and the resumed run to be the same."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fault_cases.runner import Runner, Sabotage

PROCESSES = 2
TIMEOUT = 10
"""As training.ddp_timeout, in seconds."""
BOUND = TIMEOUT + 15
"""Seconds from a fault to the end of the process that is well."""
PEER = 8
"""Exit code of a process that has lost another one."""
WHOLE = "whole-of-two"


def started(runner: Runner, name: str, *flags: str, sabotages: Sequence[Sabotage | None] = (None, None)) -> list[int]:
    """Start the processes of a run; return their process IDs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    place |= {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    return [
        runner.start(
            name, f"--training.ddp_timeout={TIMEOUT}", *flags, sabotage=sabotage,
            **place, RANK=number, LOCAL_RANK=number,
        )
        for number, sabotage in enumerate(sabotages)
    ]  # fmt: skip


def expected(runner: Runner) -> str:
    """Return the hash of the adapter of an uninterrupted run of the processes."""
    if not (runner.place / WHOLE).exists():
        codes = [runner.ended(child) for child in started(runner, WHOLE)]
        if any(codes):
            raise RuntimeError(f"the uninterrupted run ended with {codes}: {runner.last_line(WHOLE)}")
    return runner.digest(WHOLE)


def resumed(runner: Runner, name: str) -> str | None:
    """Resume a run with all processes, and compare its adapter."""
    codes = [runner.ended(child) for child in started(runner, name, "--resume=auto")]
    return runner.compared(name, max(codes, key=abs), expected(runner))


def at_random_moments(runner: Runner) -> Iterator[str | None]:
    """Kill one of the processes at random times; a run may be killed several times."""
    expected(runner)
    for number in range(runner.kills):
        name = f"process{number}"
        for _ in range(runner.random.choice([1, 1, 2])):
            children = started(runner, name, "--resume=auto")
            time.sleep(runner.random.uniform(0, 1.5 * runner.seconds))
            killed = runner.random.randrange(PROCESSES)
            os.kill(children[killed], signal.SIGKILL)
            begun = time.monotonic()
            codes = [runner.ended(child) for child in children]
            if codes[1 - killed] not in (0, PEER) or time.monotonic() - begun > BOUND:
                took = f"after {time.monotonic() - begun:.0f} s"
                yield runner.failed(f"the other process ended with {codes[1 - killed]} {took}")
        yield resumed(runner, name)


def during_step(step: int, act: Callable[[], None]) -> Sabotage:
    """Return a sabotage that acts once a step has begun, before its gradients are reduced."""

    def sabotage() -> None:
        from loratune.training.trainer import AdapterTrainer

        plain = AdapterTrainer.compute_loss
        done: list[int] = []

        def compute_loss(self: AdapterTrainer, *arguments: object, **settings: object) -> object:
            if self.state.global_step == step and not done:
                done.append(1)
                act()
            return plain(self, *arguments, **settings)  # type: ignore[arg-type]

        AdapterTrainer.compute_loss = compute_loss  # type: ignore[assignment,method-assign]

    return sabotage


def stop() -> None:
    """Stop this process, as a machine that no longer answers."""
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    """Hang in the main thread alone."""
    time.sleep(3600)


def lose_connections() -> None:
    """Cut all connections of this process."""
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as connection:
            connection.getpeername()  # raises for those that only listen
            connection.shutdown(socket.SHUT_RDWR)


def run_out_of_memory() -> None:
    """Raise what torch raises."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def of_one(act: Callable[[], None], own_codes: tuple[int, ...], runner: Runner) -> Iterator[str | None]:
    """Let something happen to each of the processes in turn: both end within the bound, and can be resumed."""
    expected(runner)
    for number in range(PROCESSES):
        for step in (1, runner.steps - 1):
            name = f"{act.__name__}{number}-{step}"
            sabotages = [during_step(step, act) if one == number else None for one in range(PROCESSES)]
            children = started(runner, name, sabotages=sabotages)
            code = runner.ended(children[1 - number])
            seconds = time.monotonic()
            if code != PEER:
                yield runner.failed(f"{name}: the other process ended with {code}: {runner.last_line(name)}")
            if act is stop:
                os.kill(children[number], signal.SIGKILL)
            code = runner.ended(children[number])
            if code not in own_codes or time.monotonic() - seconds > BOUND:
                yield runner.failed(f"{name}: it ended with {code}")
            yield resumed(runner, name)


CASES = {
    "SIGKILL of one of two processes": at_random_moments,
    "one of two processes stops": lambda runner: of_one(stop, (-signal.SIGKILL,), runner),
    "one of two processes hangs": lambda runner: of_one(sleep, (PEER,), runner),
    "one of two processes loses its connections": lambda runner: of_one(lose_connections, (PEER,), runner),
    "one of two processes is out of memory": lambda runner: of_one(run_out_of_memory, (6,), runner),
}
