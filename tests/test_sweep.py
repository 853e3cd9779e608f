"""What a sweep decides, says and keeps, without training anything."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages.journal import JournalFileBackend, JournalStorage
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.recipe.loading import load_recipe, load_sweep, shipped_sweeps
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sweep_section import seconds_of
from loratune.runs.typed_json import read_typed
from loratune.sweep import start
from loratune.sweep.comparison import QUANTILES, Findings, differ, noise_of, standings
from loratune.sweep.definition import Sweep, open_sweep
from loratune.sweep.drawing import draw, figure_of, page_of
from loratune.sweep.plan import Failure, Outcome, Plan, Trial, Work, firsts, ranked, shares_of
from loratune.sweep.pool import places
from loratune.sweep.price import duration, measured
from loratune.sweep.report import SWEEP_REPORT, SWEEP_VERSION, SweepReport, write_sweep_report
from loratune.sweep.results import report_of
from loratune.sweep.showing import rows_of, show_sweep, tell_result, tell_start
from loratune.sweep.space import Choices, Range, grid, space_of
from loratune.sweep.study import JOURNAL, NAME, SweepStudy
from loratune.training.checkpoints.best import Validation, best_of

Cli = Callable[..., Result]
SPACE = {"training.learning_rate": Choices((1e-4, 2e-4, 4e-4)), "lora.rank": Choices((8, 32))}


def recipe(**flags: Any) -> Any:
    return load_recipe(None, {"model.base": "tiny-qwen", "data.train": ["data/identity.json"], **flags})


def sweep_of(tmp_path: Path, over: dict[str, str], **about: Any) -> Sweep:
    flags = {"model.base": "tiny-qwen", "data.train": ["data/identity.json"], "output": str(tmp_path / "sweep")}
    return open_sweep(None, flags, {"over": over, **about}, resume=False)


def outcome(loss: float, step: int = 10, **about: Any) -> Outcome:
    return Outcome(loss, step, **{"steps": 90, "seconds": float(step), "process_seconds": step + 3.0, **about})


# --- what varies ---


def test_values_are_those_of_flags() -> None:
    over = {
        "training.learning_rate": "1e-4,2e-4",
        "lora.target_modules": "attention,[q_proj,v_proj],mlp",
        "lora.use_rslora": "true,false",
        "lora.layers": "last 6,null",
        "data.remove": "short,[]",
        "lora.rank_pattern": "o_proj=16,{q_proj: 2, k_proj: 4},{}",
    }
    space = space_of(over, recipe())
    typed = {name: axis.values for name, axis in space.items() if isinstance(axis, Choices)}
    assert typed["lora.target_modules"] == ("attention", ["q_proj", "v_proj"], "mlp")
    assert typed["data.remove"] == (["short"], [])
    assert typed["lora.rank_pattern"] == ({"o_proj": 16}, {"q_proj": 2, "k_proj": 4}, {})
    for name, text in (("training.learning_rate", "2e-4"), ("lora.use_rslora", "false"), ("lora.layers", "null")):
        section, _, last = name.partition(".")
        assert getattr(getattr(recipe(**{name: text}), section), last) == typed[name][1]


def test_every_problem_is_told_at_once_and_nothing_is_written(cli: Cli, tmp_path: Path) -> None:
    over = (
        "lora.rank=0,8", "training.learning_rat=1e-4,2e-4", "model.revision=a,b", "seed=1,2", "training.epochs=x,1",
        "evaluation.questions_share=0,1", "tracking.every_steps=1,2", "model.sharding=none,fsdp",
        "training.warmup=0.2..0.1", "lora.alpha=16,16", "data.validation=0.1,0.2", "freeze.layers=last 1,last 2",
        "checkpoints.best_by=loss,exact",
    )  # fmt: skip
    base = ("--model.base", "tiny-qwen", "--data.train", "data/identity.json", "--output", tmp_path / "sweep")
    done = cli("sweep", *base, *(word for one in over for word in ("--over", one)), "--seeds", "0", "--budget", "2x")
    assert done.exit_code == Exit.USAGE
    for told in (
        "lora.rank: must be greater than or equal to 1; got 0",
        "did you mean training.learning_rate?",
        "--over model.revision: cannot be swept: a base is named by model.base alone",
        "--over checkpoints.best_by: cannot be swept: it says which trial is better",
        "--over seed: cannot be swept",
        "--over evaluation.questions_share: cannot be swept: it is of what is told and kept of a run",
        "--over tracking.every_steps: cannot be swept: it is of what is told and kept of a run",
        "--over model.sharding: cannot be swept: a trial trains in one process",
        "training.epochs: must be a valid number; got 'x'",
        "the first end of a range must be the lower one",
        "has a value twice: 16",
        "--over data.validation: cannot be swept",
        "--over layers last 1: method lora makes no use of freeze.layers; leave it out",
        "sweep.seeds: must be greater than or equal to 1; got 0",
        "sweep.budget: write hours, minutes or seconds",
    ):
        assert " ".join(done.stderr.split()).count(told) == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("over", "about", "told"),
    [
        ({"lora.rank": "4..64"}, {"sampler": "grid"}, "a grid needs values"),
        ({"lora.rank": "4,64"}, {"trials": 3}, "a grid tries every combination"),
        ({"lora.rank": "4..64"}, {"halving": True}, "tpe learns from whole runs"),
        ({"lora.rank": "4,64"}, {"budget": "2 hours"}, "write hours, minutes or seconds"),
        ({"lora.rank": "4,64"}, {"sampler": "bohb"}, "expected 'grid', 'random' or 'tpe'"),
        ({"lora.rank": ",".join(map(str, range(1, 1002)))}, {}, "1,000 are the most"),
        ({}, {}, "nothing to vary"),
        (
            {"model.quantization": "none,nf4", "lora.target_modules": "mlp,experts"},
            {},
            "quantization nf4, target_modules experts",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tmp_path: Path, over: dict[str, str], about: Any, told: str) -> None:
    with pytest.raises(LoratuneError, match=re.escape(told)) as refused:
        sweep_of(tmp_path, over, **about)
    assert refused.value.exit_code == Exit.USAGE


def test_a_sweep_without_validation_is_refused(tmp_path: Path) -> None:
    flags = {"model.base": "x", "data.train": ["y"], "data.validation": ["0"], "output": str(tmp_path / "sweep")}
    with pytest.raises(LoratuneError, match=r"set data\.validation"):
        open_sweep(None, flags, {"over": {"lora.rank": "4,8"}}, resume=False)


def test_a_recipe_holds_a_sweep_that_flags_override_and_sft_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {base: tiny-qwen}\ndata: {train: [x.json]}\nsweep:\n  over: {lora.rank: [4, 8]}\n  seeds: 2\n"
    )
    _, section = load_sweep(str(path), {}, {"over": {"lora.alpha": "1,2"}, "seeds": 5})
    assert section == {"over": {"lora.rank": [4, 8], "lora.alpha": "1,2"}, "seeds": 5}
    with pytest.raises(LoratuneError, match="line 3: sweep: a recipe trains once; loratune sweep reads the section"):
        load_recipe(str(path), {})


def test_a_sweep_finds_the_rows_beside_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "rows.json").write_text("[]")
    path = folder / "r.yaml"
    path.write_text("model: {base: x}\ndata: {train: rows.json, validation: rows.json}\n")
    monkeypatch.chdir(tmp_path)
    data = load_sweep(str(path), {}, {})[0].data
    assert data.train == data.validation == [str(folder / "rows.json")]


@pytest.mark.parametrize("section", ["[lora.rank]", "{over: [lora.rank]}", "{over: lora.rank}"])
def test_a_section_of_another_form_is_refused(tmp_path: Path, section: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{base: tiny-qwen}}\ndata: {{train: [x.json]}}\nsweep: {section}\n")
    with pytest.raises(LoratuneError, match=r"sweep\.over a line for each setting"):
        load_sweep(str(path), {}, {})


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_a_trial_has_the_settings_that_its_method_makes_use_of(tmp_path: Path, sampler: str) -> None:
    path, folder = tmp_path / "r.yaml", tmp_path / "sweep"
    path.write_text("model: {base: tiny-qwen}\ndata: {train: [x.json]}\nlora: {alpha: 8}\n")
    over = {"method": "lora,full,freeze", "lora.rank": "4,8", "freeze.layers": "last 1,last 2"}
    over |= {"training.learning_rate": "1e-4,1e-3"}
    about = {"over": over, "sampler": sampler} | ({} if sampler == "grid" else {"trials": 20})
    sweep = open_sweep(str(path), {"output": str(folder)}, about, resume=False)
    study = SweepStudy(folder, sweep.space)
    for number in range(20):
        if sampler == "tpe":
            study.add(study.next_settings(seed=1), 9)
            study.record(study.trials()[number], 0, outcome(float(number)), is_last=True)
        elif number < len(sweep.chosen):
            study.add(sweep.chosen[number], 9)
    tried = [dict(trial.settings) for trial in SweepStudy(folder, sweep.space).trials()]
    found = {tuple(values for name, values in one.items() if name != "training.learning_rate") for one in tried}
    assert found == {("lora", 4), ("lora", 8), ("full",), ("freeze", "last 1"), ("freeze", "last 2")}
    assert len(tried) == (10 if sampler == "grid" else 20), "nothing twice in a grid"
    for chosen in tried:
        trained = sweep.recipe_of(chosen, "x")
        assert (trained.method, trained.lora.alpha) == (
            chosen["method"],
            8 if trained.method == "lora" else LoraSettings().alpha,
        )
        assert trained.freeze.layers == chosen.get("freeze.layers")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_method_has_its_own_default_of_the_rate(tmp_path: Path, method: str) -> None:
    flags = {"model.base": "tiny-qwen", "data.train": ["x"], "method": method, "output": str(tmp_path / "sweep")}
    sweep = open_sweep(None, flags, {"over": {"method": "lora,full"}}, resume=False)
    for chosen in sweep.chosen:
        alone = load_recipe(None, flags | {"method": chosen["method"]})
        assert sweep.recipe_of(chosen, "x").training.learning_rate == alone.training.learning_rate


def test_ranges_are_logarithmic_where_their_ends_are_far_apart() -> None:
    space = space_of({"training.learning_rate": "1e-5..1e-3", "lora.rank": "4..16", "lora.dropout": "0..0.1"}, recipe())
    assert space == {
        "training.learning_rate": Range(1e-5, 1e-3, is_whole=False),
        "lora.rank": Range(4, 16, is_whole=True),
        "lora.dropout": Range(0, 0.1, is_whole=False),
    }
    assert [axis.is_log for axis in space.values() if isinstance(axis, Range)] == [True, False, False]


# --- the plan ---


def halved(losses: Sequence[float], shares: int) -> list[int]:
    """How far each trial gets, by sorting: an independent count."""
    far, there = [0] * len(losses), list(range(len(losses)))
    for rung in range(1, shares):
        there = sorted(there, key=lambda one: losses[one])[: math.ceil(len(there) / 3)]
        for one in there:
            far[one] = rung
    return far


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), workers=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_who_goes_on_depends_on_losses_alone(count: int, workers: int, order: random.Random) -> None:
    """Processes end in any order, and any number of them; the same trials get as far as by sorting all losses."""
    plan = Plan(count, shares_of(count, is_halved=True), seeds=2, seed=42)
    losses = [((number * 7919) % 101) / 101 for number in range(count)]
    trials = [Trial(number, str(number), {}, 90) for number in range(count)]
    running: list[Work] = []
    trained = list[tuple[int, int]]()
    while not plan.is_done(trials) or running:
        for trial, seed in plan.repetitions(trials):
            trials.append(Trial(len(trials), f"{trial.name}s", {}, 90, repeats=trial.number, seed=seed))
        taken = {work.trial.number for work in running}
        running += [work for work in plan.work(trials) if work.trial.number not in taken][: workers - len(running)]
        work = running.pop(order.randrange(len(running)))
        number = work.trial.number
        trained.append((number, work.rung))
        loss = losses[number % count] if number < count else 0.0
        trials[number] = replace(trials[number], outcomes={**trials[number].outcomes, work.rung: outcome(loss)})
    assert len(trained) == len(set(trained)), "no trial is trained to a rung twice"
    assert [max(trial.outcomes) for trial in firsts(trials)] == halved(losses, len(plan.shares))
    best = sorted(range(count), key=lambda number: (-max(trials[number].outcomes), losses[number]))[:2]
    assert sorted(trial.repeats for trial in trials[count:] if trial.repeats is not None) == sorted(best[:count])
    assert [len(level) for level in plan.levels(trials)] == plan.sizes()
    assert plan.left(trials) == (0, 0)


def test_all_train_to_the_first_rung_and_three_or_fewer_to_the_end() -> None:
    assert shares_of(3, is_halved=True) == shares_of(20, is_halved=False) == (1,)
    assert shares_of(9, is_halved=True) == (Fraction(1, 3), 1)
    assert shares_of(12, is_halved=True) == (Fraction(1, 9), Fraction(1, 3), 1)
    for count in range(4, 200):
        assert Plan(count, shares_of(count, is_halved=True), 1, 0).sizes()[-1] in (2, 3)


def test_a_failed_trial_ends_its_branch_only() -> None:
    plan = Plan(4, shares_of(4, is_halved=True), seeds=1, seed=0)
    trials = [Trial(number, str(number), {}, 9, outcomes={0: outcome(1.0 + number)}) for number in range(4)]
    trials[0] = Trial(0, "0", {}, 9, failure=Failure(5, "diverged"))
    assert [(work.trial.number, work.rung) for work in plan.work(trials)] == [(1, 1), (2, 1)]


# --- the study ---


def test_optuna_reads_what_the_sweep_records(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, SPACE)
    for chosen in grid(SPACE):
        study.add(chosen, 90)
    trials = study.trials()
    study.record(trials[1], 0, outcome(2.5, 10), is_last=False)
    study.record(trials[1], 1, outcome(2.25, 90), is_last=True)
    study.fail(trials[2], Failure(5, "diverged at step 3"))
    study.record(trials[0], 0, outcome(3.0, 10), is_last=False)
    study.fail(trials[3], Failure(6, "out of memory"))
    study.close()
    known = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL))))
    assert [trial.params for trial in known.trials] == [dict(chosen) for chosen in grid(SPACE)]
    assert [trial.state.name for trial in known.trials[:4]] == ["PRUNED", "COMPLETE", "FAIL", "RUNNING"]
    assert known.best_trial.number == 1
    assert known.best_value == 2.25
    assert known.trials[1].intermediate_values == {10: 2.5, 90: 2.25}
    again = SweepStudy(tmp_path, SPACE)
    assert again.trials()[1].outcomes == {0: outcome(2.5, 10), 1: outcome(2.25, 90)}
    assert again.trials()[2].failure == Failure(5, "diverged at step 3")
    assert [trial.number for trial in again.forget_failures()] == [3], "a divergence would come again"


def test_a_journal_whose_last_line_was_not_finished_is_read_to_the_line_before(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path, SPACE)
    study.add(grid(SPACE)[0], 90)
    whole = (tmp_path / JOURNAL).read_bytes()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"9b')
    study = SweepStudy(tmp_path, SPACE)
    study.add(grid(SPACE)[1], 90)
    assert (tmp_path / JOURNAL).read_bytes().startswith(whole)
    assert len(SweepStudy(tmp_path, SPACE).trials()) == 2


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    SweepStudy(tmp_path, SPACE).add(grid(SPACE)[0], 90)
    path = tmp_path / JOURNAL
    path.write_bytes(b"damage" + path.read_bytes())
    with pytest.raises(LoratuneError, match=r"study\.log: damaged") as refused:
        SweepStudy(tmp_path, SPACE)
    assert refused.value.exit_code == Exit.MODEL


def test_a_trial_is_claimed_once(tmp_path: Path) -> None:
    one, other = SweepStudy(tmp_path, SPACE), SweepStudy(tmp_path, SPACE)
    one.add(grid(SPACE)[0], 90)
    (trial,) = other.trials()
    claim = one.claim(trial)
    assert claim
    assert other.claim(trial) is None
    claim.release()
    assert other.claim(trial)


def test_tpe_asks_the_same_of_the_same_history_and_learns_from_it(tmp_path: Path) -> None:
    space = {"training.learning_rate": Range(1e-5, 1e-1, is_whole=False)}

    def rates(folder: Path) -> list[float]:
        for number in range(30):
            study = SweepStudy(folder, space)
            study.add(study.next_settings(seed=1), 90)
            rate = study.trials()[number].settings["training.learning_rate"]
            study.record(study.trials()[number], 0, outcome(abs(math.log10(rate) + 3)), is_last=True)
        return [trial.settings["training.learning_rate"] for trial in SweepStudy(folder, space).trials()]

    tried = rates(tmp_path / "a")
    assert rates(tmp_path / "b") == tried
    assert all(1e-5 <= rate <= 1e-1 for rate in tried)
    distances = [abs(math.log10(rate) + 3) for rate in tried]
    assert statistics.fmean(distances[-10:]) < statistics.fmean(distances[:10]) / 2


# --- the comparison ---


def repeated(first: Sequence[float], second: Sequence[float], *others: float) -> list[Trial]:
    """Trials of two settings with several seeds, and others with one."""
    settings = grid(SPACE)
    losses = [first[0], second[0], *others]
    trials = [
        Trial(number, f"{number:02d}-x", settings[number], 90, outcomes={0: outcome(loss, 90)})
        for number, loss in enumerate(losses)
    ]
    for number, more in enumerate((first, second)):
        for seed, loss in enumerate(more[1:], start=43):
            about = {"repeats": number, "seed": seed, "outcomes": {0: outcome(loss, 90)}}
            trials.append(Trial(len(trials), f"{number:02d}-x-seed-{seed}", settings[number], 90, **about))
    return trials


def test_the_quantiles_are_student_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(QUANTILES, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)


def test_noise_is_the_pooled_deviation_and_decides_as_student_s_test_does() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    verdicts = []
    for _ in range(200):
        gap = draw.choice([0.0, 0.02, 0.05])
        one, other = ([draw.gauss(mean, 0.01) for _ in range(3)] for mean in (2.0, 2.0 + gap))
        trials = repeated(one, other)
        noise, (first, second) = noise_of(trials, 0), standings(trials, 0)
        assert noise
        pooled = math.sqrt((statistics.variance(one) + statistics.variance(other)) / 2)
        assert noise.deviation == pytest.approx(pooled)
        is_more = stats.ttest_ind(one, other).pvalue < 0.05
        assert differ(first, second, noise) == is_more
        verdicts.append(is_more)
    assert 20 < sum(verdicts) < 180


def test_the_sentence_says_whether_the_best_differ_more_than_seeds() -> None:
    apart = repeated([2.0, 2.001, 1.999], [2.1, 2.101, 2.099], 2.0005)
    told = Findings(apart, 0, SPACE).sentence()
    assert told.startswith("learning_rate 0.0001, rank 8 is best (2.0000 ± 0.0010 over 3 seeds); ")
    assert "rank 32 is 5.0% worse, more than seeds differ" in told
    assert "learning_rate 0.0002 is within seed noise" in told
    near = Findings(repeated([2.0, 2.1, 1.9], [2.02, 2.1, 1.98]), 0, SPACE).sentence()
    assert "rank 32 is within seed noise" in near
    single = [trial for trial in apart if trial.repeats is None]
    assert "how much seeds differ is not known" in Findings(single, 0, SPACE).sentence()
    assert Findings([], 0, SPACE).sentence() == "no trial has been trained to its end"


@settings(deadline=None, max_examples=60)
@given(
    figures=st.lists(
        st.tuples(st.floats(0.1, 3).map(lambda one: round(one, 1)), st.sampled_from([None, 0.0, 0.4, 0.5, 0.9, 1.0])),
        min_size=1,
        max_size=8,
    ),
    best_by=st.sampled_from(["auto", "loss", "exact"]),
)
def test_the_best_trial_is_the_one_that_sft_would_keep_of_such_validations(figures: list[Any], best_by: Any) -> None:
    trials = [
        Trial(number, str(number), {}, 90, outcomes={0: outcome(loss, exact=exact)})
        for number, (loss, exact) in enumerate(figures)
    ]
    kept = best_of([Validation(number + 1, *figure) for number, figure in enumerate(figures)], best_by)
    assert kept
    assert ranked(trials, 0, best_by)[0].number == kept.step - 1
    assert standings(trials, 0, best_by)[0].name == str(kept.step - 1)


def answered(*figures: tuple[float, float]) -> list[Trial]:
    """Trials with a loss and a share of exact answers; the first two settings with two seeds."""
    trials = repeated([0.0, 0.0], [0.0, 0.0], *[0.0] * (len(figures) - 4))
    order = [0, 1, *range(4, len(figures)), 2, 3]
    return [
        replace(trial, outcomes={0: outcome(figures[place][0], 90, exact=figures[place][1])})
        for trial, place in zip(trials, order, strict=True)
    ]


def test_exact_answers_decide_where_rows_ask_for_them_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, _ = finished_sweep(tmp_path)
    trials = answered((0.30, 0.90), (0.20, 0.70), (0.32, 0.92), (0.22, 0.72), (0.10, 0.80))
    report = report_of(sweep, trials)
    assert report.ranked_by == "exact"
    assert report.best
    assert (report.best.name, report.best.exact) == ("00-x", pytest.approx(0.91))
    assert report.noise
    assert (report.noise.of, report.noise.deviation) == ("exact", pytest.approx(0.02 / math.sqrt(2)))
    assert report.sentence
    assert report.sentence.startswith(
        "learning_rate 0.0001, rank 8 is best (91.0% ± 1.4% of the answers exact, loss 0.3100 ± 0.0141 over 2 seeds); "
        "rank 32 is 20.0 points of exact answers worse, more than seeds differ"
    )
    head, *rows = rows_of(report)
    assert [row[head.index("exact")] for row in rows] == ["91.0%", "71.0%", "80.0%"]
    panel = figure_of(report).axes[0]
    assert panel.get_ylabel() == "exact validation answers"
    drawn = sorted(float(y) for curve in panel.containers for y in curve.lines[0].get_ydata())
    assert drawn == pytest.approx([0.71, 0.80, 0.91]), "the means over the seeds"
    assert 'alt="exact validation answers over the settings"' in page_of(report, b"")
    by_loss = replace(sweep, plan=replace(sweep.plan, best_by="loss"))
    report = report_of(by_loss, trials)
    panel = figure_of(report).axes[0]
    assert panel.get_ylabel() == "validation loss (nats per token)"
    drawn = sorted(float(y) for curve in panel.containers for y in curve.lines[0].get_ydata())
    assert drawn == pytest.approx([0.10, 0.21, 0.31])
    assert report.best
    assert (report.ranked_by, report.best.name) == ("loss", "01-x")
    assert "exact" not in rows_of(report)[0]
    for share in (0.9, 0.1):
        tell_result(sweep, replace(trials[0], outcomes={0: outcome(0.3, exact=share)}), trials, workers=1)
    assert ["90%" in line for line in capsys.readouterr().err.splitlines()] == [True, False]


def test_what_was_forgotten_most_is_in_the_table_which_fits_into_eighty_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, _ = finished_sweep(tmp_path)
    trials = answered((0.30, 0.90), (0.20, 0.70), (0.32, 0.92), (0.22, 0.72), (0.10, 0.80))
    rises = [{"en": 0.1, "zh": 0.3}, {"en": -0.2, "zh": -0.3}, None, {"en": 0.5, "zh": 0.2}, None]
    for number, rise in enumerate(rises):
        about = replace(trials[number].outcomes[0], forgetting=rise, peak_memory_bytes=7 * 10**8)
        trials[number] = replace(trials[number], outcomes={0: about})
    report = report_of(sweep, trials)
    head, *rows = rows_of(report)
    assert {row[0]: row[head.index("forgot")] for row in rows} == {"00": "+0.400", "01": "-0.200", "02": ""}
    show_sweep(report)
    told = capsys.readouterr().err
    tables, _, _ = told.partition("learning_rate 0.0001, rank 8 is best")
    assert all(len(line) <= 80 for line in tables.splitlines())
    assert tables.count("no.") == 2, "one table would be wider"
    assert "…" not in told
    assert {"forgot", "memory", "+0.400", "700 MB"} <= set(re.split(r"\s{2,}|\n", told))


def test_a_trial_that_was_lucky_once_is_not_the_best(tmp_path: Path) -> None:
    trials = repeated([2.0, 2.4, 2.4], [2.1, 2.1, 2.1], 2.2)
    assert [one.name for one in standings(trials, 0)] == ["01-x", "00-x", "02-x"]
    told = Findings(trials, 0, SPACE).sentence()
    assert "rank 32 over 8 is worth 7.9%" in told, "means over the seeds, (6.8 / 3 - 2.1) / 2.1"
    assert "learning_rate 0.0002 with rank 8" in told, "what belongs together is not divided by commas"
    sweep, _ = finished_sweep(tmp_path)
    named = [row[0] for row in rows_of(report_of(sweep, trials))[1:]]
    assert named == ["01", "00", "02"], "the table begins with the best"


# --- processes ---


def test_nothing_is_forked_where_a_gpu_may_have_been_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(start, "GPU_FILES", (str(tmp_path / "none"),))
    assert start.context().get_start_method() == "forkserver"
    monkeypatch.setattr(start, "GPU_FILES", (str(tmp_path / "none"), str(tmp_path)))
    assert start.context().get_start_method() == "spawn"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert start.context().get_start_method() == "forkserver"


def test_each_worker_gets_a_gpu_of_its_own() -> None:
    assert [place.environment for place in places(2, ["3", "5"])] == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    assert [place.environment for place in places(1, ["3"])] == [{}], "as for sft"
    assert [place.environment for place in places(2, [])] == [{}, {}]


# --- price, report, picture ---


def test_the_price_is_what_steps_and_starts_have_taken() -> None:
    first = Trial(0, "0", {}, 90, outcomes={0: outcome(2.0, 10, seconds=20.0, process_seconds=25.0)})
    price = measured([first])
    assert price
    assert (price.seconds_per_step, price.seconds_per_start) == (2.0, 5.0)
    plan = Plan(4, (Fraction(1, 3), Fraction(1)), seeds=3, seed=0)
    trials = [first, *(Trial(number, str(number), {}, 90) for number in (1, 2, 3))]
    # Three to step 30, two of them on to 90, and four repetitions of 90.
    assert price.left(plan, trials, workers=1) == 9 * 5 + (3 * 30 + 2 * 60 + 4 * 90) * 2
    assert price.of(Work(first, 1, Fraction(1))) == 5 + 80 * 2
    assert [duration(seconds) for seconds in (9, 240, 5040, 5400)] == ["9 s", "4 min", "84 min", "1.5 h"]
    assert [seconds_of(text) for text in ("2h", "90m", "1h30m", "45s", "0.5h")] == [7200, 5400, 5400, 45, 1800]


def finished_sweep(tmp_path: Path) -> tuple[Sweep, list[Trial]]:
    over = {"training.learning_rate": "1e-4,2e-4,4e-4", "lora.rank": "8,32"}
    sweep = sweep_of(tmp_path, over, halving=False)
    known = repeated([2.0, 2.01], [2.1, 2.0], 2.3, 2.2)[:4]
    trials = [replace(trial, settings=grid(sweep.space)[trial.number]) for trial in known]
    trials.append(Trial(4, "04-x", grid(sweep.space)[4], 90, failure=Failure(5, "training diverged <b>\nmore")))
    trials.append(Trial(5, "05-x", grid(sweep.space)[5], 90))
    return sweep, trials


def test_the_report_reads_back_and_the_page_holds_all_that_it_shows(tmp_path: Path) -> None:
    sweep, trials = finished_sweep(tmp_path)
    report = report_of(sweep, trials)
    (tmp_path / "sweep").mkdir()
    write_sweep_report(tmp_path / "sweep", report)
    written = json.loads(json.dumps(report.values()))
    read = read_typed(SweepReport, tmp_path / "sweep" / SWEEP_REPORT, SWEEP_VERSION)
    assert json.loads(json.dumps(read.values())) == written
    assert [trial.state for trial in report.trials if trial.name in ("04-x", "05-x")] == ["diverged", "waiting"]
    draw(tmp_path, report)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "sweep.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [], "it needs no other file"
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", line) for line in re.findall(r"<tr.*?</tr>", page)]
    assert rows == [list(row) for row in rows_of(report)]
    assert "diverged &lt;b&gt;" in page


@pytest.mark.parametrize(
    ("over", "about"),
    [
        ({"lora.target_modules": "attention,[q_proj],mlp"}, {}),
        ({"lora.rank": "8"}, {}),
        ({"lora.use_rslora": "true,false", "lora.layers": "null,last 2"}, {}),
        ({"lora.dropout": "0..0.1"}, {"sampler": "random", "trials": 3}),
        ({"lora.rank": "4,8", "method": "lora,full,freeze", "freeze.layers": "last 1"}, {}),
    ],
)
def test_every_kind_of_setting_is_drawn(tmp_path: Path, over: dict[str, str], about: dict[str, Any]) -> None:
    sweep = sweep_of(tmp_path, over, **about)
    chosen = enumerate(sweep.chosen)
    trials = [Trial(one, f"{one:02d}-x", values, 9, outcomes={0: outcome(2.0 + one)}) for one, values in chosen]
    draw(tmp_path, report_of(sweep, trials))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ranks", "told"), [("8", "the trial again, with 2"), ("8,16", "the best two again, with 2")])
def test_what_is_trained_again_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: str, told: str
) -> None:
    sweep = sweep_of(tmp_path, {"lora.rank": ranks})
    tell_start(sweep, [], [9] * len(sweep.chosen), workers=1)
    assert f"then {told} other seeds" in capsys.readouterr().err


def test_a_line_for_each_result_fits_into_eighty_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, trials = finished_sweep(tmp_path)
    words = {"lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora.rank": 8}
    done = outcome(2.0, 123456, steps=1234567, seconds=1e6)
    long = replace(trials[0], settings=words, outcomes={0: done}, seed=43)
    for trial in (long, trials[4]):
        tell_result(sweep, trial, [long, *trials[1:]], workers=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    assert ", seed 43  step 123456/1234567" in lines[0]
    assert lines[0].index("  step") == lines[1].index("  failed")
    assert "failed (5): training diverged" in lines[1]
    short = replace(long, settings={"lora.rank": 8}, seed=None)
    tell_result(sweep, short, [short, *trials[1:]], workers=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= 80
    assert line.endswith(" left"), "what does not fit is taken from the blanks"


def test_shipped_sweeps_are_valid_and_told_and_find_their_rows_from_any_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in shipped_sweeps():
        sweep = open_sweep(path.stem, {"output": str(tmp_path / path.stem)}, {}, resume=False)
        assert all(Path(str(name)).is_file() for name in sweep.recipe.data.train)
        assert len(list(itertools.islice(sweep.chosen, 3))) == 3
        assert path.stem in cli("sweep", "--help").stdout
