"""Runs of several processes: how they start, agree, end together, and resume without a shared disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROWS
from processes import COMMAND_LINE, Program, comes_true
from safetensors.torch import load_file
from torch.distributed import TCPStore

import loratune
from loratune.cli import sft
from loratune.errors import Exit, Interrupted, LoratuneError
from loratune.model.hardware import Hardware
from loratune.runs.folder import STATUS, read_metrics
from loratune.runtime import LAUNCHER, PARENT, PASSED_ON
from loratune.training import record
from loratune.training.checkpoints.sharing import require_run_of_first
from loratune.training.processes import launcher
from loratune.training.processes.agreement import require_same_everywhere
from loratune.training.processes.launcher import launch, processes_to_start

Start = Callable[..., list[Program]]

PART = """
import json, os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))
signal.signal(signal.SIGTERM, lambda *_: None)
for act in json.loads(sys.argv[1])[os.environ["RANK"]]:
    kind, _, value = act.partition(" ")
    if kind == "say":
        print(value, file=sys.stderr, flush=True)
    elif kind == "noise":
        sys.stderr.buffer.write(b"\\xff\\x00\\n" * int(value))
        sys.stderr.flush()
    elif kind == "sleep":
        end = time.monotonic() + float(value)
        while time.monotonic() < end:
            time.sleep(0.01)
    elif kind == "asked":
        while len(asked) < int(value):
            time.sleep(0.01)
    elif kind == "make":
        open(value, "x").close()
    elif kind == "die":
        os.kill(os.getpid(), int(value))
    elif kind == "exit":
        sys.exit(int(value))
"""
"""Plays a process of a run: what each one does is the command line's argument."""


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Launch processes that do what is said, in the place of loratune's."""
    monkeypatch.setattr(launcher, "PROGRAM", (sys.executable, "-c", PART))
    monkeypatch.setattr(launcher, "SECONDS_AFTER_FAILURE", 2)
    monkeypatch.setattr(launcher, "SECONDS_AFTER_REPEATED", 2)

    def run(*parts: list[str]) -> None:
        plan = {str(number): part for number, part in enumerate(parts)}
        launch(len(parts), [json.dumps(plan)], tmp_path)

    return run


def send_soon(*numbers: int) -> None:
    """Send signals to this process, as a terminal would."""

    def send() -> None:
        for number in numbers:
            time.sleep(0.7)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def test_all_processes_run_to_their_end(play: Callable[..., None], tmp_path: Path) -> None:
    ends = [tmp_path / str(number) for number in range(3)]
    play(["sleep 0.3", f"make {ends[0]}"], [f"make {ends[1]}"], ["sleep 0.6", f"make {ends[2]}"])
    assert all(end.is_file() for end in ends)


