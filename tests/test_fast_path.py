"""The whole training step against PEFT's own forward, full logits and plain cross-entropy, one document at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import give_back_forwards
from transformers import TrainerCallback

from loratune.data.encoding.encoder import IGNORED
from loratune.model.hardware import detect_hardware
from loratune.recipe.loading import load_recipe
from loratune.training import run
from loratune.training.checkpoints.signals import StopSignals
from loratune.training.processes.watch import Watch
from loratune.training.session import load, prepare

# Rows of many lengths, so that packing has something to do.
ROWS = [{"instruction": f"How much is {n}?", "output": "It is so. " * (1 + n * n % 7)} for n in range(11)]


def documents(batch: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each document of a batch, by its borders or its mask."""
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        pairs = zip(batch["input_ids"], batch["labels"], lengths, strict=True)
        return [(ids[:length], labels[:length]) for ids, labels, length in pairs]
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    found = list(zip(batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths), strict=True))
    return found[: len(batch["about"]["sequences"])]


class Comparison(TrainerCallback):
    """Before each optimizer step, compares every gradient with that of the reference on the step's batches."""

    def __init__(self, trainer: Any, reference: Any) -> None:
        self.trainer, self.reference = trainer, reference
        self.batches: list[dict[str, Any]] = []
        self.rows_of_steps: list[int] = []
        compute_loss = trainer.compute_loss

        def recorded(model: Any, inputs: dict[str, Any], *arguments: Any, **settings: Any) -> Any:
            self.batches.append(dict(inputs))  # the trainer takes out what is not for the model
            return compute_loss(model, inputs, *arguments, **settings)

        trainer.compute_loss = recorded

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.reference.load_state_dict(trained, strict=False)
        self.reference.zero_grad()
        step = [document for batch in self.batches for document in documents(batch)]
        tokens = sum(int((labels[1:] != IGNORED).sum()) for _, labels in step)
        for ids, labels in step:
            logits = self.reference(input_ids=ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
            (loss / tokens).backward()
        expected = {name: value.grad for name, value in self.reference.named_parameters() if name in trained}
        for name, value in trained.items():
            torch.testing.assert_close(value.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
        assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
        self.rows_of_steps.append(len(step))
        self.batches.clear()


def train(model: Path, folder: Path, **flags: Any) -> tuple[Comparison, Any]:
    """A short run in float32 that is compared at each step."""
    (folder / "rows.json").write_text(json.dumps(ROWS))
    settings = {
        "model.base": str(model), "model.dtype": "float32", "data.train": [str(folder / "rows.json")],
        "data.validation": "0", "data.severity": ["repetitive=ignore"], "lora.dropout": "0",
        "training.learning_rate": "5e-3", "training.max_grad_norm": "0", "output": str(folder / "run"),
    }  # fmt: skip
    recipe = load_recipe(None, settings | flags)
    session = load(prepare(recipe, None, folder / "run", detect_hardware(), StopSignals()))
    torch.manual_seed(1)
    for name, value in session.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide wrong gradients of A
            torch.nn.init.normal_(value, std=0.05)
    reference = copy.deepcopy(session.model)
    give_back_forwards(reference)
    reference.base_model.model.set_attn_implementation("eager")
    trainer = run._build_trainer(session, {}, Watch(600, lambda: None)).trainer
    comparison = Comparison(trainer, reference)
    trainer.add_callback(comparison)
    (folder / "run").mkdir(exist_ok=True)
    trainer.train()
    return comparison, trainer


@pytest.mark.parametrize(
    ("flags", "rows_of_steps"),
    [
        ({"training.batch_size": "11"}, [11]),
        ({"training.tokens_per_pass": "70", "training.batch_size": "50"}, [11]),
        ({"training.tokens_per_pass": "70", "training.batch_size": "1"}, [1] * 11),
        ({"training.tokens_per_pass": "70", "training.batch_size": "4"}, [4, 4, 3]),
        ({"training.tokens_per_batch": "70", "training.gradient_accumulation": "2"}, [8, 3]),
        ({"model.attn_implementation": "sdpa", "training.batch_size": "11"}, [11]),
        ({"model.attn_implementation": "eager", "training.batch_size": "11"}, [11]),
        ({"training.packing": False, "training.batch_size": "11"}, [11]),
        ({"training.packing": False, "training.batch_size": "6", "training.tokens_per_pass": "70"}, [6, 5]),
        ({"training.packing": False, "training.batch_size": "4", "training.gradient_accumulation": "2"}, [8, 3]),
    ],
    ids=str,
)
def test_gradients_are_those_of_plain_peft_with_full_logits(
    random_qwen: Path, tmp_path: Path, flags: dict[str, Any], rows_of_steps: list[int]
) -> None:
    comparison, trainer = train(random_qwen, tmp_path, **flags, **{"training.epochs": "1"})
    assert comparison.rows_of_steps == rows_of_steps
    assert trainer.state.global_step == len(comparison.rows_of_steps) == trainer.state.max_steps


def test_packed_passes_hold_no_padding_and_every_row_once(random_qwen: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    comparison, trainer = train(random_qwen, tmp_path, **{"training.tokens_per_pass": "90", "training.epochs": "1"})
    for step in trainer.get_train_dataloader():
        for batch in step["passes"]:
            lengths = [len(ids) for ids, _ in documents(batch)]
            assert sum(lengths) == batch["about"]["tokens"] <= 90
            seen += lengths
    assert sorted(seen) == sorted(trainer._data.train.lengths.tolist())
    assert sum(comparison.rows_of_steps) == len(ROWS)


def test_a_step_learns_the_same_however_it_goes_through_the_model(random_qwen: Path, tmp_path: Path) -> None:
    """Packed at once, packed in several passes, or padded: the same rows in each step of both epochs."""

    def losses(name: str, **flags: Any) -> list[float]:
        (tmp_path / name).mkdir()
        _, trainer = train(random_qwen, tmp_path / name, **{"training.batch_size": "4", "training.epochs": "2"} | flags)
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    whole = losses("whole")
    assert len(whole) == 6
    assert whole[:3] != pytest.approx(whole[3:], rel=1e-2)  # it learns, and other rows meet
    for flags in ({"training.tokens_per_pass": "60"}, {"training.packing": False}):
        assert losses("-".join(flags), **flags) == pytest.approx(whole, rel=1e-4)


def test_with_dropout_the_same_seed_gives_the_same_run(random_qwen: Path, tmp_path: Path, cli: Any) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))

    def losses(name: str, seed: int) -> list[float]:
        flags = ["--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows, "--lora.dropout", "0.3"]
        flags += [
            "--training.learning_rate",
            "1e-2",
            "--training.max_steps",
            "4",
            "--training.batch_size",
            "4",
        ]
        flags += ["--data.severity", "repetitive=ignore", "--seed", seed, "--output", tmp_path / name]
        assert cli("sft", *flags).exit_code == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    first = losses("a", 7)
    assert losses("b", 7) == first
    assert losses("c", 8) != first


def test_the_quickstart_s_first_losses_are_the_recorded_ones(tmp_path: Path, cli: Any) -> None:
    flags = ["--model.dtype", "float32", "--lora.dropout", "0", "--data.validation", "0", "--output", tmp_path / "run"]
    flags += ["--training.max_steps", "6", "--training.scheduler", "constant", "--training.warmup", "0"]
    flags += ["--lora.rank", "8", "--lora.alpha", "16", "--training.learning_rate", "4e-3"]  # those of the record
    assert cli("sft", "--config", "quickstart", *flags).exit_code == 0
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [record["loss"] for record in records] == pytest.approx(
        [1.28134, 1.41444, 1.07343, 0.50892, 0.24388, 0.32883], abs=2e-3
    )
