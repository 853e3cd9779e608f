"""Experiment trackers: they get every record, and nothing they do stops a run or holds up its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROWS
from processes import comes_true
from typer.testing import Result

from loratune.recipe.loading import dump_recipe
from loratune.recipe.sections import Recipe, TrackingSettings
from loratune.training.checkpoints.signals import StopSignals
from loratune.training.reporting import trackers
from loratune.training.reporting.trackers import Trackers

RECORDS = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 5)]
# Notes what it is told, and its process, in the folder that it lies in.
RECORDER = """\
import json, os, pathlib
SEEN = pathlib.Path(__file__).parent / "seen"
def note(*what):
    with SEEN.open("a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    def log(self, values, step):
        note("log", values, step)
    def finish(self):
        note("finish")
def init(**settings):
    note("init", settings, os.getpid())
    return Run()
"""
FAULTS = {
    "cannot be imported": 'raise ImportError("broken package")',
    "refuses to start": 'def init(**_): raise RuntimeError("no key")',
    "fails at the second step": "def log(self, values, step):\n    1 / (step - 2)\nRun.log = log",
    "fails at its end": 'def finish(self): raise OSError("no space left")\nRun.finish = finish',
    "exits": "def log(self, values, step): os._exit(3)\nRun.log = log",
    "crashes": "def log(self, values, step): os.kill(os.getpid(), 11)\nRun.log = log",
    "never starts": "import time\ndef init(**_):\n    note('init', {}, os.getpid())\n    time.sleep(9999)",
    "hangs in a step": "import time\ndef log(self, values, step): time.sleep(9999)\nRun.log = log",
    "hangs at its end": "import time\ndef finish(self): time.sleep(9999)\nRun.finish = finish",
    "hangs after its end": "import atexit, time\natexit.register(time.sleep, 9999)",
    "leaves a thread behind": "import threading, time\nthreading.Thread(target=time.sleep, args=(9999,)).start()",
    "hangs and hears no signal": "import signal, time\nfor n in (2, 15, 1, 14): signal.signal(n, signal.SIG_IGN)\n"
    "def finish(self): time.sleep(9999)\nRun.finish = finish",
    "asks for a key": "def init(**_): input()",
}  # fmt: skip
HANGS = [name for name in FAULTS if "hang" in name or "never" in name or "thread" in name]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[Any]]]:
    """Install a package called wandb; gives what it has been told so far."""

    def install(fault: str = "") -> Callable[[], list[Any]]:
        place = tmp_path / "packages" / "wandb"
        place.mkdir(parents=True)
        (place / "__init__.py").write_text(RECORDER + fault)
        monkeypatch.syspath_prepend(place.parent)
        seen = place / "seen"
        return lambda: [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []

    return install


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder before its first step."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = Recipe.model_validate({"model": {"base": "tiny-qwen"}, "data": {"train": ["a.json", "b.json"]}})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def begun(run: Path, *names: str, stops: StopSignals | None = None) -> tuple[Trackers, list[str]]:
    """Trackers with their processes, and what is to be warned of."""
    settings = TrackingSettings.model_validate({"report_to": list(names) or ["wandb"]})
    made = Trackers(settings, run, stops or StopSignals())
    made.on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None)
    return made, made.warnings


def log(run: Path, records: list[dict[str, Any]]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_tracker_is_told_settings_and_every_record_in_order(
    wandb: Callable[..., Callable[[], list[Any]]], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = wandb()
    made, warnings = begun(run)
    log(run, RECORDS[:2])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a line in the making
    assert comes_true(lambda: len(told()) >= 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(RECORDS[2]).removeprefix('{"step": 3, "lo') + "\n")
    log(run, RECORDS[3:])
    made.close()
    (first, settings, pid), *logged, last = told()
    assert (first, settings["name"], last) == ("init", "run", ["finish"])
    assert settings["config"]["training.learning_rate"] == 3e-4
    assert settings["config"]["data.train"] == '["a.json", "b.json"]'
    assert logged == [["log", {k: v for k, v in one.items() if k != "step"}, one["step"]] for one in RECORDS]
    assert not is_alive(pid)
    assert warnings == []
    assert capfd.readouterr().err == ""
    assert list((run / "runs").iterdir()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_tracker_is_one_warning_and_nothing_is_left_of_it(
    wandb: Callable[..., Callable[[], list[Any]]],
    run: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers, "END_SECONDS", 2)
    told = wandb(FAULTS[fault])
    made, _ = begun(run)
    log(run, RECORDS)
    if fault not in HANGS and "end" not in fault:
        assert comes_true(lambda: all(process.poll() is not None for process in made._processes.values()))
    for _ in range(3):
        made.on_log(None, None, None)
    made.close()
    made.close()
    said = words(capfd.readouterr().err)
    assert said.count("warning: tracking.report_to wandb has failed") == 1, said
    assert str(run / "metrics.jsonl") in said.replace(" ", "")
    assert "Traceback" not in said
    assert not any(is_alive(what[2]) for what in told() if what[0] == "init")


def test_a_run_that_a_signal_has_ended_waits_less(
    wandb: Callable[..., Callable[[], list[Any]]], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "END_SECONDS", 9999)
    monkeypatch.setattr(trackers, "STOPPED_END_SECONDS", 1)
    told = wandb(FAULTS["hangs at its end"])
    stops = StopSignals()
    stops.signal = signal.SIGTERM
    made, _ = begun(run, stops=stops)
    assert comes_true(told)
    made.close()
    assert not is_alive(told()[0][2])


@pytest.mark.slow
def test_a_tracker_ends_in_order_when_the_training_is_killed(
    wandb: Callable[..., Callable[[], list[Any]]], run: Path, tmp_path: Path
) -> None:
    told = wandb()
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; from test_trackers import *\n"
        "run = Path(sys.argv[1]); begun(run); log(run, RECORDS)\n"
        "os.kill(os.getpid(), 9)"
    )
    places = [str(run), str(tmp_path / "packages"), str(Path(__file__).parent)]
    assert subprocess.run([sys.executable, "-c", code, *places], check=False).returncode == -signal.SIGKILL
    assert comes_true(lambda: told() and told()[-1] == ["finish"])
    assert [what[2] for what in told() if what[0] == "log"] == [1, 2, 3, 4]


def test_what_is_not_installed_is_named_with_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "wandb").mkdir(parents=True)  # where a tracker has kept files: no package
    monkeypatch.syspath_prepend(tmp_path / "here")
    made, warnings = begun(run, "none", "wandb", "wandb")
    assert warnings == ["tracking.report_to wandb needs the package wandb: pip install wandb"]
    assert made._processes == {}
    made.close()


def test_a_place_that_cannot_be_written_to_is_one_warning(
    wandb: Callable[..., Callable[[], list[Any]]], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = wandb()
    (run / "runs").write_text("a file")
    made, _ = begun(run)
    made.close()
    assert words(capfd.readouterr().err).count("tracking.report_to wandb has failed") == 1
    assert told() == []


def test_one_tracker_s_failure_is_nothing_to_another(
    wandb: Callable[..., Callable[[], list[Any]]], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb(FAULTS["exits"])
    made, _ = begun(run, "wandb", "tensorboard")
    log(run, RECORDS)
    made.close()
    assert words(capfd.readouterr().err).count("has failed") == 1
    assert scalars(run)["loss"] == [(one["step"], pytest.approx(one["loss"])) for one in RECORDS]


def scalars(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard itself reads."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted((run / "runs" / "tensorboard").iterdir()):
        for event in loading.LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def test_a_resumed_run_is_shown_whole_and_no_step_twice(
    cli: Callable[..., Result],
    wandb: Callable[..., Callable[[], list[Any]]],
    random_qwen: Path,
    rows_file: Path,
    tmp_path: Path,
) -> None:
    told = wandb()

    def sft(steps: int, *flags: str) -> Result:
        return cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file,
            "--data.validation", "0", "--training.max_steps", steps, "--tracking.report_to", "wandb",
            "--tracking.report_to", "tensorboard", "--output", tmp_path / "run", *flags,
        )  # fmt: skip

    for result in (sft(2), sft(4, "--resume")):
        assert result.exit_code == 0, result.stderr
        assert "has failed" not in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    expected = [(line["step"], line["loss"]) for line in lines]
    second = told()[[what[0] for what in told()].index("finish") + 1 :]
    assert [(what[2], what[1]["loss"]) for what in second if what[0] == "log"] == expected
    assert scalars(tmp_path / "run")["loss"] == [(step, pytest.approx(loss)) for step, loss in expected]


def test_a_run_trains_the_same_whatever_its_tracker_does(
    cli: Callable[..., Result],
    wandb: Callable[..., Callable[[], list[Any]]],
    random_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "END_SECONDS", 1)
    wandb(FAULTS["leaves a thread behind"])
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:4]))

    def adapter(name: str, *flags: str) -> bytes:
        result = cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", tmp_path / "rows.json",
            "--data.validation", "0", "--training.max_steps", "2", "--output", tmp_path / name, *flags,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert ("tracking.report_to wandb has failed" in words(result.stderr)) == bool(flags)
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    assert adapter("tracked", "--tracking.report_to", "wandb") == adapter("plain")
