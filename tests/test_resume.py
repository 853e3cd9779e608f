"""Runs that are stopped and resumed: the same bits as one that never was, or a refusal that says why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROWS
from safetensors.torch import load_file
from transformers import TrainerControl
from typer.testing import Result

from loratune.errors import Exit, Interrupted, Paused
from loratune.model.kernels.attention_choice import AttentionChoice
from loratune.recipe.loading import load_written_recipe, with_settings
from loratune.runs.checkpoint import Checkpoint
from loratune.runs.lock import run_lock
from loratune.training import run as training_run
from loratune.training import session
from loratune.training.checkpoints.resuming import AUTO, Resume, changed_passes
from loratune.training.checkpoints.signals import StopSignals
from loratune.training.trainer import AdapterTrainer

Sft = Callable[..., Result]
FEW = ["--training.epochs", "2", "--training.batch_size", "4"]
# Eleven rows, nine of them for training, so that each epoch ends with a step of one row.
VARIANTS = {
    "packed": [],
    "dropout": ["--lora.dropout", "0.3"],
    "padded": ["--no-training.packing", "--lora.dropout", "0.1"],
    "several passes": ["--training.tokens_per_pass", "60", "--lora.dropout", "0.1"],
    "noise": ["--training.neftune_alpha", "5", "--lora.dropout", "0.1"],
    "bfloat16": ["--model.dtype", "bfloat16", "--lora.dropout", "0.1"],
    "checkpointing": ["--training.gradient_checkpointing", "--lora.dropout", "0.1"],
    "8-bit optimizer": ["--training.optimizer", "adamw_8bit"],
    "start from the base": ["--lora.init", "pissa", "--lora.b_learning_rate_ratio", "4"],
    "start from the first rows": ["--lora.init", "eva", "--lora.rank", "4"],
    "all weights": ["--method", "full", "--model.dtype", "bfloat16", "--lora.dropout", "0"],
    "some weights": [
        "--method",
        "freeze",
        "--freeze.layers",
        "last 1",
        "--freeze.modules",
        "mlp,norm",
        "--lora.dropout",
        "0",
    ],
    "4-bit base": ["--model.quantization", "nf4", "--lora.dropout", "0.1"],
    "biases of a 4-bit base": ["--model.quantization", "nf4", "--model.dtype", "bfloat16", "--lora.bias", "all"],
    "biases of an 8-bit base": [
        "--model.quantization",
        "int8",
        "--model.dtype",
        "bfloat16",
        "--lora.bias",
        "lora_only",
    ],
}


@pytest.fixture
def sft(cli: Callable[..., Result], random_qwen: Path, tmp_path: Path) -> Sft:
    """Train on eleven rows into a folder of tmp_path."""
    rows = [row | {"output": f"It is {number}. " * (1 + number % 4)} for number, row in enumerate(ROWS[:1] * 11)]
    rows = [row | {"instruction": f"How much is {number}?"} for number, row in enumerate(rows)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def run(name: str, *flags: Any) -> Result:
        settings = flags if "--model.dtype" in flags else ("--model.dtype", "float32", *flags)
        return cli(
            "sft", "--model.base", random_qwen, "--data.train", tmp_path / "rows.json", "--data.validation", "0.2",
            "--data.severity", "repetitive=ignore", "--evaluation.every_steps", "2", "--checkpoints.every_steps", "2",
            "--checkpoints.keep", "9", "--training.learning_rate", "1e-2", "--lora.dropout", "0.05", *FEW,
            "--output", tmp_path / name, *settings,
        )  # fmt: skip

    return run


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have a signal come while a step is made, or a validation."""

    def at(step: int, number: int = signal.SIGTERM, method: str = "training_step", times: int = 1) -> None:
        plain = getattr(AdapterTrainer, method)
        left = times

        def signalled(self: Any, *arguments: Any, **settings: Any) -> Any:
            nonlocal left
            if self.state.global_step == step and left:
                for _ in range(times):
                    left -= 1
                    os.kill(os.getpid(), number)
            return plain(self, *arguments, **settings)

        monkeypatch.setattr(AdapterTrainer, method, signalled)

    return at


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "adapter" / "adapter_model.safetensors"))


