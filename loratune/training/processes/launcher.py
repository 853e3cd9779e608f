"""Starts the processes of a run on this machine, one for each GPU, and ends them together.

torchrun sends SIGTERM to the others as soon as one process fails. loratune's processes would answer with a checkpoint,
which needs all of them. It also gives them the same time after a failure as after a signal, when they save the step.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from torch.distributed import TCPStore

from loratune.commands import Command
from loratune.errors import Exit, Interrupted, LoratuneError
from loratune.model.hardware import visible_gpus
from loratune.runs.folder import STATUS
from loratune.runs.going_on import next_command
from loratune.runtime import LAUNCHER, PASSED_ON, is_launched, program, signals_to

HOST, LOOPBACK = "127.0.0.1", "lo"
PROGRAM = program("loratune")
POLL_SECONDS = 0.1
SECONDS_AFTER_FAILURE = 20
"""How long the other processes may take to notice that one has failed, and to end by themselves."""
SECONDS_AFTER_REPEATED = 30
"""How long they may take after a second signal, which asks them to stop at once."""
SHOWN_LINES, READ_BYTES = 30, 65536
UNWRAPPED = 4096
"""Columns of the processes whose output goes to files; what is shown of it is wrapped once, for this terminal."""
STOPPED = 128 + int(PASSED_ON or 0)
"""Exit code of a process that has handled the signal which was passed on."""
AUTO = "auto"
ERROR = re.compile(r"^error: ", re.MULTILINE)


def processes_to_start(gpus: str) -> int:
    """Return how many processes a run needs for the GPUs of `--gpus`; 1 stands for this one.

    Args:
        gpus: a number, or auto for all GPUs that are visible.

    Raises:
        LoratuneError: there are fewer GPUs, or another launcher has started this process.
    """
    if gpus != AUTO and not (gpus.isdecimal() and int(gpus)):
        raise LoratuneError(f"--gpus {gpus}: give a number from 1, or auto for all", Exit.USAGE)
    if is_launched():
        raise LoratuneError(
            "--gpus starts the processes of a run itself; leave it out beside torchrun, accelerate launch or srun, or "
            "unset MASTER_ADDR if it is left over from one",
            Exit.USAGE,
        )
    there = visible_gpus()
    wanted = there if gpus == AUTO else int(gpus)
    if not there:
        raise LoratuneError(f"--gpus {gpus}: torch sees no GPU on this machine; leave it out for the CPU", Exit.USAGE)
    if wanted > there:
        raise LoratuneError(
            f"--gpus {gpus}: torch sees {there} on this machine (CUDA_VISIBLE_DEVICES limits them)", Exit.USAGE
        )
    if wanted > 1 and PASSED_ON is None:
        raise LoratuneError("--gpus needs Linux for more than one", Exit.USAGE)
    return wanted


def launch(count: int, arguments: Sequence[str], output: Path) -> None:
    """Run loratune in several processes on this machine until all have ended.

    The first one writes to this terminal; of another one only the error that ended the run is shown.

    Args:
        count: number of processes.
        arguments: loratune's command line.
        output: the run's folder.

    Raises:
        LoratuneError: why a process has failed, with its exit code.
        Interrupted: a signal ended the run before the first process could say so.
        SystemExit: the first process has said why.
    """
    with _started(count, arguments) as group:
        with signals_to(group.pass_on):
            group.wait()
        group.raise_if_failed(output)


@contextmanager
def _started(count: int, arguments: Sequence[str]) -> Iterator[_Group]:
    # The store is this process's, so that it outlives each of the others: `Watch` reads from it how they stand.
    store, workers = _local_store(), list[_Worker]()
    try:
        for number in range(count):
            workers.append(_start(number, count, arguments, store.port))
        yield _Group(workers)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            worker.log.close()


def _local_store() -> TCPStore:
    """Return a store that listens on this machine alone: by itself, it takes connections from everywhere."""
    listening = socket.create_server((HOST, 0))
    port = listening.getsockname()[1]
    return TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _start(number: int, count: int, arguments: Sequence[str], port: int) -> _Worker:
    about: dict[str, object] = {
        **{"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count},
        **{"MASTER_ADDR": HOST, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True},
        # By itself, gloo listens on the address of the host's name, which other machines may reach.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK),
        LAUNCHER: os.getpid(),
    }
    if number > 0:
        about["COLUMNS"] = UNWRAPPED
    environment = {**os.environ, **{name: str(value) for name, value in about.items()}}
    log = TemporaryFile()  # noqa: SIM115 - without a name, so that a launcher that is killed leaves nothing
    output = None if number == 0 else log
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on
    )
    return _Worker(number, process, log)


@dataclass
class _Worker:
    """A process of the run."""

    number: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    """What it has written; nothing of the first one, which writes to the terminal."""

    def error(self) -> str:
        """Return some lines of the end of its output: from its last error on, or the last ones."""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - READ_BYTES))
        text = self.log.read().decode(errors="replace").rstrip()
        *_, last = [None, *ERROR.finditer(text)]
        shown = text[last.end() :].splitlines()[:SHOWN_LINES] if last else text.splitlines()[-SHOWN_LINES:]
        return "\n".join(line[:UNWRAPPED] for line in shown)


class _Group:
    """The processes of a run."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._workers = workers
        self._ended = dict[int, int]()
        """Process → exit code, negative for a signal, in the order in which they ended by themselves."""
        self._begun = time.time()
        self._signals = list[int]()
        self._deadline = float("inf")

    def pass_on(self, number: int, _: object) -> None:
        """Ask each process to end, as a signal handler."""
        self._signals.append(number)
        if len(self._signals) > 1:
            self._end_within(SECONDS_AFTER_REPEATED)
        for worker in self._workers:
            worker.process.send_signal(int(PASSED_ON or number))

    def wait(self) -> None:
        """Wait until all have ended; the others get some time where one has failed, or the first has finished."""
        while len(self._ended) < len(self._workers):
            for worker in self._workers:
                code = worker.process.poll()
                if code is not None and worker.number not in self._ended:
                    self._ended[worker.number] = code
                    if code != 0 or worker.number == 0:
                        self._end_within(SECONDS_AFTER_FAILURE)
            if time.monotonic() > self._deadline:
                return
            time.sleep(POLL_SECONDS)

    def _end_within(self, seconds: float) -> None:
        # After a first signal, a process that has stopped does not hurry the one that writes the checkpoint.
        if len(self._signals) != 1:
            self._deadline = min(self._deadline, time.monotonic() + seconds)

    def raise_if_failed(self, output: Path) -> None:
        """Say which process ended the run, unless the first one has said it.

        Raises:
            LoratuneError: why a process has failed.
            Interrupted: a signal ended the run before the first process could say so.
            SystemExit: the first process has said why.
        """
        failed = {number: code for number, code in self._ended.items() if code != 0}
        if not failed:
            return
        if self._signals and all(_is_stopped(code) for code in failed.values()):
            if failed.get(0) == STOPPED:
                raise SystemExit(128 + self._signals[0])
            raise Interrupted(self._signals[0])
        causes = {number: code for number, code in failed.items() if code != Exit.PEER} or failed
        number, code = next(iter(causes.items()))
        if causes.get(0) == code and code > 0:
            raise SystemExit(code)
        said, name = self._workers[number].error(), f"process {number} of {len(self._workers)}"
        advised = self._advice(output) if code < 0 or code == Exit.PEER else []
        if code < 0:
            why = "; the system may have ended it for want of memory" if -code == signal.SIGKILL else ""
            text = f"{name} was ended by {signal.Signals(-code).name}{why}" + (f"\n{said}" if said else "")
            raise LoratuneError(text, Exit.IO, advised)
        raise LoratuneError(f"{name}: {said or f'exit code {code}'}", Exit(code), advised)

    def _advice(self, output: Path) -> list[Command]:
        """Return how to go on with the run; nothing where the folder still holds an earlier one."""
        status = output / STATUS
        is_begun = status.is_file() and status.stat().st_mtime >= self._begun
        go_on = next_command(output, "crashed") if is_begun else None
        return [go_on] if go_on else []


def _is_stopped(code: int) -> bool:
    """Whether a process ended by the signal that was passed on, also where it could not handle it yet."""
    return code in (STOPPED, -int(PASSED_ON or 0), Exit.PEER)