@pytest.mark.parametrize(
    ("parts", "code", "words"),
    [
        (
            [["sleep 0.3", "exit 8"], ["say noise", "say error: out of memory", "exit 6"]],
            6,
            "process 1 of 2: out of mem",
        ),
        ([["exit 8"], ["sleep 0.5", "say error: out of memory", "exit 6"]], 6, "process 1 of 2: out of memory"),
        ([["sleep 0.3", "exit 8"], ["die 9"]], 6, "process 1 of 2 was ended by SIGKILL; the system may"),
        ([["die 11"], ["sleep 0.3", "exit 8"]], 6, "process 0 of 2 was ended by SIGSEGV"),
        ([["sleep 60"], ["say error: no rows", "exit 3"]], 3, "process 1 of 2: no rows"),
        ([["sleep 60"], ["say error: process 0 hangs", "exit 8"]], 8, "process 1 of 2: process 0 hangs"),
        (
            [["sleep 0.1"], ["say Traceback", "say ValueError: x", "exit 1"]],
            1,
            "process 1 of 2: Traceback\nValueError: x",
        ),
    ],
)
def test_the_process_that_ended_the_run_is_named(
    play: Callable[..., None], parts: list[list[str]], code: int, words: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(LoratuneError) as failed:
        play(*parts)
    assert failed.value.exit_code == code
    assert failed.value.message.startswith(words)
    assert time.monotonic() - begun < 30, "nobody waits for a process that does not end"


def test_when_the_first_process_has_finished_no_other_is_waited_for(play: Callable[..., None]) -> None:
    begun = time.monotonic()
    play(["sleep 0.1"], ["sleep 60"])
    assert time.monotonic() - begun < 30


def test_of_a_long_output_the_end_is_shown(play: Callable[..., None]) -> None:
    with pytest.raises(LoratuneError) as failed:
        play(["sleep 60"], ["noise 5000000", "say error: no rows", "noise 5000", "exit 3"])
    assert failed.value.message.startswith("process 1 of 2: no rows\n")
    assert len(failed.value.message.splitlines()) == launcher.SHOWN_LINES


def test_an_earlier_run_in_the_folder_is_not_gone_on_with(play: Callable[..., None], tmp_path: Path) -> None:
    status = tmp_path / STATUS
    for age, advised in ((60, 0), (-60, 1)):
        status.write_text("{}")
        os.utime(status, (time.time() - age,) * 2)
        with pytest.raises(LoratuneError) as failed:
            play(["exit 8"], ["die 9"])
        assert len(failed.value.commands) == advised


@pytest.mark.slow
def test_the_working_folder_has_no_modules_of_the_processes(tmp_path: Path) -> None:
    (tmp_path / "loratune.py").write_text("raise SystemExit('the working folder')")
    code = "import subprocess; from loratune.training.processes.launcher import PROGRAM as program; "
    code += "subprocess.run([*program, '--version'], check=True)"
    place = os.environ | {"PYTHONPATH": str(Path(loratune.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=place, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("loratune ")


def test_what_the_first_process_has_said_is_not_said_again(play: Callable[..., None]) -> None:
    with pytest.raises(SystemExit) as ended:
        play(["sleep 0.3", "exit 3"], ["say error: no rows", "exit 3"])
    assert ended.value.code == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_waited_for(play: Callable[..., None], number: int) -> None:
    """The first process takes longer to save than a failure would give it; the other one ends early."""
    send_soon(number)
    saving = ["asked 1", "sleep 3", f"exit {128 + int(PASSED_ON or 0)}"]
    with pytest.raises(SystemExit) as ended:
        play(saving, ["asked 1", f"exit {128 + int(PASSED_ON or 0)}"])
    assert ended.value.code == 128 + number


def test_a_second_signal_bounds_the_wait(play: Callable[..., None]) -> None:
    send_soon(signal.SIGTERM, signal.SIGTERM)
    begun = time.monotonic()
    with pytest.raises(Interrupted) as ended:
        play(["asked 2", "sleep 60"], ["asked 2", f"exit {128 + int(PASSED_ON or 0)}"])
    assert ended.value.signal_number == signal.SIGTERM
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("gpus", "there", "count", "words"),
    [
        ("auto", 4, 4, ""), ("2", 4, 2, ""), ("1", 1, 1, ""), ("auto", 1, 1, ""), ("auto", 0, 0, "sees no GPU"),
        ("3", 2, 0, "torch sees 2"), ("0", 2, 0, "give a number from 1"), ("all", 2, 0, "give a number from 1"),
        ("-1", 2, 0, "give a number from 1"),
    ],
)  # fmt: skip
def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, gpus: str, there: int, count: int, words: str) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda: there)
    if not words:
        assert processes_to_start(gpus) == count
        return
    with pytest.raises(LoratuneError, match=words) as refused:
        processes_to_start(gpus)
    assert refused.value.exit_code == Exit.USAGE


def test_gpus_beside_another_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(LoratuneError, match="beside torchrun"):
        processes_to_start("2")


def test_a_process_of_its_own_trains(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setattr(sft, "_train", lambda *_: trained.append(1))
    monkeypatch.setattr(launcher, "visible_gpus", lambda: 2)
    monkeypatch.setattr(launcher, "launch", lambda count, *_: trained.append(count))
    line = ("sft", "--config", "quickstart", "--gpus", "2")
    assert cli(*line).exit_code == 0
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))
    assert cli(*line).exit_code == 0
    monkeypatch.setenv(LAUNCHER, str(PARENT))
    assert cli(*line).exit_code == 0
    assert trained == [2, 2, 1], "a launcher that has not started this process does not count"


