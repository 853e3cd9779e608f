"""The statistics of paired differences, beside scipy's and beside all resamples of few rows."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from loratune.evaluation.bounds import Bounds
from loratune.evaluation.result import Decision
from loratune.evaluation.statistics import (
    FEWEST_DIFFERING,
    RESAMPLES,
    Comparison,
    bootstrap_interval,
    compare,
    sign_test,
)
from loratune.evaluation.verdict import decide, fallen_measures, objection_to, overall, sentence_of, sentence_of_fall

BETTER = compare([2.0] * 20, [1.0] * 20, is_loss=True)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 0), (6, 0), (31, 4), (4, 31), (10, 10), (900, 1100)])
def test_the_sign_test_is_scipy_s(better: int, worse: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_the_one_over_all_resamples() -> None:
    rows = np.array([-1.0, 0.25, 0.5, 2.0, 3.0])
    means = np.array([np.mean(drawn) for drawn in product(rows, repeat=len(rows))])
    low, high = bootstrap_interval(rows)
    # The share of resamples below each end is within four standard errors of a share of 2.5 %.
    error = 4 * (0.025 * 0.975 / RESAMPLES) ** 0.5
    assert (means < low).mean() <= 0.025 + error
    assert (means <= low).mean() >= 0.025 - error
    assert (means > high).mean() <= 0.025 + error
    assert (means >= high).mean() >= 0.025 - error


def test_the_interval_is_scipy_s_within_the_noise_of_resampling_and_the_same_each_time() -> None:
    from scipy.stats import bootstrap

    rows = np.random.default_rng(3).normal(0.2, 1, 60)
    known = bootstrap((rows,), np.mean, method="percentile", n_resamples=RESAMPLES, rng=np.random.default_rng(1))
    ends = known.confidence_interval
    # A quantile at 2.5 % of 10,000 normal means has a standard error of 0.027 of their deviation; two have 0.038.
    allowed = 4 * 0.038 * rows.std() / len(rows) ** 0.5
    assert bootstrap_interval(rows) == pytest.approx((ends.low, ends.high), abs=allowed)
    assert bootstrap_interval(rows) == bootstrap_interval(rows)


def test_many_rows_are_drawn_in_parts_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(60) % 2 * 1.0
    whole = bootstrap_interval(rows)
    monkeypatch.setattr("loratune.evaluation.statistics.AT_ONCE", 1000)
    assert bootstrap_interval(rows) == whole
    monkeypatch.setattr("loratune.evaluation.statistics.MOST_DRAWN", 60 * 1500)
    low, high = bootstrap_interval(rows)
    # 1.96 standard errors of the mean. A quantile at 2.5 % of 1,500 means has a deviation of 0.07 of their own.
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / len(rows) ** 0.5, rel=4 * 0.07 / 1.96)


def test_a_verdict_needs_an_interval_apart_from_zero_enough_rows_and_more_than_the_margin() -> None:
    assert compare([0.0] * 20, [1.0] * 20).verdict == "better"
    assert compare([0.0] * 20, [1.0] * 20, is_loss=True).verdict == "worse"
    assert compare([0.0] * (FEWEST_DIFFERING - 1), [1.0] * (FEWEST_DIFFERING - 1)).verdict == "no difference"
    assert compare([0.0] * FEWEST_DIFFERING, [1.0] * FEWEST_DIFFERING).verdict == "better"
    assert compare([0.0] * 20, [0.01] * 20, margin=0.02).verdict == "no difference"
    mixed = compare([0.0] * 20, [1.0, -1.0] * 10)
    assert (mixed.better, mixed.worse, mixed.equal, mixed.verdict) == (10, 10, 0, "no difference")


def test_few_large_losses_among_many_small_gains_are_no_verdict() -> None:
    found = compare([0.0] * 40, [0.1] * 37 + [-30.0] * 3)
    assert (found.better, found.worse) == (37, 3)
    assert found.p_value < 0.05
    assert found.difference < 0
    assert found.verdict == "no difference"


def test_what_so_many_rows_cannot_show_is_what_the_sign_test_needs() -> None:
    fewest = FEWEST_DIFFERING
    assert sign_test(fewest, 0) < 0.05
    assert all(sign_test(better, worse) >= 0.05 for better in range(fewest) for worse in range(fewest - better))
    told = {rows: sentence_of(shares(rows, 0), ()).rpartition("worse on 0; ")[2] for rows in (5, 8)}
    assert told[5] == f"at least {fewest} rows are needed to show a difference"
    assert (
        told[8]
        == f"with 8 rows, only a difference on at least {fewest} of them can show; more rows can show a smaller one"
    )
    assert sentence_of(shares(8, 8), ()).endswith(f"only a difference on at least {fewest} of them can show")


@pytest.mark.parametrize(
    ("gains", "margin", "told"),
    [
        (
            [1.0] * 6 + [-1.0] * 2 + [0.0] * 2,
            0.0,
            ", which chance may explain (sign test, p = 0.29); more rows can show",
        ),
        ([0.03] * 9 + [-0.1], 0.02, "; the mean differs by no more than 0.02, which counts as none"),
        ([0.1] * 37 + [-1.0] * 3, 0.0, "; the 95 % interval of the mean difference includes 0; more rows make it"),
        ([0.1] * 37 + [-30.0, -29.0, -31.0], 0.0, "; the 95 % interval of the mean difference includes 0"),
        ([0.1] * 30 + [-30.0] * 10, 0.0, "; a few large differences outweigh the others"),
    ],
)
def test_rows_that_show_no_difference_are_told_with_the_reason(gains: list[float], margin: float, told: str) -> None:
    found = compare([0.0] * len(gains), gains, margin)
    assert found.verdict == "no difference"
    assert told in sentence_of(found, ())


def test_chance_alone_is_rarely_called_a_difference() -> None:
    random, verdicts = np.random.default_rng(0), []
    for _ in range(200):
        verdicts.append(compare(random.normal(size=24).tolist(), random.normal(size=24).tolist()).verdict)
    # 5 % of 200 and three standard deviations more.
    assert sum(verdict != "no difference" for verdict in verdicts) <= 10 + 3 * (200 * 0.05 * 0.95) ** 0.5


def shares(rows: int, worse: int, better: int = 0) -> Comparison:
    """A measure that is yes or no, of which half the rows are as they were, beside those that differ."""
    same = [float(row % 2) for row in range(rows - worse - better)]
    return compare([1.0] * worse + [0.0] * better + same, [0.0] * worse + [1.0] * better + same)


@pytest.mark.parametrize(
    ("name", "one", "chance"),
    [
        ("form", shares(8, worse=1), "which chance may explain"),
        ("exact_match", shares(20, worse=4, better=1), "which chance may explain"),
        ("exact_match", shares(20, worse=8), "more than chance explains"),
        ("form", shares(100, worse=8), "more than chance explains"),  # less than what makes the verdict worse
        ("form", shares(100, worse=1), "which chance may explain"),
        ("exact_match", shares(2000, worse=10), "more than chance explains"),
        ("rouge_l", compare([0.6] * 20, [0.5] * 20, margin=0.02), "more than chance explains"),
    ],
)
def test_a_measure_that_does_not_decide_is_told_where_it_is_worse(name: str, one: Comparison, chance: str) -> None:
    measures = {"loss": BETTER, "form": shares(8, 0)} | {name: one}
    decisions = decide("loss", measures, {}, None, Bounds())
    assert overall(decisions) == "better"
    assert fallen_measures("loss", measures, decisions) == [name]
    assert fallen_measures(name, measures, decisions) == []
    told = sentence_of_fall(name, one)
    assert f"worse on {one.worse} of {one.rows:,} rows, better on {one.better}, {chance}" in told


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("form", shares(8, worse=0)),
        ("form", shares(8, worse=0, better=2)),
        ("exact_match", shares(8, worse=2, better=2)),
        ("exact_match", shares(2000, worse=120, better=119)),  # one in two thousand
        ("rouge_l", compare([0.6] * 20, [0.599] * 20, margin=0.02)),
        ("rouge_l", compare([0.6] * 20, [0.2] * 4 + [0.6] * 16, margin=0.02)),
        ("asserts", compare([1.0] * 3 + [0.0] * 2, [0.75] * 3 + [1.0] * 2)),  # worse on most rows, yet higher
    ],
)
def test_a_measure_that_does_not_decide_is_not_told_where_it_has_hardly_moved(name: str, one: Comparison) -> None:
    measures = {"loss": BETTER, "form": shares(8, 0)} | {name: one}
    assert fallen_measures("loss", measures, decide("loss", measures, {}, None, Bounds())) == []


def test_a_measure_is_not_told_where_the_verdict_on_the_same_is_worse() -> None:
    unsound = shares(20, worse=8)
    measures = {"loss": compare([1.0] * 20, [2.0] * 20, is_loss=True), "exact_match": unsound, "form": shares(20, 1)}
    assert fallen_measures("loss", measures, decide("loss", measures, {}, None, Bounds())) == ["form"]
    measures = {"loss": BETTER, "exact_match": unsound, "form": unsound}
    assert fallen_measures("loss", measures, decide("loss", measures, {}, None, Bounds())) == ["exact_match"]
    risen = measures["loss"] = compare([1.0] * 20, [2.0] * 20, is_loss=True)
    assert "loss" in fallen_measures("asserts", measures | {"asserts": shares(20, 0, 9)}, ())
    assert sentence_of_fall("loss", risen).startswith("the loss of the expected answers rose from 1.000 to 2.000: ")


NEVER_EXACT = compare([0.0] * 20, [0.0] * 20)
SAME_LOSS = compare([1.0] * 20, [1.0] * 20, is_loss=True)
HIGHER = compare([0.2] * 20, [0.6] * 20, margin=0.02)


@pytest.mark.parametrize(
    ("decided_by", "measures", "told"),
    [
        ("loss", {"loss": BETTER, "exact_match": NEVER_EXACT}, ("no answer is word for word", "--decide-by exact_")),
        ("exact_match", {"exact_match": NEVER_EXACT, "rouge_l": HIGHER}, ("by ROUGE-L,", "--decide-by rouge_l")),
        ("loss", {"loss": SAME_LOSS, "exact_match": shares(20, 0, 9), "rouge_l": HIGHER},
         ("by exact answers and ROUGE-L,", "but the loss of the expected answers decided", "--decide-by exact_match")),
        ("exact_match", {"exact_match": shares(20, 9), "loss": BETTER}, ("better by the loss", "--decide-by loss")),
    ],
)  # fmt: skip
def test_what_other_measures_say_against_the_verdict_is_told_with_the_flag(
    decided_by: str, measures: dict[str, Comparison], told: tuple[str, ...]
) -> None:
    objection = objection_to(decided_by, measures)
    assert all(part in objection for part in told), objection


@pytest.mark.parametrize(
    ("decided_by", "measures"),
    [
        ("loss", {"loss": BETTER, "exact_match": shares(20, 0, 1), "rouge_l": HIGHER}),
        ("loss", {"loss": BETTER}),
        ("loss", {"loss": SAME_LOSS, "exact_match": NEVER_EXACT}),
        ("loss", {"loss": SAME_LOSS, "exact_match": shares(20, 0, 3)}),  # which chance explains
        ("asserts", {"asserts": shares(20, 0, 9), "exact_match": NEVER_EXACT}),  # they judge the answers themselves
        ("exact_match", {"exact_match": shares(20, 0, 9), "loss": compare([1.0] * 20, [2.0] * 20, is_loss=True)}),
    ],
)
def test_measures_that_agree_or_may_differ_by_chance_are_no_objection(
    decided_by: str, measures: dict[str, Comparison]
) -> None:
    assert objection_to(decided_by, measures) == ""


def test_what_makes_an_adapter_worse_beside_its_rows_comes_first() -> None:
    rows = shares(16, worse=0, better=16)
    fine, bad = Decision("rows", "better", ""), Decision("general text, English", "worse", "loss 4.4 → 4.9")
    assert sentence_of(rows, [fine]).startswith("better on 16 of 16 rows")
    assert sentence_of(rows, [fine, bad]).startswith("general text, English; the rows themselves: better on 16 of 16")
    assert sentence_of(rows, [Decision("rows", "worse", ""), bad]).startswith("better on 16 of 16 rows")
