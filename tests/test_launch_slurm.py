"""The printed script on a real Slurm; skipped where none answers.

A cluster of one machine is enough: munged, slurmctld, and a slurmd with two CPUs, 3 GB of memory and two GPUs, which
may be any device files (gres.conf: `Name=gpu File=/dev/null`), with PreemptType=preempt/partition_prio, a default
partition of PreemptMode=REQUEUE, and a partition `high` of a higher PriorityTier.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import comes_true
from typer.testing import Result


def asked(*words: str | Path) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def answers() -> bool:
    return (
        shutil.which("sinfo") is not None
        and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
    )


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not answers(), reason="no Slurm answers")]


class SlurmJob:
    """A submitted job."""

    def __init__(self, script: Path, *flags: str) -> None:
        self.number = asked("sbatch", "--parsable", *flags, script).strip()

    def state(self) -> dict[str, str]:
        words = asked("scontrol", "show", "job", self.number).split()
        return dict(word.partition("=")[::2] for word in words)

    def is_requeued(self, times: int) -> bool:
        state = self.state()
        return (state["JobState"], state["Restarts"]) == ("PENDING", str(times))

    def go_on(self) -> None:
        """Without the two minutes that Slurm gives a requeued job."""
        asked("scontrol", "update", f"jobid={self.number}", "StartTime=now")


@pytest.fixture
def submitted(tmp_path: Path) -> Iterator[Callable[..., SlurmJob]]:
    jobs: list[SlurmJob] = []

    def submit(script: Path, *flags: str) -> SlurmJob:
        jobs.append(SlurmJob(script, f"--chdir={tmp_path}", *flags))
        return jobs[-1]

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job.number], check=False)


def test_a_job_that_is_stopped_and_preempted_trains_every_step_once(
    cli: Callable[..., Result], submitted: Callable[..., SlurmJob], tmp_path: Path
) -> None:
    run, script = tmp_path / "run", tmp_path / "job.sh"
    flags = ("--output", run, "--training.epochs", "30", "--checkpoints.every_steps", "1000", "--name", "job")
    shape = ("--gpus", "2", "--cpus", "2", "--memory", "2", "--time", "00:30:00")
    assert cli("launch", "slurm", "--config", "quickstart", *flags, *shape, "--file", script).exit_code == 0
    job = submitted(script)

    def lines() -> list[dict[str, float]]:
        file = run / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def saved() -> list[str]:
        return sorted(path.name for path in (run / "checkpoints").glob("step-*"))

    assert comes_true(lambda: len(lines()) > 20)
    asked("scancel", "--signal=TERM", job.number)  # as --signal does before the time is up: to the steps
    assert comes_true(lambda: job.is_requeued(1))
    first = json.loads((run / "status.json").read_text())
    assert (first["state"], saved()[-1]) == ("interrupted", f"step-{first['step']:06d}")

    job.go_on()
    assert comes_true(lambda: lines()[-1]["step"] > first["step"] + 20)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\ntrue\n")
    # Slurm preempts the job, with SIGTERM twice and no grace time.
    submitted(urgent, "--partition=high", "--exclusive", f"--nodelist={job.state()['NodeList']}")
    assert comes_true(lambda: job.is_requeued(2))
    second = json.loads((run / "status.json").read_text())
    assert (second["state"], saved()[-1]) == ("interrupted", f"step-{second['step']:06d}")

    job.go_on()
    assert comes_true(lambda: job.state()["JobState"] == "COMPLETED", 300)
    steps = [line["step"] for line in lines() if "loss" in line]
    assert steps == list(range(1, json.loads((run / "status.json").read_text())["steps"] + 1))
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
