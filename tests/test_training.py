"""`loratune sft` on a model of random weights: what it writes, what it learns, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROWS
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import Result

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.registry import ALPACA, ConversationReader
from loratune.errors import Exit
from loratune.model.tokenizer import load_tokenizer
from loratune.printable import visible
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import PromptSettings
from loratune.runs.tokenizer_files import copy_tokenizer_files
from loratune.training.callbacks import DivergenceGuard, Progress
from loratune.training.failures import memory_advice
from loratune.training.trainer import AdapterTrainer
from loratune.training.watchers import Watchers, add_watchers

RUN_FILES = {
    ".lock", "recipe.yaml", "manifest.json", "status.json", "metrics.jsonl", "probe.json", "report.json", "loss.png",
    "findings.json",
    "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    "adapter/tokenizer.json", "adapter/tokenizer_config.json", "adapter/chat_template.jinja",
}  # fmt: skip
CHECKPOINT_FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json", "checkpoint.json",
} - {"README.md"}  # fmt: skip


@pytest.fixture
def sft(cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run `loratune sft` for a few steps on the random model; more flags may be given."""

    def run(*flags: Any, data: Path = rows_file, model: Path = random_qwen) -> Result:
        return cli(
            "sft", "--model.base", model, "--model.dtype", "float32", "--data.train", data, "--training.max_steps", "4",
            "--training.batch_size", "4", "--output", tmp_path / "run", *flags,
        )  # fmt: skip

    return run


@pytest.fixture
def misleading(tmp_path: Path) -> Path:
    """Validation rows that contradict the training rows, so that their loss rises sooner or later."""
    path = tmp_path / "misleading.json"
    path.write_text(json.dumps([row | {"output": "狐狸 zebra!"} for row in ROWS[:4]]))
    return path


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def mean_loss(model: Any, rows: list[dict[str, str]], tokenizer: Any) -> float:
    """Loss per answer token by full logits and plain cross-entropy, a row at a time."""
    encoder = Encoder(tokenizer, PromptSettings())
    total, count = 0.0, 0
    for conversation in map(ConversationReader(ALPACA, {}, {}).read, rows):
        (example,) = encoder.encode(conversation)
        labels = torch.tensor(example.labels.tolist())
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids.tolist()])).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels != IGNORED).sum())
    return total / count


def test_a_run_writes_exactly_its_files(sft: Callable[..., Result], tmp_path: Path) -> None:
    assert sft("--checkpoints.every_steps", "2").exit_code == 0
    checkpoints = {f"checkpoints/step-00000{step}/{name}" for step in (2, 4) for name in CHECKPOINT_FILES}
    assert files_of(tmp_path / "run") == RUN_FILES | checkpoints


def test_the_report_and_metrics_say_what_happened(sft: Callable[..., Result], tmp_path: Path) -> None:
    result = sft("--json", "--evaluation.every_steps", "2")
    report, metrics = read_json(tmp_path / "run" / "report.json"), metrics_of(tmp_path / "run")

    assert json.loads(result.stdout) == {"schema": "loratune/sft/1"} | report
    assert report["steps"] == 4
    assert report["rows"] == {"training": 11, "validation": 1}
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in metrics if "validation_loss" in line] == [0, 2, 4]
    assert read_json(tmp_path / "run" / "status.json")["state"] == "finished"
    assert report["validation_loss"]["before"] == metrics[0]["validation_loss"]


def test_a_run_shorter_than_its_logging_interval_is_reported_whole(sft: Callable[..., Result], tmp_path: Path) -> None:
    every, seldom = tmp_path / "every", tmp_path / "seldom"
    assert sft("--data.validation", "0", "--output", every).exit_code == 0
    assert sft("--data.validation", "0", "--tracking.every_steps", "50", "--output", seldom).exit_code == 0
    assert [line["step"] for line in metrics_of(seldom)] == [1, 4]
    assert read_json(seldom / "report.json")["tokens"] == read_json(every / "report.json")["tokens"]


def test_training_lowers_the_loss_that_plain_peft_measures(
    sft: Callable[..., Result], tmp_path: Path, random_qwen: Path
) -> None:
    assert (
        sft("--training.learning_rate", "1e-2", "--training.max_steps", "60", "--data.validation", "0").exit_code == 0
    )
    base = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    tokenizer = load_tokenizer(random_qwen)
    before = mean_loss(base, ROWS, tokenizer)
    after = mean_loss(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval(), ROWS, tokenizer)
    assert after < 0.95 * before  # embeddings and head are random and frozen, so it cannot fall far


