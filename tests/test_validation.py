"""What a validation measures, against plain loops and greedy decoding, and which validation is the best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import count, fake_gpu
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.data.assembly.batches import collate_packed, collate_padded
from loratune.data.encoding.encoder import IGNORED
from loratune.model.kernels import linear_cross_entropy
from loratune.model.kernels.linear_cross_entropy import LabelledLoss, add_labelled_loss, summed_loss
from loratune.recipe.sections import CheckpointSettings, EvaluationSettings
from loratune.runs.folder import read_metrics
from loratune.training.checkpoints.best import MANY, Validation, best_of, judged_by
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.training.reporting.health import WORSE
from loratune.training.validation import figures, sums_of

Row = dict[str, Any]
VOCABULARY = 13


# --- exact answers ---


def conversation(model: Any, answers: list[tuple[int, bool]], seed: int) -> Row:
    """A row whose answers are what transformers generates greedily, or that with another token at some place.

    Args:
        model: the model.
        answers: for each, its number of tokens, and whether it is left as it was generated.
        seed: of the prompts.
    """
    random = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for length, is_right in answers:
        ids += torch.randint(3, 99, (3,), generator=random).tolist()
        labels += [IGNORED] * 3
        made = model.generate(torch.tensor([ids]), max_new_tokens=length, min_new_tokens=length, do_sample=False)
        answer = made[0, len(ids) :].tolist()
        if not is_right:
            place = int(torch.randint(length, (1,), generator=random))
            answer[place] = (answer[place] + 1) % 99
        ids, labels = ids + answer, labels + answer
    return {"input_ids": ids, "labels": labels, "sequence": seed}


@pytest.fixture(scope="module")
def model(random_qwen: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(random_qwen, attn_implementation="sdpa").requires_grad_(False).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.repetition_penalty = 1.0
    return model


RIGHT, WRONG = True, False
TURNS = [[(5, RIGHT)], [(4, WRONG)], [(3, RIGHT), (6, RIGHT)], [(2, WRONG), (4, RIGHT)], [(1, RIGHT)], [(1, WRONG)]]


@pytest.fixture(scope="module")
def rows(model: Any) -> list[Row]:
    return [conversation(model, answers, seed) for seed, answers in enumerate(TURNS)]


def exact_of(model: Any, rows: list[Row], collate: Callable[[list[Row]], Row]) -> tuple[int, int]:
    """Exact answers and all answers, as a validation counts them in one pass."""
    batch = collate(rows)
    own = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    own.load_state_dict(model.state_dict())
    own.requires_grad_(False).eval()
    add_labelled_loss(own)
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    inputs = {name: batch[name] for name in names if name in batch}
    if "document_lengths" in batch:  # a mask by hand, without the fast path
        documents = batch["seq_idx"][0]
        apart = (documents[:, None] == documents).tril()
        inputs["attention_mask"] = torch.where(apart, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        found = figures(sums_of(own(**inputs, summed_loss=True)).tolist())
    return round(found["exact_answers"] * found["answers"]), found["answers"]


def padded(rows: list[Row]) -> Row:
    return collate_padded(rows, pad_token_id=0)


EXPECTED = (5, 8)
"""Of the answers in TURNS. The second answer of a row whose first is wrong is generated after the wrong one."""


@pytest.mark.parametrize("collate", [collate_packed, padded], ids=["packed", "padded"])
def test_exact_answers_are_those_that_greedy_decoding_gives(
    model: Any, rows: list[Row], collate: Callable[[list[Row]], Row]
) -> None:
    assert exact_of(model, rows, collate) == EXPECTED


def all_predicted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear_cross_entropy, "_are_predicted", lambda scores, targets: targets >= 0)


def next_label_predicted(patch: pytest.MonkeyPatch) -> None:
    plain = linear_cross_entropy._are_predicted
    patch.setattr(linear_cross_entropy, "_are_predicted", lambda scores, aims: plain(scores, aims.roll(1)))


def rows_as_one_answer(patch: pytest.MonkeyPatch) -> None:
    """As if positions were those of labelled tokens alone, which are all adjacent."""
    plain = LabelledLoss.__init__

    def init(self: Any, *, positions: torch.Tensor, **others: Any) -> None:
        plain(self, positions=torch.arange(len(positions)), **others)

    patch.setattr(LabelledLoss, "__init__", init)


@pytest.mark.parametrize("fault", [all_predicted, next_label_predicted, rows_as_one_answer])
def test_a_wrong_count_of_exact_answers_shows(
    model: Any, rows: list[Row], fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert exact_of(model, rows, collate_packed) != EXPECTED


@given(
    positions=st.integers(0, 23),
    chunk=st.sampled_from([1, 3, 100]),
    kind=st.sampled_from(["frozen", "trained", "settled"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_predicted_labels_are_the_first_of_the_largest_logits(
    positions: int, chunk: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    head = torch.nn.Linear(4, VOCABULARY, bias=False, dtype=dtype).requires_grad_(kind == "trained")
    with torch.no_grad():
        head.weight[VOCABULARY // 2 :] = head.weight[: VOCABULARY - VOCABULARY // 2].clone()  # so that there are ties
    hidden = torch.randn(positions, 4, dtype=dtype)
    targets = torch.randint(VOCABULARY, (positions,))
    with torch.no_grad():
        logits = head(hidden).tolist()
    expected = [scores.index(max(scores)) == aim for scores, aim in zip(logits, targets.tolist(), strict=True)]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(linear_cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * chunk)
        patch.setattr(linear_cross_entropy, "POSITIONS_UNIT", 1)
        given_head = SettledHead(head) if kind == "settled" else head
        found = summed_loss(hidden, targets, given_head, is_settled=kind == "settled").predicted
    assert found is not None
    assert found.tolist() == expected


class SettledHead:
    """A head that is no plain matrix, as that of a model that caps its logits."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self.head, self.weight = head, head.weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def test_exact_answers_cost_three_operators_per_chunk_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * 32)
    head = torch.nn.Linear(4, VOCABULARY, bias=False).requires_grad_(False)
    hidden, targets, chunks = torch.randn(96, 4), torch.zeros(96, dtype=torch.int64), 3

    def measured() -> Any:
        with torch.no_grad():
            return count(lambda: summed_loss(hidden, targets, head)).names

    counted = measured()
    monkeypatch.setattr(linear_cross_entropy, "_are_predicted", lambda scores, aims: True)
    without = measured()
    assert counted - without == {"argmax": chunks, "eq": chunks, "copy_": chunks}
    assert without - counted == {"fill_": chunks}
    with fake_gpu():  # where a look at a value fails
        made = LabelledLoss(
            losses=torch.rand(96), predicted=torch.ones(96, dtype=torch.bool), positions=torch.arange(96)
        )
        sums = count(lambda: sums_of(made))
    assert len(sums) <= 20
    assert sums.copies == 0


