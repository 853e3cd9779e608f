"""Sweeps that train: their table beside the run folders, kills, several processes on one study, and planted faults."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import ROWS
from documents import faults
from optuna.storages.journal import JournalFileBackend, JournalStorage
from processes import Program, comes_true
from test_run_folder_page import tables
from typer.testing import Result

from loratune.errors import Exit
from loratune.generation.general_texts import load_passages
from loratune.recipe.loading import load_recipe
from loratune.sweep.study import JOURNAL, NAME

Cli = Callable[..., Result]
Start = Callable[..., Program]
# Forked where everything is imported already; the server that sweeps fork from would import it again.
FORKED = """
import multiprocessing
import loratune.sweep.pool
loratune.sweep.pool.context = lambda: multiprocessing.get_context("fork")
from loratune.cli.app import main
main()
"""
ROUNDING = 5e-7
"""Of losses of 7 nats a token in float32, of which a rise is the difference."""
OVER = ("--over", "training.learning_rate=1e-3,1e-2", "--over", "lora.rank=2,4")


@pytest.fixture
def base(random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a recipe of nine steps, with a cache of its own for its rows."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    flags = {
        "--model.base": random_qwen,
        "--model.dtype": "float32",
        "--data.train": tmp_path / "rows.json",
        "--data.validation": "0.2",
        "--training.max_steps": "9",
        "--training.batch_size": "4",
        "--checkpoints.every_steps": "1",
    }
    return [str(word) for pair in flags.items() for word in pair]


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def table(sweep: Path) -> list[Any]:
    """All that a sweep has found, without what depends on time."""
    report = read(sweep / "sweep.json")
    kept = ("name", "settings", "state", "seed", "loss", "losses", "exact", "forgetting", "step", "message")
    kept += ("trained_parameters",)
    return [report["sentence"], report["noise"], [[trial[name] for name in kept] for trial in report["trials"]]]


def losses_at(run: Path, step: int) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if line["step"] == step and "validation_loss" in line]


def assert_told_by_hand(folder: Path) -> None:
    """All train to a third of the steps, and the better half of four to the end."""
    report = read(folder / "sweep.json")
    runs = {run.name: run for run in (folder / "trials").iterdir()}
    assert len(runs) == len(report["trials"]) == 4
    at_rung = {name: losses_at(run, 3) for name, run in runs.items()}
    assert all(len(losses) == 1 for losses in at_rung.values())
    best = sorted(runs, key=lambda name: at_rung[name][0])[:2]
    ends = {name: read(runs[name] / "report.json")["validation_loss"]["after"] for name in best}
    told = {trial["name"]: trial for trial in report["trials"]}
    for name, run in runs.items():
        expected = {"3": at_rung[name][0]} | ({"9": ends[name]} if name in best else {})
        assert (told[name]["state"], told[name]["losses"]) == ("finished" if name in best else "stopped", expected)
        assert read(run / "status.json")["state"] == ("finished" if name in best else "interrupted")
        assert (run / "checkpoints" / "step-000003").is_dir() or name in best
    assert report["best"]["name"] == min(ends, key=lambda name: ends[name])
    assert report["best"]["loss"] == min(ends.values())


def rises(run: Path, base: Path) -> dict[str, list[tuple[float, int, int]]]:
    """Language → for each passage the rise of its loss in nats, its tokens and its bytes, by plain PEFT."""
    import torch
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    found: dict[str, list[tuple[float, int, int]]] = {}
    for passage in load_passages():
        ids = torch.tensor([tokenizer(passage.text).input_ids])

        def loss(ids: Any = ids) -> float:
            with torch.no_grad():
                return float(functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum"))

        if ids.shape[1] > model.config.max_position_embeddings:
            continue
        tuned = loss()
        with model.disable_adapter():
            rise = tuned - loss()
        found.setdefault(passage.language, []).append((rise, ids.shape[1] - 1, len(passage.text.encode())))
    return found


def test_a_sweep_is_what_its_run_folders_say(start: Start, cli: Cli, base: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    done = start("sweep", *base, *OVER, "--seeds", "1", "--output", folder, "--json", code=FORKED)
    assert done.exit_code() == 0, done.stderr
    report = read(folder / "sweep.json")
    document = json.loads(done.stdout)
    assert faults(document) == []
    assert document == {"schema": "loratune/sweep/1"} | report
    assert_told_by_hand(folder)
    measured = {trial["name"]: trial["forgetting"] for trial in report["trials"]}
    assert {name for name, rise in measured.items() if rise} == {
        trial["name"] for trial in report["trials"] if trial["state"] == "finished"
    }
    best = report["best"]["name"]
    for language, passages in rises(folder / "trials" / best, Path(base[1])).items():
        assert measured[best][language] == pytest.approx(
            statistics.fmean(rise / tokens for rise, tokens, _ in passages), rel=1e-3, abs=ROUNDING
        )

    study = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))))
    assert study.best_value == report["best"]["loss"]
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]

    recipe = load_recipe(str(folder / "best.yaml"), {})
    assert (recipe.training.learning_rate, recipe.lora.rank) == (*report["best"]["settings"].values(),)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    told = tables()["A sweep"]
    assert {file for file in there if not any(fnmatchcase(file, name) for name in told)} == set()
    assert {name for name in told if not any(fnmatchcase(file, name) for file in there)} == set()
    (entry,) = (tmp_path / "cache").rglob("*.arrow")
    first = min(path.stat().st_mtime_ns for path in (folder / "trials").glob("*/recipe.yaml"))
    assert entry.stat().st_mtime_ns < first, "rows are encoded once, before the first trial"
    assert all(len(line) <= 80 for line in done.stderr.splitlines() if " left" in line)

    again = cli("sweep", *base, *OVER, "--output", folder)
    assert again.exit_code == Exit.USAGE
    assert "already holds a sweep; continue or join it with --resume" in again.stderr
    changes = (*OVER[:-1], "lora.rank=2,8", "--seeds", "2", "--lora.alpha", "4")
    other = cli("sweep", *base, *changes, "--output", folder, "--resume")
    assert other.exit_code == Exit.USAGE
    assert "lora.alpha: 32 → 4" in other.stderr
    assert "seeds: 1 → 2" in other.stderr
    assert "--over lora.rank: 2+4 → 2+8" in other.stderr


def test_rows_that_are_refused_end_a_sweep_before_it_begins(start: Start, base: list[str], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, ROWS[0] | {"output": ""}]))
    done = start("sweep", *base, *OVER, "--output", tmp_path / "sweep", code=FORKED)
    assert done.exit_code() == Exit.DATA
    assert "13" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_settings_that_change_the_validation_rows_are_refused(start: Start, base: list[str], tmp_path: Path) -> None:
    over = ("--over", "data.truncation_strategy=drop,truncate_answer", "--training.max_length", "40")
    done = start("sweep", *base, *over, "--output", tmp_path / "sweep", code=FORKED)
    assert done.exit_code() == Exit.USAGE, done.stderr
    assert "so losses cannot be compared" in done.stderr


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_random_ends_with_the_same_table(
    start: Start, base: list[str], tmp_path: Path
) -> None:
    """With SIGKILL to the sweep alone, to it and its trial, and with SIGTERM, at any moment, again and again."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    command = ("sweep", *base, *OVER, "--seeds", "2", "--resume", "--output")
    assert start(*command, whole, code=FORKED).exit_code() == 0
    draw = random.Random(os.environ.get("LORATUNE_TEST_SEED", "1"))
    for _ in range(40):
        program = start(*command, folder, code=FORKED)
        end = time.monotonic() + draw.uniform(1, 12)
        while time.monotonic() < end and not program.has_ended():
            time.sleep(0.02)
        kind = draw.choice(["sweep", "both", "term"])
        if program.has_ended():
            break
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        for pid in map(int, children if kind == "both" else []):
            os.kill(pid, signal.SIGKILL)
        program.send(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        code = program.exit_code()
        assert code in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0), program.stderr
        if code > 0 and (folder / "sweep.yaml").is_file():
            assert f"go on with: loratune sweep --output {folder} --resume" in program.stderr
    else:
        program = start(*command, folder, code=FORKED)
    assert program.exit_code() == 0, program.stderr
    assert table(folder) == table(whole)
    for run in (whole / "trials").iterdir():
        mine = folder / "trials" / run.name
        weights = "checkpoints/step-000003/adapter_model.safetensors"
        path = "adapter/adapter_model.safetensors" if (run / "adapter").is_dir() else weights
        assert (mine / path).read_bytes() == (run / path).read_bytes(), run.name