def test_validation_loss_is_per_token_as_a_plain_loop_has_it(
    sft: Callable[..., Result], tmp_path: Path, random_qwen: Path
) -> None:
    rows = [{"instruction": "a", "output": "x" * length} for length in (1, 5, 60, 2, 30, 9, 1)]
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps(rows))
    assert sft("--data.validation", held_out, "--evaluation.batch_size", "2").exit_code == 0

    base = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    tokenizer = load_tokenizer(random_qwen)
    report = read_json(tmp_path / "run" / "report.json")["validation_loss"]
    assert report["before"] == pytest.approx(mean_loss(base, rows, tokenizer), rel=1e-5)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert report["after"] == pytest.approx(mean_loss(adapted, rows, tokenizer), rel=1e-5)


def test_the_first_loss_is_that_of_the_base_over_the_whole_step(
    sft: Callable[..., Result], tmp_path: Path, random_qwen: Path
) -> None:
    flags = ["--data.validation", "0", "--lora.dropout", "0", "--training.max_steps", "1", "--training.warmup", "0"]
    assert sft(*flags, "--training.batch_size", "12", "--training.tokens_per_pass", "100").exit_code == 0
    base = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    expected = mean_loss(base, ROWS, load_tokenizer(random_qwen))
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_same_recipe_trains_the_same_adapter(sft: Callable[..., Result], tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        assert sft("--overwrite").exit_code == 0
        weights.append(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_saved_recipe_trains_the_same_adapter_again(
    sft: Callable[..., Result], cli: Callable[..., Result], tmp_path: Path
) -> None:
    assert sft("--lora.rank", "4").exit_code == 0
    again = tmp_path / "again"
    assert cli("sft", "--config", tmp_path / "run" / "recipe.yaml", "--output", again).exit_code == 0
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "run", again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_newest_checkpoints_and_the_best_stay(
    sft: Callable[..., Result], tmp_path: Path, misleading: Path
) -> None:
    flags = ["--training.max_steps", "20", "--checkpoints.every_steps", "1", "--evaluation.every_steps", "1"]
    flags += ["--checkpoints.keep", "2", "--training.learning_rate", "2e-2", "--data.validation", str(misleading)]
    assert sft(*flags).exit_code == 0
    validations = {m["step"]: m["validation_loss"] for m in metrics_of(tmp_path / "run") if "validation_loss" in m}
    del validations[0]
    best = min(validations, key=lambda step: validations[step])
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {f"step-{step:06d}" for step in (19, 20, best)}
    assert len(kept) == 3


def test_the_final_adapter_is_the_best_checkpoint_s(
    sft: Callable[..., Result], tmp_path: Path, misleading: Path
) -> None:
    flags = ["--training.max_steps", "20", "--evaluation.every_steps", "1", "--training.learning_rate", "2e-2"]
    assert sft(*flags, "--data.validation", misleading).exit_code == 0
    report = read_json(tmp_path / "run" / "report.json")["validation_loss"]
    assert report["best_step"] < 20
    best = tmp_path / "run" / "checkpoints" / f"step-{report['best_step']:06d}" / "adapter_model.safetensors"
    final = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert best.read_bytes() == final.read_bytes()


def test_training_stops_early_when_validation_no_longer_improves(
    sft: Callable[..., Result], tmp_path: Path, misleading: Path
) -> None:
    flags = ["--training.max_steps", "40", "--evaluation.every_steps", "1", "--training.learning_rate", "2e-2"]
    result = sft(*flags, "--data.validation", misleading, "--evaluation.early_stopping", "2")
    assert result.exit_code == 0
    assert "the validation loss no longer fell" in result.stderr
    report = read_json(tmp_path / "run" / "report.json")
    assert report["stopped_early"]
    assert report["steps"] == report["validation_loss"]["best_step"] + 2


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--lora.target_modules", "qkv"], Exit.USAGE, "no module is called qkv"),
        (["--training.max_length", "8"], Exit.DATA, "longer than training.max_length 8"),
        (["--training.warmup", "50", "--training.max_steps", "null"], Exit.USAGE, "not shorter than the run's"),
        (["--data.train", "missing.json"], Exit.DATA, "missing.json: no such file"),
        (["--model.base", "missing/model/folder"], Exit.MODEL, "no such folder"),
        (["--model.attn_implementation", "flash_attention_2"], Exit.USAGE, "flash-attn"),
    ],
)
def test_a_run_that_cannot_work_is_one_message_and_no_folder(
    sft: Callable[..., Result], tmp_path: Path, flags: list[str], code: Exit, words: str
) -> None:
    result = sft(*flags)
    assert result.exit_code == code
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--lora.target_modules", "q_prj", "--lora.modules_to_save", "heads"),
         ["no module is called q_prj; the model has q_proj, ", "lora.modules_to_save: no module is called heads"]),
        (("--lora.layers", "3-99"), ["lora.layers '3-99': the model has "]),
        (("--lora.rank_pattern", "q_prj=4"), ["lora.rank_pattern 'q_prj': no module of the adapter ends so; it has "]),
        (("--method", "freeze", "--freeze.modules", "nope"), ["nope: no module is called so; there are "]),
    ],
)  # fmt: skip
def test_names_of_modules_are_told_with_the_rows_before_weights_are_read(
    sft: Callable[..., Result],
    random_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    told: list[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    base, bad = tmp_path / "base", tmp_path / "bad.json"
    base.mkdir()
    for path in random_qwen.iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    bad.write_text('[{"instruction": "No answer?"}]', encoding="utf-8")
    result = sft(*flags, model=base)  # there are no weights
    assert result.exit_code == Exit.USAGE
    assert all(words in result.stderr for words in told)
    result = sft(*flags, model=base, data=bad)
    assert result.exit_code == Exit.DATA
    assert all(words in result.stderr for words in [f"{bad} row 1: 'output' is missing", *told])


def test_a_loss_that_is_not_a_number_stops_the_run_and_saves_nothing(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_at(monkeypatch, step=2, with_what=spoil_weights)
    result = sft("--checkpoints.every_steps", "1")
    assert result.exit_code == Exit.DIVERGED
    assert "diverged at step 3" in result.stderr
    rows = re.findall(r"rows\.json row \d+ «", " ".join(result.stderr.split()))
    assert len(rows) == len(set(rows)) == 3  # of eleven, the last step of the epoch
    assert read_json(tmp_path / "run" / "status.json")["state"] == "diverged"
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "checkpoints" / "step-000003").exists()
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == [1, 2]


def test_callbacks_are_called_in_their_written_order(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, shown = [], []

    def watched(session: Any, trainer: Any, *others: Any) -> Watchers:
        watchers = add_watchers(session, trainer, *others)
        called.extend(trainer.callback_handler.callbacks)
        assert [callback for callback in called if callback in watchers] == list(watchers)
        return watchers

    def show(self: Progress, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown.append((state.global_step, self.metrics.records[-1]["step"]))

    monkeypatch.setattr("loratune.training.run.add_watchers", watched)
    monkeypatch.setattr(Progress, "on_log", show)
    assert sft().exit_code == 0
    assert len(called) > len(Watchers._fields)
    assert [step for step, _ in shown] == [step for _, step in shown] != []
    order = Watchers._fields.index
    assert order("stops") < order("guard") < order("metrics") < order("progress")
    assert order("guard") < min(order("keeper"), order("trackers"))


def test_a_validation_is_shown_once_it_says_something_of_the_adapter_and_rates_are_short(
    sft: Callable[..., Result], tmp_path: Path
) -> None:
    result = sft("--evaluation.every_steps", "2", "--tracking.every_steps", "1")
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    told = [(line.split("  ")[0], " val " in line, " exact " in line) for line in lines]
    steps = [(f"step {step}/4", is_validation) for step in (1, 2, 3, 4) for is_validation in (False, True)]
    assert told == [(step, own, own) for step, own in steps if not own or step in ("step 2/4", "step 4/4")]
    rates = re.findall(r"  lr (\S+)  ", "\n".join(lines))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates[0] == "0", "the first step warms up"
    assert not any("e-0" in rate for rate in rates)
    known = [record["learning_rate"] for record in metrics if "learning_rate" in record]
    assert [float(rate) for rate in rates] == pytest.approx(known, rel=0.05)


def test_weights_spoilt_between_two_logs_are_never_saved(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_at(monkeypatch, step=2, with_what=spoil_weights)
    result = sft("--checkpoints.every_steps", "3", "--tracking.every_steps", "9", "--data.validation", "0")
    assert result.exit_code == Exit.DIVERGED
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_an_interrupted_run_says_so_and_leaves_no_adapter(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_at(monkeypatch, step=2, with_what=press_ctrl_c)
    result = sft("--checkpoints.every_steps", "1")
    assert result.exit_code == 130
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["step"], status["steps"]) == ("interrupted", 2, 4)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.predicts_memory
def test_lack_of_memory_is_advice(sft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    spoil_at(monkeypatch, step=1, with_what=lack)
    result = sft()
    assert result.exit_code == Exit.IO
    said = " ".join(result.stderr.split())
    assert re.search(
        r"out of memory with base [\d.]+ .?B, adapter [\d.]+ .?B, gradients and optimizer [\d.]+ .?B", said
    )
    # A pass of so few tokens gains nothing from being divided.
    assert re.search(r"a pass of \d{1,3} tokens; cheapest first: --training.gradient_checkpointing ", said)
    assert len(re.findall(" --[a-z]+[.]", said)) == 3


def test_advice_for_lack_of_memory_leaves_out_what_is_done_already() -> None:
    recipe = load_recipe(None, {
        "model.base": "x", "model.quantization": "nf4", "data.train": ["y"], "training.tokens_per_pass": "4096",
        "training.gradient_checkpointing": True, "lora.target_modules": "all-linear",
    })  # fmt: skip
    assert [line.split()[0] for line in memory_advice(recipe)] == [
        "--training.tokens_per_pass", "--training.max_length", "--lora.target_modules",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"), [("loss", "the loss is exactly 0"), ("grad_norm", "the gradient is exactly 0")]
)
def test_a_loss_or_gradient_of_nothing_is_told_once(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    plain = DivergenceGuard.on_log

    def with_zero(self: Any, args: Any, state: Any, control: Any, logs: dict[str, float], **others: Any) -> None:
        plain(self, args, state, control, logs | ({name: 0.0} if state.global_step > 1 else {}), **others)

    monkeypatch.setattr(DivergenceGuard, "on_log", with_zero)
    result = sft()
    assert result.exit_code == 0
    assert " ".join(result.stderr.split()).count(words) == 1
    warnings = read_json(tmp_path / "run" / "report.json")["warnings"]
    assert next(text for text in warnings if words in text).startswith("step 2: ")


def test_a_full_disk_is_one_message_and_no_half_checkpoint(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratune.training.trainer as trainer

    def full(model: Any, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(trainer, "save_adapter", full)
    result = sft()
    assert result.exit_code == Exit.IO
    assert "No space left on device" in " ".join(result.stderr.split())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_rows_are_read_before_the_model_is_looked_for(sft: Callable[..., Result], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('[{"instruction": "a"}]')
    result = sft(data=bad, model=Path("nobody/nothing"))
    assert result.exit_code == Exit.DATA
    assert "'output' is missing" in result.stderr


def test_a_missing_tracker_is_a_warning(sft: Callable[..., Result], tmp_path: Path) -> None:
    result = sft("--tracking.report_to", "swanlab", "--tracking.report_to", "tensorboard")
    assert result.exit_code == 0
    assert "tracking.report_to swanlab needs the package swanlab: pip install swanlab" in " ".join(
        result.stderr.split()
    )
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_one_row_is_enough(sft: Callable[..., Result], tmp_path: Path) -> None:
    data = tmp_path / "one.json"
    data.write_text(json.dumps(ROWS[:1]))
    result = sft(data=data)
    assert result.exit_code == 0
    assert "1 row cannot be split" in result.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--training.gradient_checkpointing"],
        ["--training.neftune_alpha", "5"],
        ["--lora.use_dora"],
        ["--lora.modules_to_save", "embed_tokens"],
        ["--prompt.template", "plain"],
        ["--training.optimizer", "adamw_8bit"],
        ["--training.optimizer", "paged_adamw_8bit"],
        ["--training.scheduler", "constant"],
    ],
)
def test_settings_train_to_the_end(sft: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    result = sft(*flags)
    assert result.exit_code == 0, result.stderr
    assert all(torch.isfinite(w).all() for w in load_file(tmp_path / "run/adapter/adapter_model.safetensors").values())


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora.modules_to_save", "embed_tokens"],
        ["--lora.modules_to_save", "lm_head", "--no-training.packing"],
        ["--lora.bias", "all"],
    ],
    ids=str,
)
def test_the_base_s_own_weights_train_in_float32_beside_bfloat16(
    sft: Callable[..., Result], tmp_path: Path, flags: list[str]
) -> None:
    """And begin with the loss of the base, to bfloat16's rounding."""
    common = ["--lora.dropout", "0", "--training.batch_size", "11", "--training.learning_rate", "1e-3"]
    losses = []
    for dtype in ("bfloat16", "float32"):
        result = sft(*common, *flags, "--overwrite", "--model.dtype", dtype)
        assert result.exit_code == 0, result.stderr
        adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
        assert {weight.dtype for weight in adapter.values()} == {torch.float32}
        losses.append([record["loss"] for record in metrics_of(tmp_path / "run") if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=2**-7)
    assert losses[0][-1] < losses[0][0]


def test_the_step_count_is_the_trainer_s(sft: Callable[..., Result], tmp_path: Path) -> None:
    result = sft("--training.max_steps", "null", "--training.epochs", "1.5", "--training.batch_size", "6")
    assert "training 3 steps of 6 rows" in result.stderr
    assert read_json(tmp_path / "run" / "status.json")["steps"] == 3


def test_the_report_tells_what_the_start_took(sft: Callable[..., Result], tmp_path: Path) -> None:
    result = sft()
    assert result.exit_code == 0
    stages = read_json(tmp_path / "run" / "report.json")["start_up_seconds"]
    assert list(stages) == ["imports", "data", "model", "trainer", "validation", "first step"]
    assert all(seconds >= 0 for seconds in stages.values())
    records = metrics_of(tmp_path / "run")
    first = next(record for record in records if "loss" in record)
    assert stages["validation"] + stages["first step"] == pytest.approx(first["seconds"], abs=0.3)
    assert "first step" in result.stderr


def test_the_card_has_no_local_path(sft: Callable[..., Result], tmp_path: Path, random_qwen: Path) -> None:
    assert sft().exit_code == 0
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert str(random_qwen.parent) not in card
    assert str(tmp_path) not in card


def test_the_tokenizer_is_copied_byte_for_byte(sft: Callable[..., Result], tmp_path: Path, random_qwen: Path) -> None:
    assert sft().exit_code == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "run" / "adapter" / name).read_bytes() == (random_qwen / name).read_bytes()


def test_the_manifest_knows_base_data_and_files(sft: Callable[..., Result], tmp_path: Path) -> None:
    assert sft().exit_code == 0
    manifest = read_json(tmp_path / "run" / "manifest.json")
    assert manifest["data"][0]["rows"] == 12
    assert manifest["base"]["path"]
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml"), {}).training.max_steps == 4
    adapter = {name for name in RUN_FILES if name.startswith("adapter/")}
    assert set(manifest["files"]) == adapter | {"recipe.yaml", "probe.json", "findings.json", "report.json"}


@pytest.mark.parametrize("architecture", ["Qwen3", "Llama", "Mistral"])
def test_other_architectures_train_and_answer(
    sft: Callable[..., Result], cli: Callable[..., Result], tmp_path: Path, random_qwen: Path, architecture: str
) -> None:
    known = read_json(random_qwen / "config.json")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id")  # fmt: skip
    config = getattr(transformers, f"{architecture}Config")(**{name: known[name] for name in sizes}, head_dim=8)
    model = tmp_path / "model"
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(model)
    copy_tokenizer_files(random_qwen, model)

    assert sft(model=model).exit_code == 0
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(reference, tmp_path / "run" / "adapter").eval()
    report = read_json(tmp_path / "run" / "report.json")
    assert report["adapter"]["modules"] == dict.fromkeys(report["adapter"]["modules"], 2)
    assert len(report["adapter"]["modules"]) == 7
    tokenizer = load_tokenizer(model)
    prompt = torch.tensor([Encoder(tokenizer, PromptSettings()).prompt_ids([{"role": "user", "content": "Hi"}])])
    expected = adapted.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    answer = cli("infer", "--adapter", tmp_path / "run", "-p", "Hi", "--max-new-tokens", "8")
    assert answer.stdout == visible(tokenizer.decode(expected, skip_special_tokens=True)) + "\n"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_trains_and_answers_on_any_machine(
    cli: Callable[..., Result], rows_file: Path, tmp_path: Path, quantization: str
) -> None:
    result = cli(
        "sft", "--model.base", "tiny-qwen", "--model.quantization", quantization, "--data.train", rows_file,
        "--training.max_steps", "25", "--training.learning_rate", "5e-3", "--evaluation.every_steps", "5",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    validation = read_json(tmp_path / "run" / "report.json")["validation_loss"]
    assert validation["after"] < validation["before"]
    answer = cli("infer", "--adapter", tmp_path / "run", "--prompt", "How much is 3+3?")
    assert answer.stdout == "It is 6.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--lora.dropout", "0"], ["--lora.dropout", "0", "--no-training.packing"], ["--method", "full"]],
    ids=["packed", "padded", "all weights"],
)
def test_two_processes_train_what_one_trains(
    random_qwen: Path, rows_file: Path, tmp_path: Path, more: list[str]
) -> None:
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(ROWS[:1]))  # nothing is left for the second process
    flags = ["--model.base", str(random_qwen), "--model.dtype", "float32", "--data.train", str(rows_file),
             "--data.validation", str(odd), "--training.max_steps", "4",
             "--training.batch_size", "11", *more]  # fmt: skip
    one = [sys.executable, "-m", "loratune", "sft", *flags, "--output", str(tmp_path / "one")]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "loratune", "sft", *flags,
           "--training.tokens_per_pass", "80", "--output", str(tmp_path / "two")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (one, two):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    for figure in ("loss", "validation_loss", "exact_answers", "answers"):
        one_process, two_processes = (
            {m["step"]: m[figure] for m in metrics_of(tmp_path / name) if figure in m} for name in ("one", "two")
        )
        assert len(one_process) >= 2
        assert two_processes == pytest.approx(one_process, rel=1e-5)
    one_adapter, two_adapter = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    torch.testing.assert_close(two_adapter, one_adapter, rtol=1e-4, atol=1e-5)


def test_deterministic_kernels_are_used_in_steps_alone(
    sft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation and the closing answers may use any kernel."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: dict[str, set[bool]] = {"step": set(), "validation": set()}
    plain_loss, plain_sum = AdapterTrainer.compute_loss, AdapterTrainer._sums

    def compute_loss(self: Any, *arguments: Any, **settings: Any) -> Any:
        seen["step"].add(torch.are_deterministic_algorithms_enabled())
        return plain_loss(self, *arguments, **settings)

    def sum_loss(self: Any, steps: Any) -> Any:
        seen["validation"].add(torch.are_deterministic_algorithms_enabled())
        return plain_sum(self, steps)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(AdapterTrainer, "_sums", sum_loss)
    assert sft().exit_code == 0
    assert seen == {"step": {False}, "validation": {False}}
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    seen["step"].clear()
    assert sft("--training.deterministic", "--overwrite").exit_code == 0
    assert seen == {"step": {True}, "validation": {False}}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operator_without_a_deterministic_kernel_is_named(
    sft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has none for put_ on any device."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a user's own value stays
    plain_loss = AdapterTrainer.compute_loss

    def compute_loss(self: Any, *arguments: Any, **settings: Any) -> Any:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return plain_loss(self, *arguments, **settings)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    assert sft().exit_code == 0
    result = sft("--training.deterministic", "--overwrite")
    assert result.exit_code == Exit.USAGE
    assert "no deterministic kernel for put_" in " ".join(result.stderr.split())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--training.epochs", "2"], "only 6 steps of 4 rows"),
        (["--training.epochs", "2", "--training.batch_size", "99"], "only 2 steps of 11 rows"),
        (["--training.epochs", "4"], None),
        (["--training.max_steps", "2"], None),
    ],
    ids=str,
)
def test_a_run_of_few_steps_is_told(sft: Callable[..., Result], flags: list[str], told: str | None) -> None:
    said = " ".join(sft("--training.max_steps", "null", *flags).stderr.split())
    assert told in said if told else "the run has only" not in said


def spoil_at(monkeypatch: pytest.MonkeyPatch, step: int, with_what: Callable[[Any], None]) -> None:
    """Let something happen to the model at the end of a step."""
    from loratune.training.callbacks import Progress

    def on_step_end(self: TrainerCallback, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == step:
            with_what(model)

    monkeypatch.setattr(Progress, "on_step_end", on_step_end)


def spoil_weights(model: Any) -> None:
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def press_ctrl_c(_: Any) -> None:
    raise KeyboardInterrupt