def assert_same_run(mine: Path, other: Path) -> None:
    """The same adapter, bit for bit, and the same course."""
    expected = adapter(other)
    assert adapter(mine).keys() == expected.keys()
    for name, weight in adapter(mine).items():
        assert torch.equal(weight, expected[name]), name
    told = []
    for run in (mine, other):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        told.append([{k: v for k, v in line.items() if "second" not in k} for line in lines])
    assert told[0] == told[1]
    reports = [json.loads((run / "report.json").read_text()) for run in (mine, other)]
    for name in ("steps", "epochs", "loss", "validation_loss", "exact_answers", "best_by", "tokens"):
        assert reports[0][name] == reports[1][name]


def status(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))


@pytest.mark.parametrize(
    ("variant", "stopped_in"),
    [
        *((variant, [2]) for variant in VARIANTS),
        ("all weights", [5]),  # no step is left, but a validation, in the types of the steps
        *(pytest.param(variant, [0, 1, 3, 4, 5], marks=pytest.mark.slow) for variant in VARIANTS),
    ],
    ids=str,
)
def test_a_run_stopped_after_any_step_resumes_to_the_same_bits(
    sft: Sft,
    stop: Callable[..., None],
    tmp_path: Path,
    variant: str,
    stopped_in: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = VARIANTS[variant]
    assert sft("whole", *flags).exit_code == 0
    steps = status(tmp_path / "whole")["steps"]
    assert steps >= 4
    if "--lora.bias" in flags:
        biases = [weight for name, weight in adapter(tmp_path / "whole").items() if name.endswith("bias")]
        assert {bias.dtype for bias in biases} == {torch.float32}
        assert all((bias != bias.bfloat16()).any() for bias in biases)
    for step in (step for step in stopped_in if step < steps):
        with monkeypatch.context() as patch:
            patch.setattr(AdapterTrainer, "training_step", AdapterTrainer.training_step)
            stop(step)
            stopped = sft(f"run{step}", *flags)
            assert stopped.exit_code == 128 + signal.SIGTERM, stopped.stderr
        assert status(tmp_path / f"run{step}") | {"time": ""} == {
            "program": "loratune", "state": "interrupted", "time": "", "step": step + 1, "steps": steps,
        }  # fmt: skip
        assert not (tmp_path / f"run{step}" / "adapter").exists()
        assert f"interrupted after step {step + 1} of {steps}" in " ".join(stopped.stderr.split())
        monkeypatch.undo()
        resumed = sft(f"run{step}", *flags, "--resume")
        assert resumed.exit_code == 0, resumed.stderr
        assert_same_run(tmp_path / f"run{step}", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_exit_code_tells_the_signal(sft: Sft, stop: Callable[..., None], tmp_path: Path, number: int) -> None:
    stop(1, number)
    result = sft("run")
    assert result.exit_code == 128 + number
    assert "--resume" in result.stderr


def test_a_run_that_is_there_is_offered_to_be_resumed_while_it_can_be(
    sft: Sft, stop: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", AdapterTrainer.training_step)
        stop(1)
        assert sft("run").exit_code == 128 + signal.SIGTERM
    monkeypatch.undo()
    again = sft("run")
    assert (again.exit_code, "go on with it with --resume" in " ".join(again.stderr.split())) == (Exit.USAGE, True)
    assert sft("run", "--resume").exit_code == 0
    again = sft("run")
    assert (again.exit_code, "--resume" in again.stderr) == (Exit.USAGE, False)


def test_a_signal_that_nohup_has_switched_off_stays_so(sft: Sft, stop: Callable[..., None]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop(1, signal.SIGHUP)
    assert sft("run").exit_code == 0


def test_a_second_signal_stops_at_once(sft: Sft, stop: Callable[..., None], tmp_path: Path) -> None:
    stop(3, signal.SIGINT, times=2)
    assert sft("run").exit_code == 130
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-000002"]
    assert status(tmp_path / "run")["state"] == "interrupted"


def test_a_scheduler_s_second_sigterm_within_a_moment_still_saves_the_step(
    sft: Sft, stop: Callable[..., None], tmp_path: Path
) -> None:
    stop(2, signal.SIGTERM, times=2)
    assert sft("run").exit_code == 128 + signal.SIGTERM
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000003",
    ]


def test_a_signal_that_another_process_has_told_of_does_not_count_twice() -> None:
    stops = StopSignals()
    with stops.heeded(), stops.after_step(lambda: None):
        stops.signal = signal.SIGTERM  # as the processes exchange it at the end of a step
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_comes_while_the_processes_agree_counts_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stops, control = StopSignals(), TrainerControl()
    arguments, state = SimpleNamespace(world_size=2, device="cpu"), SimpleNamespace(global_step=1)
    signals = [signal.SIGTERM]

    def agree(numbers: torch.Tensor, _: Any) -> None:
        """The other process has none, and this one gets it too late."""
        if signals:
            signal.raise_signal(signals.pop())

    monkeypatch.setattr(torch.distributed, "all_reduce", agree)
    with stops.heeded(), stops.after_step(lambda: None):
        stops.on_step_end(arguments, state, control)
        assert not control.should_training_stop
        stops.on_step_end(arguments, state, control)
        assert (control.should_training_stop, control.should_save, stops.signal) == (True, True, signal.SIGTERM)


@pytest.mark.parametrize("step", [2, 6])
def test_a_validation_that_a_signal_ends_is_made_up_for(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sft("whole").exit_code == 0
    stop(step, method="_sums")
    assert sft("run").exit_code == 143
    assert not any("validation_loss" in line and f'"step": {step}' in line for line in metrics(tmp_path / "run"))
    monkeypatch.undo()
    assert sft("run", "--resume").exit_code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def metrics(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(0, method="_sums")
    assert sft("run").exit_code == 143
    monkeypatch.undo()
    refused = sft("run", "--resume")
    assert refused.exit_code == 4
    assert "--resume auto" in refused.stderr
    assert sft("run", "--resume", "auto").exit_code == 0


def test_resume_auto_starts_goes_on_and_ends(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sft("whole").exit_code == 0
    stop(2)
    assert sft("run", "--resume", "auto").exit_code == 143
    monkeypatch.undo()
    unfinished = [
        tmp_path / "run" / "checkpoints" / f".loratune-{'a' * 32}",
        tmp_path / "run" / f".loratune-{'b' * 32}.tmp",
    ]
    (unfinished[0] / "made").mkdir(parents=True)
    (unfinished[0] / "owner.json").write_text('{"program": "loratune", "target": "step-000005"}')
    unfinished[1].write_text("{")
    resumed = sft("run", "--resume", "auto")
    assert resumed.exit_code == 0
    assert not any(place.exists() for place in unfinished)
    assert resumed.stderr.count("removed") == 2
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = sft("run", "--resume", "auto")
    assert done.exit_code == 0
    assert "is complete" in done.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path for path in before if not path.name.startswith(".lock")} == {
        path for path in after if not path.name.startswith(".lock")
    }
    assert all(after[path] == before[path] for path in before if not path.name.startswith(".lock"))
    unfinished[1].write_text("{")  # of a process that was killed while it wrote the last report
    assert sft("run", "--resume", "auto").exit_code == 0
    assert not unfinished[1].exists()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["deleted", "cut", "one bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sft("whole").exit_code == 0
    stop(3)
    assert sft("run").exit_code == 143
    monkeypatch.undo()
    newest = tmp_path / "run" / "checkpoints" / "step-000004"
    names = sorted(path.name for path in newest.iterdir())
    assert names == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint.json", "optimizer.pt", "rng_state.pth",
        "scheduler.pt", "trainer_state.json",
    ]  # fmt: skip
    for name in names:
        whole = (newest / name).read_bytes()
        damage(newest / name, how)
        refused = sft("run", "--resume", "--strict-resume")
        assert refused.exit_code == 4
        assert name in refused.stderr
        (newest / name).write_bytes(whole)
    damage(newest / "optimizer.pt", how)
    resumed = sft("run", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    said = " ".join(resumed.stderr.split())
    assert "optimizer.pt" in said
    assert "resuming after step 2" in said
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed", "7"], "seed: 42 → 7"),
        (["--training.learning_rate", "2e-2"], "training.learning_rate: 0.01 → 0.02"),
        (["--training.batch_size", "3"], "training.batch_size: 4 → 3"),
        (["--lora.rank", "4"], "lora.rank"),
        (["--training.epochs", "1"], "training.epochs: 2.0 → 1.0"),
        (["--prompt.system", "Be brief."], "prompt.system: none → Be brief."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_changed_settings_are_refused_with_what_they_were(
    cli: Callable[..., Result],
    sft: Sft,
    stop: Callable[..., None],
    tmp_path: Path,
    flags: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop(1)
    assert sft("run").exit_code == 143
    monkeypatch.undo()
    refused = sft("run", *flags, "--resume", "--json")
    assert refused.exit_code == 2
    assert named in " ".join(refused.stderr.split())
    assert status(tmp_path / "run")["state"] == "interrupted"
    (advised,) = json.loads(refused.stdout)["commands"]
    assert advised["line"] == f"loratune sft --config {tmp_path / 'run' / 'recipe.yaml'} --resume"
    if flags[0] == "--seed":
        assert cli(*advised["line"].split()[1:]).exit_code == 0


def test_changed_data_is_refused(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(1)
    assert sft("run").exit_code == 143
    monkeypatch.undo()
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows[3]["output"] = "It is something else."
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    refused = sft("run", "--resume")
    assert refused.exit_code == 2
    assert "rows.json" in refused.stderr
    assert "recipe.yaml" not in refused.stderr  # the recipe would find the same rows


def test_an_allowed_change_of_the_learning_rate_is_honoured(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--training.scheduler", "constant", "--training.warmup", "0"]
    stop(1)
    assert sft("run", *flags).exit_code == 143
    monkeypatch.undo()
    resumed = sft("run", *flags, "--training.learning_rate", "3e-2", "--resume", "--allow-changes")
    assert resumed.exit_code == 0, resumed.stderr
    rates = [line["learning_rate"] for line in map(json.loads, metrics(tmp_path / "run")) if "loss" in line]
    assert rates[:2] == pytest.approx([1e-2] * 2)
    assert rates[2:] == pytest.approx([3e-2] * (len(rates) - 2))


def test_a_finished_run_can_be_made_longer(sft: Sft, tmp_path: Path) -> None:
    flags = ["--training.scheduler", "constant", "--training.warmup", "0", "--no-checkpoints.keep_best"]
    assert sft("whole", *flags, "--training.epochs", "3").exit_code == 0
    assert sft("run", *flags).exit_code == 0
    longer = sft("run", *flags, "--training.epochs", "3", "--resume")
    assert longer.exit_code == 0, longer.stderr
    for name, weight in adapter(tmp_path / "run").items():
        assert torch.equal(weight, adapter(tmp_path / "whole")[name])


def test_a_named_checkpoint_is_taken(sft: Sft, tmp_path: Path) -> None:
    assert sft("whole").exit_code == 0
    assert sft("run").exit_code == 0
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "status.json").write_text('{"program": "loratune", "state": "failed"}')
    resumed = sft("run", "--resume", "2")
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming after step 2" in resumed.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    unknown = sft("run", "--resume", "3")
    assert unknown.exit_code == 4
    assert "steps that have one: 2, 4, 6" in " ".join(unknown.stderr.split())


def test_a_run_that_stopped_early_is_complete(sft: Sft, tmp_path: Path) -> None:
    flags = ["--evaluation.early_stopping", "1", "--training.epochs", "40", "--training.learning_rate", "0.3"]
    flags += ["--checkpoints.every_steps", "1000"]
    first = sft("run", *flags)
    assert first.exit_code == 0, first.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["stopped_early"]
    again = sft("run", *flags, "--resume")
    assert again.exit_code == 0
    assert "is complete" in again.stderr


@pytest.mark.parametrize("flags", [[], ["--training.max_steps", "4"]], ids=["epochs", "steps"])
def test_only_the_adapter_is_written_again_if_nothing_else_is_missing(
    sft: Sft, tmp_path: Path, flags: list[str]
) -> None:
    assert sft("whole", *flags).exit_code == 0
    assert sft("run", *flags).exit_code == 0
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").iterdir()}
    (tmp_path / "run" / "adapter").rename(tmp_path / "lost")
    (tmp_path / "run" / "status.json").write_text('{"program": "loratune", "state": "running"}')
    assert sft("run", *flags, "--resume").exit_code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").iterdir()} == kept


def test_two_runs_in_one_folder_exclude_each_other(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from loratune.runs.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        refused = sft("run")
        other.kill()
    assert refused.exit_code == 2
    assert f"process {other.pid}" in " ".join(refused.stderr.split())
    assert sft("run").exit_code == 0  # the lock of a dead process holds nobody up


def test_a_checkpoint_that_there_is_not_is_told_with_the_values_of_the_flag(
    cli: Callable[..., Result], short_run: Path
) -> None:
    for value in ("yes", "3"):
        refused = cli("sft", "--config", short_run / "recipe.yaml", "--resume", value, "--output", short_run, "--json")
        assert refused.exit_code == Exit.MODEL
        (problem,) = json.loads(refused.stdout)["problems"]
        assert problem["message"].startswith(f"--resume {value}: {short_run} has no such checkpoint; steps that have")
        assert problem["remedy"] == "give one of them, auto, or --resume alone for the newest"


@pytest.mark.parametrize("flags", [["--resume", "--overwrite"], ["--strict-resume"], ["--allow-changes"]], ids=str)
def test_flags_that_contradict_each_other_are_refused(sft: Sft, flags: list[str]) -> None:
    assert sft("run", *flags).exit_code == 2


def test_too_little_room_for_the_checkpoints_is_told_before_training(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 50_000

    monkeypatch.setattr("loratune.training.checkpoints.keeper.shutil.disk_usage", lambda place: Full)
    result = sft("run")
    assert result.exit_code == 6
    assert "11 checkpoints and the adapter take" in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def shown(cli: Callable[..., Result], run: Path) -> dict[str, Any]:
    result = cli("runs", "show", run, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_runs_show_tells_how_a_run_stands(
    sft: Sft, cli: Callable[..., Result], stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert cli("runs", "show", run).exit_code == 4
    stop(2)
    assert sft("run").exit_code == 143
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "1000")  # no command is broken into lines, however long the path is
    state = shown(cli, run)
    last = [json.loads(line) for line in metrics(run)]
    assert (state["state"], state["step"], state["steps"], state["checkpoints"]) == ("interrupted", 3, 6, [2, 3])
    assert state["loss"] == [line["loss"] for line in last if "loss" in line][-1]
    assert state["next"] == f"loratune sft --config {run / 'recipe.yaml'} --resume"
    (run / "status.json").write_text('{"program": "loratune", "state": "running", "steps": 6}')
    assert (shown(cli, run)["state"], shown(cli, run)["step"]) == ("crashed", 3)
    with run_lock(run):
        assert shown(cli, run)["state"] == "running"
    assert sft("run", "--resume").exit_code == 0
    assert shown(cli, run)["state"] == "finished"
    kept = (run / "status.json").read_text()
    for damaged in ("{}", '{"state": "banana"}', '{"state": null}', '{"state": "finished", "step": "x"}'):
        (run / "status.json").write_text(damaged)
        result = cli("runs", "show", run)
        assert (result.exit_code, result.stdout) == (4, "")
        assert "status.json: damaged: st" in " ".join(result.stderr.split())
        (run / "status.json").write_text(kept)
    table = cli("runs", "show", run)
    assert "finished at step 6 of 6" in table.stdout
    assert f"loratune infer --adapter {run}" in " ".join(table.stderr.replace("\\\n", "").split())


def test_a_resumed_run_makes_the_passes_that_it_made_before(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the memory that is free then; and a line says so if they no longer fit."""
    flags = ("--no-training.gradient_checkpointing",)

    def set_free(size: float) -> None:
        monkeypatch.setattr("loratune.training.activations.free_memory_bytes", lambda hardware: int(size))

    for name, first, second, changed in (("kept", 2e6, 4e9, False), ("shrunk", 4e9, 2e6, True)):
        set_free(first)
        stop(2)
        assert sft(name, *flags).exit_code == 143
        begun = json.loads((tmp_path / name / "checkpoints/step-000003/checkpoint.json").read_text())["progress"]
        set_free(second)
        result = sft(name, *flags, "--resume")
        assert result.exit_code == 0, result.stderr
        assert ("before the interruption, so bits may differ" in " ".join(result.stderr.split())) == changed
        ends = json.loads((tmp_path / name / "checkpoints/step-000006/checkpoint.json").read_text())["progress"]
        assert (begun["tokens_per_pass"] != ends["tokens_per_pass"]) == changed


def test_a_run_that_goes_on_elsewhere_says_so(
    sft: Sft, stop: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(2)
    assert sft("run").exit_code == 143
    plain = training_run.detect_hardware
    monkeypatch.setattr(training_run, "detect_hardware", lambda: replace(plain(), name="NVIDIA T4"))
    monkeypatch.setattr(session, "choose_attention", lambda *_: AttentionChoice("varlen", "one kernel"))
    result = sft("run", "--resume")
    assert result.exit_code == 0, result.stderr
    assert re.search(
        r"other versions or hardware; bits may differ: device: CPU.* → NVIDIA T4", " ".join(result.stderr.split())
    )
    assert "attention is varlen, sdpa before the interruption" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("progress", "is_packed", "quantization", "told"),
    [
        ({"packed": True}, True, "int8", []),
        ({"packed": False}, True, "none", ["rows are packed, padded before the interruption"]),
        ({"packed": True}, False, "int8", ["rows are padded, packed before the interruption"]),
        ({}, True, "int8", ["the checkpoint is of an earlier version, which computed LoRA beside int8"]),
        ({}, True, "nf4", []),
    ],
)
def test_passes_that_are_others_than_before_are_told(
    progress: dict[str, bool], is_packed: bool, quantization: str, told: list[str]
) -> None:
    start = Checkpoint(Path(), 3, {}, progress)
    found = changed_passes(start, "sdpa", is_packed, quantization)
    assert [line.startswith(begins) for line, begins in zip(found, told, strict=True)] == [True] * len(told)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["--training.packing", "--no-training.packing"])
def test_two_processes_resume_to_the_same_bits(
    random_qwen: Path, rows_file: Path, tmp_path: Path, packing: str
) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "loratune", "sft", packing,
        "--model.base", str(random_qwen), "--model.dtype", "float32", "--data.train", str(rows_file),
        "--training.max_steps", "6", "--lora.dropout", "0.2", "--training.batch_size", "2",
        "--checkpoints.every_steps", "3", "--output",
    ]  # fmt: skip

    def run(name: str, *flags: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        arguments = [*command, str(tmp_path / name), *flags]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr

    run("whole")
    run("run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "status.json").write_text('{"program": "loratune", "state": "running"}')
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "rng_state_1.pth").is_file()
    run("run", "--resume")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_fault_harness_finds_nothing() -> None:
    faults = Path(__file__).parent.parent / "scripts" / "faults"
    done = subprocess.run([sys.executable, faults, "--kills", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "adapters differing from the uninterrupted run: 0" in done.stdout


# --- runs that stop themselves after a share of their steps ---


def train_share(whole: Path, run: Path, share: Fraction | None, **settings: Any) -> None:
    """Train the recipe of a run in another folder, as far as a share of its steps."""
    recipe = with_settings(load_written_recipe(whole / "recipe.yaml"), {"output": str(run), **settings})
    training_run.train(recipe, resume=Resume(AUTO), share=share)


def validations(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def test_a_run_in_shares_is_the_run_in_one(sft: Sft, tmp_path: Path, quick_end: Callable[[], None]) -> None:
    assert sft("whole", "--lora.dropout", "0.1").exit_code == 0
    quick_end()
    whole, run = tmp_path / "whole", tmp_path / "run"
    for share, step in ((Fraction(1, 3), 2), (Fraction(1, 3), 2), (Fraction(2, 3), 4)):
        with pytest.raises(Paused):
            train_share(whole, run, share)
        assert (status(run)["state"], status(run)["step"]) == ("interrupted", step)
        assert validations(run) == validations(whole)[: step // 2 + 1]
    train_share(whole, run, Fraction(1))
    assert_same_run(run, whole)


def test_a_share_ends_with_a_validation_where_the_recipe_has_none(sft: Sft, tmp_path: Path) -> None:
    assert sft("whole").exit_code == 0
    with pytest.raises(Paused):
        train_share(tmp_path / "whole", tmp_path / "run", Fraction(1, 2), **{"evaluation.every_steps": 50})
    assert [step for step, _ in validations(tmp_path / "run")] == [0, 3]


def test_a_signal_in_the_validation_that_ends_a_share_leaves_it_to_the_next_process(
    sft: Sft, stop: Callable[..., None], tmp_path: Path, quick_end: Callable[[], None]
) -> None:
    assert sft("whole").exit_code == 0
    quick_end()
    whole, run = tmp_path / "whole", tmp_path / "run"
    stop(2, method="_validation_passes")
    with pytest.raises(Interrupted) as stopped:
        train_share(whole, run, Fraction(1, 3))
    assert not isinstance(stopped.value, Paused)
    assert [step for step, _ in validations(run)] == [0]
    with pytest.raises(Paused):
        train_share(whole, run, Fraction(1, 3))
    assert validations(run) == validations(whole)[:2]
    train_share(whole, run, None)
    assert_same_run(run, whole)


def test_a_run_that_stops_early_where_a_share_ends_is_finished(sft: Sft, tmp_path: Path) -> None:
    assert sft("whole").exit_code == 0
    early = {"evaluation.early_stopping": 1, "training.learning_rate": 1e-20}  # no loss is lower than the first
    train_share(tmp_path / "whole", tmp_path / "run", Fraction(2, 3), **early)
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == ("finished", 4)
    assert status(tmp_path / "run")["stopped_early"]