@pytest.mark.parametrize(
    ("kind", "here", "gpus"), [("cuda", "4", 4), ("cuda", "2", 1), ("cuda", None, 1), ("cpu", "4", 1)]
)
def test_a_run_goes_on_with_as_many_processes(
    monkeypatch: pytest.MonkeyPatch, kind: str, here: str | None, gpus: int
) -> None:
    """Also one that torchrun has started, since the command that is advised would be refused otherwise."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert record._gpus(Hardware(torch.device(kind), True, "a device", 4)) == gpus


def test_nobody_elsewhere_can_connect_to_the_store() -> None:
    store = launcher._local_store()
    listening = psutil.Process().net_connections("inet")
    assert {found.laddr.ip for found in listening if found.laddr.port == store.port} == {launcher.HOST}
    same = TCPStore(launcher.HOST, store.port, is_master=False)
    same.set("told", "here")
    assert store.get("told") == b"here"


def test_a_machine_with_other_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"settings": {"seed": 1}, "rest": {"data 1 rows.json": "12 rows of abc"}, "versions": {}}
    other = {"seed": 1, "data 1 rows.json": "12 rows of def"}
    first = {**own["settings"], **own["rest"]}
    module = "loratune.training.processes.agreement.from_all"
    monkeypatch.setattr(module, lambda _: [first, first])
    require_same_everywhere(own)
    monkeypatch.setattr(module, lambda _: [first, first, other])
    with pytest.raises(LoratuneError, match="12 rows of abc in process 0, 12 rows of def in process 2"):
        require_same_everywhere(own)


@pytest.fixture
def machines(
    start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch, random_qwen: Path, rows_file: Path, tmp_path: Path
) -> Start:
    """Train on two machines that share no disk but for base and rows: each has a folder of its own as its place."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()

    def run(*flags: Any, code: str = COMMAND_LINE) -> list[Program]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        programs = []
        for number, folder in enumerate(folders):
            places = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
            for name, value in {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
                monkeypatch.setenv(name, str(value))
            monkeypatch.chdir(folder)
            programs.append(
                start(
                    "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file,
                    "--data.validation", "0.2", "--lora.dropout", "0.2", "--training.batch_size", "4",
                    "--checkpoints.every_steps", "3", "--checkpoints.keep", "9", "--evaluation.every_steps", "2",
                    "--output", "run", "--evaluation.questions_share", "0", *flags, code=code,
                )
            )  # fmt: skip
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
        return programs

    return run


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "adapter" / "adapter_model.safetensors"))


def losses(run: Path) -> list[tuple[int, float]]:
    return [(int(record["step"]), record["loss"]) for record in read_metrics(run) if "loss" in record]


def has_trained(run: Path, steps: int) -> Callable[[], bool]:
    return lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= steps