def whole_and_cut_off(start: Start, base: list[str], tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a sweep, and of the same one as if it was killed before the first whole run was told."""
    whole, folder = tmp_path / "whole", tmp_path / "sweep"
    assert start("sweep", *base, *OVER, "--seeds", "1", "--output", whole, code=FORKED).exit_code() == 0
    shutil.copytree(whole, folder)
    lines = (folder / JOURNAL).read_text().splitlines(keepends=True)
    first_end = next(number for number, line in enumerate(lines) if '"rung 1"' in line)
    (folder / JOURNAL).write_text("".join(lines[: first_end - 2]))
    return whole, folder


@pytest.mark.slow
def test_a_sweep_that_is_killed_while_it_measures_what_was_forgotten_measures_it_later(
    start: Start, base: list[str], tmp_path: Path
) -> None:
    whole, folder = whole_and_cut_off(start, base, tmp_path)
    assert start("sweep", "--output", folder, "--resume", code=FORKED).exit_code() == 0
    assert table(folder) == table(whole)
    logs = [path.read_text() for path in (folder / "logs").iterdir()]
    assert sum("is complete: step 9 of 9" in log for log in logs) == 2, "nothing is trained twice"


@pytest.mark.slow
def test_bases_with_other_tokenizers_are_compared_by_bits_per_byte(
    start: Start, base: list[str], tmp_path: Path
) -> None:
    """Of two bases with the same weights, the one whose tokenizer has fewer merges writes the rows in more tokens."""
    from transformers import AutoTokenizer

    plain, other, folder = Path(base[1]), tmp_path / "other", tmp_path / "sweep"
    shutil.copytree(plain, other)
    tokenizer = read(other / "tokenizer.json")
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "held_out.json").write_text(json.dumps(ROWS[:4]))
    rows = [str(tmp_path / "held_out.json") if word == "0.2" else word for word in base]
    line = ["sweep", *rows, "--training.learning_rate", "1e-2", "--over", f"model.base={plain},{other}"]
    done = start(*line, "--seeds", "1", "--output", folder, code=FORKED)
    assert done.exit_code() == 0, done.stderr
    report = read(folder / "sweep.json")
    assert report["unit"] == "bits per byte"
    assert "bits per byte" in report["sentence"]
    size = sum(len(row["output"].encode()) for row in ROWS[:4])
    counts = set()
    for trial in report["trials"]:
        at = Path(trial["settings"]["model.base"])
        spoken = AutoTokenizer.from_pretrained(at)
        tokens = sum(len(spoken(row["output"]).input_ids) + 1 for row in ROWS[:4])  # with the end token
        nats = read(folder / "trials" / trial["name"] / "report.json")["validation_loss"]["after"]
        assert trial["loss"] == pytest.approx(nats * tokens / (size * math.log(2)))
        for language, passages in rises(folder / "trials" / trial["name"], at).items():
            by_hand = statistics.fmean(rise / (bytes_ * math.log(2)) for rise, _, bytes_ in passages)
            assert trial["forgetting"][language] == pytest.approx(by_hand, rel=1e-3, abs=ROUNDING)
        counts.add(tokens)
    assert max(counts) > 1.1 * min(counts)
    assert load_recipe(str(folder / "best.yaml"), {}).model.base == report["best"]["settings"]["model.base"]


def test_a_run_is_finished_also_if_what_it_has_forgotten_cannot_be_measured(
    short_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loratune.sweep import work

    def fail(_: Path) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(work, "train", lambda *_, **__: None)
    monkeypatch.setattr(work, "measure_forgetting", fail)
    recipe = load_recipe(str(short_run / "recipe.yaml"), {"output": str(short_run)})
    trained = work.train_share(recipe, Fraction(1))
    assert (trained.forgetting, trained.peak_memory_bytes) == (None, None), "it was complete before"
    assert "the measurement of what was forgotten failed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_two_commands_work_on_one_study_and_train_nothing_twice(
    start: Start, base: list[str], tmp_path: Path, sampler: str
) -> None:
    folder = tmp_path / "sweep"
    chosen = ("--sampler", "tpe", "--trials", "5") if sampler == "tpe" else ()
    command = ("sweep", *base, *OVER, *chosen, "--seeds", "2", "--resume", "--output", folder)
    programs = [start(*command, "--workers", number, code=FORKED) for number in (1, 2)]
    for program in programs:
        assert program.exit_code() == 0, program.stderr
    told = "\n".join(program.stderr for program in programs)
    results = re.findall(r"^(\d\d)  .* (step \d+/\d+)  ", told, flags=re.MULTILINE)
    assert len(results) == len(set(results)), "each result is told by the command that has made it"
    report = read(folder / "sweep.json")
    assert len(results) == sum(len(trial["losses"]) for trial in report["trials"])
    for log in (folder / "logs").iterdir():
        assert log.read_text().count("training 9 steps") == len(
            next(trial for trial in report["trials"] if trial["name"] == log.stem)["losses"]
        )
    if sampler == "grid":
        alone = tmp_path / "alone"
        assert start("sweep", *base, *OVER, "--seeds", "2", "--output", alone, code=FORKED).exit_code() == 0
        assert table(folder) == table(alone)


@pytest.mark.slow
def test_a_trial_that_diverges_or_cannot_be_ends_alone(start: Start, base: list[str], tmp_path: Path) -> None:
    over = ("--over", "lora.target_modules=attention,nothing_of_the_kind", "--over", "lora.alpha=16,1e38")
    folder = tmp_path / "sweep"
    done = start("sweep", *base, *over, "--seeds", "1", "--output", folder, code=FORKED)
    assert done.exit_code() == 0, done.stderr
    trials = read(folder / "sweep.json")["trials"]
    assert {(*trial["settings"].values(), trial["state"]) for trial in trials} == {
        ("attention", 16, "finished"),
        ("attention", 1e38, "diverged"),
        ("nothing_of_the_kind", 16, "failed"),
        ("nothing_of_the_kind", 1e38, "failed"),
    }
    told = " ".join(done.stderr.split())
    assert "failed (5): training diverged" in told
    assert re.search(r"warning: 02-\S+ failed: lora\.target_modules: .*nothing_of_the_kind", told)
    study = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))))
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "FAIL", "RUNNING", "RUNNING"]


@pytest.mark.slow
def test_methods_are_compared_each_with_its_own_settings(start: Start, base: list[str], tmp_path: Path) -> None:
    over = ("--over", "lora.rank=2,4", "--over", "method=lora,full,freeze", "--over", "freeze.layers=last 1")
    folder = tmp_path / "sweep"
    done = start(
        "sweep", *base, "--lora.alpha", "8", *over, "--no-halving", "--seeds", "2", "--output", folder, code=FORKED
    )
    assert done.exit_code() == 0, done.stderr
    report = read(folder / "sweep.json")
    mains = {trial["name"]: trial for trial in report["trials"] if trial["repeats"] is None}
    assert len(mains) == 4
    trained = {}
    for name, trial in mains.items():
        record = read(folder / "trials" / name / "manifest.json")["record"]
        assert record["method"] == trial["settings"]["method"]
        trained[tuple(trial["settings"].values())] = trial["trained_parameters"]
    assert trained["full",] > trained["freeze", "last 1"] > trained[4, "lora"] == 2 * trained[2, "lora"]
    assert load_recipe(str(folder / "best.yaml"), {}).method == report["best"]["settings"]["method"]


@pytest.mark.slow
def test_a_trial_that_is_killed_goes_on_once_and_then_has_failed(start: Start, base: list[str], tmp_path: Path) -> None:
    folder, whole = tmp_path / "sweep", tmp_path / "whole"
    command = ("sweep", *base, *OVER, "--no-halving", "--seeds", "1", "--output")
    assert start(*command, whole, code=FORKED).exit_code() == 0
    program = start(*command, folder, code=FORKED)
    name = sorted(run.name for run in (whole / "trials").iterdir())[0]
    for _ in range(2):
        log = folder / "trials" / name / "metrics.jsonl"
        seen = len(log.read_text().splitlines()) if log.is_file() else 0
        assert comes_true(lambda: log.is_file() and len(log.read_text().splitlines()) > seen + 1)  # noqa: B023
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert comes_true(lambda: not Path(f"/proc/{children[-1]}").exists())  # noqa: B023
    assert program.exit_code() == 0, program.stderr
    assert "it goes on from its checkpoint" in program.stderr
    told = {trial["name"]: trial for trial in read(folder / "sweep.json")["trials"]}
    assert told[name]["state"] == "failed"
    assert "SIGKILL; the system may have run out of memory" in told[name]["message"]
    again = start("sweep", "--output", folder, "--resume", code=FORKED)
    assert again.exit_code() == 0, again.stderr
    assert f"{name} had failed and is tried again" in again.stderr
    assert table(folder) == table(whole)


@pytest.mark.slow
def test_a_damaged_trial_folder_is_told_and_costs_that_trial_alone(
    start: Start, base: list[str], tmp_path: Path
) -> None:
    whole, folder = whole_and_cut_off(start, base, tmp_path)
    name = read(whole / "sweep.json")["best"]["name"]
    run = folder / "trials" / name
    (run / "status.json").write_text(json.dumps({"program": "loratune", "state": "interrupted"}))
    (run / "manifest.json").write_text("{")
    done = start("sweep", "--output", folder, "--resume", code=FORKED)
    assert done.exit_code() == 0, done.stderr
    told = {trial["name"]: trial for trial in read(folder / "sweep.json")["trials"]}
    assert told[name]["state"] == "failed"
    assert "manifest.json" in told[name]["message"]
    assert read(folder / "sweep.json")["best"]["name"] != name


@pytest.mark.slow
def test_a_budget_starts_nothing_that_would_not_end_in_it(start: Start, base: list[str], tmp_path: Path) -> None:
    folder, whole = tmp_path / "sweep", tmp_path / "whole"
    command = ("sweep", *base, *OVER, "--seeds", "1")
    done = start(*command, "--budget", "0.01s", "--output", folder, code=FORKED)
    assert done.exit_code() == 0, done.stderr
    assert read(folder / "sweep.json")["state"] == "out of budget"
    done = start("sweep", "--output", folder, "--resume", "--budget", "1h", code=FORKED)
    assert done.exit_code() == 0, done.stderr
    assert read(folder / "sweep.json")["state"] == "finished"
    assert start(*command, "--output", whole, code=FORKED).exit_code() == 0
    assert table(folder) == table(whole)


@pytest.mark.slow
def test_processes_are_forked_from_a_server_that_has_imported_everything(
    start: Start, base: list[str], tmp_path: Path
) -> None:
    """The way of every sweep outside these tests."""
    done = start("sweep", *base, *OVER, "--seeds", "1", "--output", tmp_path / "sweep")
    assert done.exit_code() == 0, done.stderr
    assert read(tmp_path / "sweep" / "sweep.json")["state"] == "finished"
    assert_told_by_hand(tmp_path / "sweep")
