"""The end of a finished run: nothing that only tells about it can fail it, whatever happens there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tree
from matplotlib.image import imread as read_picture
from safetensors.torch import load_file
from typer.testing import Result

from loratune.engine.scheduler import Decoder
from loratune.runs import output
from loratune.runs.opening import open_settled_adapter, open_whole_run
from loratune.runs.report import Answers, Health, Report, Told
from loratune.training import run as session
from loratune.training.reporting import answers, closing
from loratune.training.reporting.report import show_report

Sft = Callable[..., Result]
Series = list[tuple[int, float]]


@pytest.fixture
def sft(cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path) -> Sft:
    """Train two steps; more flags may be given."""

    def run(*flags: Any, output: Path = tmp_path / "run") -> Result:
        return cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file,
            "--data.validation", "0", "--training.max_steps", "2", "--output", output, *flags, env={"COLUMNS": "400"},
        )  # fmt: skip

    return run


def report_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report.json").read_text()))


def assert_finished(run: Path, result: Result) -> None:
    """Done, sealed and told, with nothing half-written."""
    assert result.exit_code == 0, result.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert open_settled_adapter(run).changed == ()
    assert open_whole_run(run).adapter == run / "adapter"
    assert any(name.startswith("adapter/") for name in json.loads((run / "manifest.json").read_text())["files"])
    assert {"state": "finished", "steps": 2}.items() <= report_of(run).items()
    assert not [path for path in tree(run) if "tmp" in path]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "error", "missing"),
    [
        ("reporting.closing.ask_questions", RuntimeError("a bug"), "answers"),
        ("reporting.closing.ask_questions", MemoryError(), "answers"),
        ("reporting.answers._told", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"), "answers"),
        ("run.write_card", KeyError("a bug"), "card"),
        ("reporting.closing.examine", ZeroDivisionError("a bug"), "health"),
        ("reporting.closing.replace_report", FULL, "health"),
        ("reporting.closing.plot_losses", FULL, "plot"),
        ("reporting.report._loss", IndexError("a bug"), "loss"),
        ("reporting.report.library_versions", ValueError("a bug"), "versions"),
        ("reporting.report.show_report", KeyError("a bug"), "table"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_fails_at_the_end_is_told_and_costs_nothing_else(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, missing: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"loratune.training.{place}", fail)
        result = sft()
    run = tmp_path / "run"
    assert_finished(run, result)
    assert f"failed, and the run finishes without it: {type(error).__name__}" in result.stderr
    report = report_of(run)
    assert (report["health"] is None) == (missing == "health")
    assert (report["health"] is None or report["health"]["answers"] is None) == (missing in ("health", "answers"))
    for part in ("loss", "versions"):
        assert (report[part] is None) == (missing == part)
    assert (run / "loss.png").exists() == (missing != "plot")
    assert (run / "adapter" / "README.md").exists() == (missing != "card")
    assert ("next: loratune infer" in result.stderr) == (missing != "table")
    for advice in ("is it better: loratune eval", "merge it: loratune merge", "for vLLM: loratune export"):
        assert result.stderr.count(advice) == (missing != "table")
    assert "stopped early" not in result.stderr
    if missing not in ("table", "plot") and place != "reporting.closing.replace_report":
        assert any(type(error).__name__ in warning for warning in report["warnings"])
    before = tree(run)
    again = sft("--resume")
    assert again.exit_code == 0, again.stderr
    assert "is complete: step 2 of 2" in again.stderr
    assert tree(run) == before


def at_each_step(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Let something happen before each step in which the closing questions are answered."""
    step = Decoder.step

    def stepped(self: Decoder) -> Any:
        happens()
        return step(self)

    monkeypatch.setattr(Decoder, "step", stepped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_skips_the_questions_and_nothing_else(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    steps: list[int] = []

    def happens() -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            os.kill(os.getpid(), number)

    at_each_step(monkeypatch, happens)
    result = sft()
    assert_finished(tmp_path / "run", result)
    assert len(steps) == 3
    health = report_of(tmp_path / "run")["health"]
    assert health["updates"]
    assert health["answers"] is None
    assert (tmp_path / "run" / "loss.png").is_file()


@pytest.mark.parametrize("place", ["examine", "replace_report", "plot_losses"])
def test_another_signal_ends_a_finished_run_at_once(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    plain = getattr(closing, place)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(closing, place, interrupted)
    result = sft()
    assert_finished(tmp_path / "run", result)
    assert "stopped at the end" in result.stderr
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_run_killed_anywhere_at_its_end_is_finished_or_resumed(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the folder before each step of the end is what a kill leaves there."""
    taken: list[Path] = []

    def copied_before(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def wrapped(*arguments: Any, **settings: Any) -> Any:
            taken.append(shutil.copytree(tmp_path / "run", tmp_path / f"{len(taken)} {name}"))
            return plain(*arguments, **settings)

        monkeypatch.setattr(module, name, wrapped)

    for name in ("save_adapter", "write_report", "seal_run", "set_status"):
        copied_before(session, name)
    for name in ("ask_questions", "replace_report", "plot_losses"):
        copied_before(closing, name)
    for name in ("write_report", "seal_file"):  # of the report that is complete
        copied_before(output, name)
    assert sft().exit_code == 0
    monkeypatch.undo()
    whole = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    states = {}
    for run in taken:
        states[run.name] = json.loads((run / "status.json").read_text())["state"]
        resumed = sft("--resume", output=run)
        assert_finished(run, resumed)
        for name, weight in load_file(run / "adapter" / "adapter_model.safetensors").items():
            assert torch.equal(weight, whole[name])
        assert ("is complete" in " ".join(resumed.stderr.split())) == (states[run.name] == "finished")
    assert list(states.values()) == ["running"] * 4 + ["finished"] * 5, states
    shutil.rmtree(tmp_path / "run" / "adapter")  # which other commands advise to mend with --resume
    assert_finished(tmp_path / "run", sft("--resume"))
    for name, weight in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(weight, whole[name])


@pytest.mark.parametrize("losses", [[], [(1, 2.0)], [(1, 2.0), (2, float("nan")), (3, 1e30)]], ids=len)
@pytest.mark.parametrize("others", [[], [(1, 0.5)]], ids=["losses alone", "all"])
def test_a_picture_is_drawn_of_whatever_a_run_has(tmp_path: Path, losses: Series, others: Series) -> None:
    metrics: Any = SimpleNamespace(of=lambda name: losses if name == "loss" else others)
    closing.plot_losses(metrics, tmp_path / "loss.png")
    assert read_picture(tmp_path / "loss.png").shape == (540, 960, 4)


# --- how long it may take ---


def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have each look at the clock find that a second has passed; returns the steps that are made."""
    clock, steps = itertools.count(), [0]
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))

    def counted() -> None:
        steps[0] += 1

    at_each_step(monkeypatch, counted)
    return steps


@pytest.mark.whole_end
def test_answers_are_cut_short_where_time_is_up_and_none_is_dropped(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sft(output=tmp_path / "whole").exit_code == 0
    whole = report_of(tmp_path / "whole")["health"]["answers"]
    assert whole["cut_short"] == 0
    steps = timed(monkeypatch)
    result = sft()
    assert_finished(tmp_path / "run", result)
    assert steps == [closing.LEAST_SECONDS]
    health = report_of(tmp_path / "run")["health"]
    short = health["answers"]
    assert [one["question"] for one in short["told"]] == [one["question"] for one in whole["told"]]
    assert len(short["told"]) == short["cut_short"] == 8
    for mine, other in zip(short["told"], whole["told"], strict=True):
        assert 0 < len(mine["base"]) < len(other["base"])
        assert other["base"].startswith(mine["base"][:-1])  # the last character may be half a one
        assert mine["ended"] is None
    assert health["sentences"] == []  # five equal tokens do not show that nothing has been learnt
    assert "8 cut short for time" in result.stderr
    assert "answering 8 questions with and without the adapter, for 10 s at most" in result.stderr


def test_the_closing_table_says_of_how_many_answers_an_end_was_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(count: int, ended: bool | None, cut_short: bool) -> tuple[Told, ...]:
        return (Told("q", "a", "b", "c", has_changed=True, ended=ended, cut_short=cut_short),) * count

    def shown(*answers: Told) -> str:
        report = Report(output=str(tmp_path), base="b", steps=1, epochs=1, health=Health(answers=Answers(answers)))
        show_report(report)
        return " ".join(capsys.readouterr().err.split())

    assert "4 of 4 differ from the base's, 3 of 4 end by themselves asked" in shown(
        *told(3, True, False), *told(1, False, False)
    )
    part = shown(*told(4, True, False), *told(2, True, True), *told(2, None, True))
    assert "6 of 6 with enough time and tokens end by themselves, 4 cut short for time, the base's or" in part


def test_the_closing_table_marks_answers_that_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(ended: bool | None, base_ended: bool | None) -> tuple[str, str]:
        told = Told("q", "a", "of base", "of adapter", True, ended, base_ended=base_ended)
        health = Health(answers=Answers((told,)))
        show_report(Report(output=str(tmp_path), base="b", steps=1, epochs=1, health=health))
        lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
        base, adapter = (next(line for line in lines if line.startswith(name)) for name in ("base ", "adapter "))
        return base.removeprefix("base").strip(), adapter.removeprefix("adapter").strip()

    assert shown(True, True) == ("of base", "of adapter")
    assert shown(False, False) == shown(None, False) == ("of base …", "of adapter …")
    assert shown(True, None)[0] == "of base"  # an earlier version did not say


@pytest.mark.whole_end
def test_long_training_allows_long_answers(sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = timed(monkeypatch)
    monkeypatch.setattr("loratune.training.callbacks.Metrics.seconds", 60.0)
    result = sft("--evaluation.questions_share", "0.5")
    assert result.exit_code == 0, result.stderr
    assert steps == [30]


def test_questions_that_take_too_long_to_read_are_left_out_but_for_one(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.training.callbacks.Metrics.tokens_per_second", 1.0)
    assert sft().exit_code == 0
    assert len(report_of(tmp_path / "run")["health"]["answers"]["told"]) == 1


def test_a_share_of_nothing_asks_nothing_and_a_run_goes_on_with_another_share(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = timed(monkeypatch)
    result = sft("--evaluation.questions_share", "0")
    assert_finished(tmp_path / "run", result)
    assert steps == [0]
    assert report_of(tmp_path / "run")["health"]["answers"] is None
    assert "questions" not in result.stderr
    longer = sft("--evaluation.questions_share", "0.1", "--training.max_steps", "3", "--resume")
    assert longer.exit_code == 0, longer.stderr
    assert report_of(tmp_path / "run")["health"]["answers"]