@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_machines_without_a_shared_disk_resume_to_the_same_bits(machines: Start, tmp_path: Path, sharding: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ("--training.max_steps", "6", "--model.sharding", sharding)
    for program in machines(*flags):
        assert program.exit_code() == 0, program.stderr
    assert list(second.iterdir()) == [], "nothing is left on another machine"
    whole = shutil.move(first / "run", tmp_path / "whole")
    shutil.copytree(whole, first / "run")
    assert {path.name for path in (first / "run/checkpoints/step-000003").glob("rng*")} == {
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip
    for step in (4, 6):
        shutil.rmtree(first / f"run/checkpoints/step-{step:06d}", ignore_errors=True)
    shutil.rmtree(first / "run/adapter")
    (first / "run/status.json").write_text('{"program": "loratune", "state": "running"}')
    for program in machines(*flags, "--resume"):
        assert program.exit_code() == 0, program.stderr
    assert "resuming after step 3" in program.stderr
    assert list(second.iterdir()) == []
    expected = adapter(whole)
    assert adapter(first / "run").keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter(first / "run").items())
    assert losses(first / "run") == losses(whole)


@pytest.mark.slow
def test_a_stopped_process_ends_the_run_and_is_named(machines: Start, tmp_path: Path) -> None:
    programs = machines("--training.max_steps", "4000", "--training.ddp_timeout", "4")
    assert comes_true(has_trained(tmp_path / "first/run", 4))
    programs[1].send(signal.SIGSTOP)
    assert programs[0].exit_code() == Exit.PEER
    said = " ".join(programs[0].stderr.split())
    assert f"process 1 on {socket.gethostname()} no longer answers; the others have waited for 4 seconds" in said
    assert json.loads((tmp_path / "first/run/status.json").read_text())["state"] == "failed"


def test_a_run_on_the_machine_of_another_process_is_not_begun_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = "loratune.training.checkpoints.sharing.from_all"
    for seen in ([False], [True], [False, False], [True, True], [True, False]):
        monkeypatch.setattr(module, lambda _, seen=seen: seen)
        require_run_of_first(tmp_path)
    monkeypatch.setattr(module, lambda own: [own, True])
    with pytest.raises(LoratuneError, match="on the machine of process 1, and the first process has none"):
        require_run_of_first(tmp_path)


STUCK = """
import os, time
from loratune.training.trainer import AdapterTrainer
def stick(plain):
    def sticking(self, *arguments, **settings):
        if os.environ["RANK"] == "0" and self.state.global_step == {step}:
            time.sleep(60)
        return plain(self, *arguments, **settings)
    return sticking
AdapterTrainer.{method} = stick(AdapterTrainer.{method})
"""


STUCK_OPTIMIZER = """
import os, time
from torch.optim import AdamW
plain, calls = AdamW.step, []
def step(self, *arguments, **settings):
    calls.append(1)
    if os.environ["RANK"] == "0" and len(calls) == 3:
        time.sleep(60)
    return plain(self, *arguments, **settings)
AdamW.step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sticking",
    [
        STUCK.format(method="_save_scaler", step=3),
        STUCK.format(method="_save_scaler", step=6),
        STUCK.format(method="log", step=2),
        STUCK_OPTIMIZER,
    ],
    ids=["saving", "saving last", "logging", "optimizer step"],
)
def test_a_process_that_hangs_outside_of_its_passes_is_named(machines: Start, sticking: str) -> None:
    """As on a network's disk that does not answer; the other one is in the next step by then, or has none left."""
    programs = machines("--training.max_steps", "6", "--training.ddp_timeout", "4", code=sticking + COMMAND_LINE)
    assert [program.exit_code() for program in programs] == [Exit.PEER, Exit.PEER]
    said = " ".join(" ".join(program.stderr for program in programs).split())
    assert f"process 0 on {socket.gethostname()} has made no progress for 4 seconds" in said
    assert "have waited for each other" not in said


@pytest.mark.slow
def test_the_flags_of_the_first_process_say_whether_a_run_goes_on(machines: Start, tmp_path: Path) -> None:
    assert [program.exit_code() for program in machines("--training.max_steps", "6")] == [0, 0]
    code = "import os, sys\nif os.environ['RANK'] == '1': sys.argv.remove('--resume')\n" + COMMAND_LINE
    programs = machines("--training.max_steps", "6", "--resume", code=code)
    assert [program.exit_code() for program in programs] == [0, 0]
    assert "is complete: step 6 of 6" in programs[0].stderr


def test_where_the_first_process_refuses_the_other_ends_at_once(machines: Start, tmp_path: Path) -> None:
    (tmp_path / "first/run").mkdir()
    (tmp_path / "first/run/mine.txt").write_text("kept")
    first, second = machines("--training.max_steps", "4")
    assert first.exit_code() == Exit.USAGE
    assert second.exit_code() == Exit.PEER
    assert "process 1 of 2 lost the connection" in " ".join(second.stderr.split()), "it does not wait for ddp_timeout"


def test_a_process_that_never_starts_is_named(machines: Start) -> None:
    first, second = machines("--training.max_steps", "4", "--training.ddp_timeout", "6")
    second.kill()
    assert first.exit_code() == Exit.PEER
    assert "one of 2 has not started within 6 seconds" in " ".join(first.stderr.split())


@pytest.mark.slow
def test_a_killed_process_ends_the_others_at_once(machines: Start, tmp_path: Path) -> None:
    programs = machines("--training.max_steps", "4000")
    assert comes_true(has_trained(tmp_path / "first/run", 4))
    programs[1].kill()
    assert programs[0].exit_code() == Exit.PEER
    assert "process 0 of 2 lost the connection to another one: " in " ".join(programs[0].stderr.split())


@pytest.mark.slow
def test_machines_with_other_rows_do_not_train(machines: Start, tmp_path: Path) -> None:
    for number, folder in enumerate(("first", "second")):
        (tmp_path / folder / "own.json").write_text(json.dumps(ROWS[number:]))
    programs = machines("--training.max_steps", "4", "--data.train", "own.json")
    assert {program.exit_code() for program in programs} == {Exit.USAGE}
    assert "the processes would not train on the same" in programs[0].stderr