def test_training_passes_do_not_look_for_exact_answers() -> None:
    head = torch.nn.Linear(4, VOCABULARY, bias=False).requires_grad_(False)
    hidden = torch.randn(5, 4, requires_grad=True)
    targets = torch.zeros(5, dtype=torch.int64)
    for own in (head, SettledHead(head), torch.nn.Linear(4, VOCABULARY)):
        for is_settled in (False, True):
            counted = count(lambda own=own, is_settled=is_settled: summed_loss(hidden, targets, own, is_settled))
            assert counted.names["argmax"] == 0
            assert summed_loss(hidden, targets, own, is_settled).predicted is None


# --- the best of several ---


def after(step: int, loss: float, exact: float | None) -> Validation:
    return Validation(step, loss, exact)


BY_HEART = [after(0, 3.0, 0.0), after(5, 0.5, 0.4), after(10, 0.3, 0.55), after(15, 0.4, 0.8), after(20, 0.6, 0.8)]
"""The loss rises while answers become right."""
FREE_WORDS = [after(0, 3.0, 0.0), after(5, 0.5, 0.0), after(10, 0.3, 0.01), after(15, 0.4, 0.02)]
"""Hardly any answer can be exact."""
UNCOUNTED = [after(0, 3.0, None), after(5, 0.3, None), after(10, 0.4, None)]


@pytest.mark.parametrize(
    ("measured", "best_by", "step", "judge"),
    [
        (BY_HEART, "auto", 15, "exact"),
        (BY_HEART, "exact", 15, "exact"),
        (BY_HEART, "loss", 10, "loss"),
        (FREE_WORDS, "auto", 10, "loss"),
        (FREE_WORDS, "exact", 15, "exact"),
        (UNCOUNTED, "auto", 5, "loss"),
        (UNCOUNTED, "exact", 5, "loss"),
    ],
)
def test_rows_that_ask_for_exact_answers_are_judged_by_them(
    measured: list[Validation], best_by: Any, step: int, judge: str
) -> None:
    best = best_of(measured, best_by)
    assert best is not None
    assert (best.step, judged_by(best, best_by)) == (step, judge)


def kept_by(keeper: CheckpointKeeper, measured: list[Validation]) -> list[int]:
    """Feed validations to a keeper; returns the steps that it saves for being better."""
    saved = []
    for one in measured:
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        metrics = {"eval_loss": one.loss, "eval_exact_answers": one.exact}
        keeper.on_evaluate(None, SimpleNamespace(global_step=one.step), control, metrics)
        saved += [one.step] if control.should_save else []
    return saved


def keeper_of(folder: Path, best_by: Any = "auto", patience: int | None = None) -> CheckpointKeeper:
    return CheckpointKeeper(folder, CheckpointSettings(best_by=best_by), EvaluationSettings(early_stopping=patience))


SHARES = st.sampled_from([0.0, 0.2, MANY, 0.7, 1.0])


@given(
    figures=st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3]), SHARES), min_size=1, max_size=8),
    best_by=st.sampled_from(["auto", "loss", "exact"]),
    cut=st.integers(0, 8),
)
def test_a_run_and_a_resumed_one_keep_the_validation_that_looking_back_calls_best(
    figures: list[tuple[float, float]], best_by: Any, cut: int
) -> None:
    measured = [after(step, *both) for step, both in enumerate(figures, start=1)]
    whole = keeper_of(Path("run"), best_by)
    saved = kept_by(whole, measured)
    assert whole.best == best_of(measured, best_by)
    assert whole.best is not None
    assert saved[-1] == whole.best.step
    first, second = keeper_of(Path("run"), best_by), keeper_of(Path("run"), best_by)
    kept_by(first, measured[:cut])
    second.restore(json.loads(json.dumps(first.progress)))
    kept_by(second, measured[cut:])
    assert second.progress == whole.progress


def test_a_checkpoint_of_a_version_that_counted_no_exact_answers_goes_on_by_its_loss() -> None:
    keeper, progress = keeper_of(Path("run")), keeper_of(Path("run")).progress
    progress |= {"best_step": 5, "best_loss": 0.3}
    del progress["best_exact_answers"]
    keeper.restore(progress)
    assert kept_by(keeper, [after(10, 0.4, 1.0)]) == []
    again = keeper_of(Path("run"))
    again.restore(json.loads(json.dumps(keeper.progress)))
    for one in (keeper, again):
        assert kept_by(one, [after(15, 0.2, 0.9), after(20, 0.3, 1.0)]) == [15]
    assert again.progress == keeper.progress


def test_patience_counts_validations_that_are_not_better() -> None:
    by_heart, by_loss = keeper_of(Path("run"), "auto", 2), keeper_of(Path("run"), "loss", 2)
    kept_by(by_heart, BY_HEART)
    kept_by(by_loss, BY_HEART)
    assert (by_heart.stopped_early, by_heart.validations_since_best) == (False, 1)
    assert (by_loss.stopped_early, by_loss.validations_since_best) == (True, 2)


# --- whole runs ---


@pytest.fixture
def by_heart(tmp_path: Path) -> Path:
    """Rows to be learnt by heart, and some that contradict them, whose loss rises as the model becomes certain."""
    rows = [{"instruction": f"Say {name}.", "output": f"{2 * n}."} for n, name in enumerate("abcd")]
    held_out = rows[:3] + [row | {"output": "no idea"} for row in rows[3:]]
    for name, content in (("rows", rows), ("held_out", held_out)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_what_is_learnt_by_heart_is_kept_where_it_is_known_and_is_no_overfitting(
    cli: Callable[..., Result], by_heart: Path
) -> None:
    run = by_heart / "run"
    done = cli(
        "sft", "--model.base", "tiny-qwen", "--model.dtype", "float32", "--data.train", by_heart / "rows.json",
        "--data.validation", by_heart / "held_out.json", "--training.learning_rate", "1e-2",
        "--training.max_steps", "10", "--evaluation.every_steps", "2", "--checkpoints.every_steps", "50",
        "--evaluation.questions_share", "0", "--output", run,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads((run / "report.json").read_text())
    loss, exact = report["validation_loss"], report["exact_answers"]
    assert loss["best_step"] < exact["best_step"] == loss["adapter_step"]
    assert 0 == exact["before"] < MANY <= exact["best"] == exact["after"]
    assert (exact["answers"], report["best_by"]) == (4, "exact")
    assert "overfitting" not in done.stderr
    assert f"would take step {loss['best_step']}, with the lowest loss" in done.stderr
    lines = {line["step"]: line for line in read_metrics(run) if "exact_answers" in line}
    assert lines[loss["best_step"]]["exact_answers"] < exact["best"]
    assert lines[10]["validation_loss"] > WORSE * loss["best"]  # by the loss alone, it would be
    saved = run / "checkpoints" / f"step-{exact['best_step']:06d}" / "adapter_model.safetensors"
    assert saved.read_bytes() == (run / "adapter" / "adapter_model.safetensors").read_bytes()
