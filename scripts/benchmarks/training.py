"""`loratune sft` beside plain TRL on the same rows: tokens a second, memory, loss on rows that neither has seen."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import measure

# What a user gets from SFTTrainer with a LoraConfig and no further thought.
TRL = """
import json, sys, time
start = time.perf_counter()
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

folder, path, place, batch, epochs, max_length = sys.argv[1:]

class FirstStep(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        self.seconds = getattr(self, "seconds", time.perf_counter() - start)

def conversation(row):
    question = row["instruction"] + ("\\n" + row["input"] if row.get("input") else "")
    return {"prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}]}

first = FirstStep()
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
    args=SFTConfig(output_dir=place, per_device_train_batch_size=int(batch), num_train_epochs=float(epochs),
                   learning_rate=2e-4, max_length=int(max_length), lr_scheduler_type="cosine", logging_steps=1,
                   save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False,
                   gradient_checkpointing=False, seed=42, disable_tqdm=True),
    train_dataset=Dataset.from_list([conversation(row) for row in json.load(open(path, encoding="utf-8"))]),
    processing_class=AutoTokenizer.from_pretrained(folder),
    peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[first],
)
tokens = sum(map(len, trainer.train_dataset["input_ids"])) * float(epochs)
begin = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - begin
trainer.save_model(place)
print("FIGURES", json.dumps({"tokens": tokens, "seconds": seconds, "first_step": first.seconds}))
"""
# Nats per answer token on unseen rows, by PEFT and transformers alone, one row at a time.
SCORE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, path, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
if adapter != "none":
    model = PeftModel.from_pretrained(model, adapter)
model.eval()
loss, count = 0.0, 0
for row in json.load(open(path, encoding="utf-8")):
    question = row["instruction"] + ("\\n" + row["input"] if row.get("input") else "")
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(row["output"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    loss += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
    count += len(answer)
print("FIGURES", json.dumps({"nll": loss / count}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the subcommand."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows")
    parser.add_argument("--rows", type=int, default=64, help="trained on, from the beginning of the file")
    parser.add_argument("--unseen", type=int, default=40, help="scored, from the end of the file")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file for all figures")


def run(arguments: argparse.Namespace) -> None:
    """Train with both in turn, score both, print the table."""
    rows = json.loads(arguments.data.read_text(encoding="utf-8"))
    figures: dict[str, list[dict[str, float]]] = {"TRL": [], "loratune": []}
    with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
        train, unseen = Path(place) / "train.json", Path(place) / "unseen.json"
        train.write_text(json.dumps(rows[: arguments.rows]))
        unseen.write_text(json.dumps(rows[-arguments.unseen :]))
        for _ in range(arguments.runs):
            figures["TRL"].append(train_with_trl(arguments, train, Path(place) / "trl"))
            figures["loratune"].append(train_with_loratune(arguments, train, Path(place) / "loratune"))
        adapters = {"untrained": "none", "TRL": f"{place}/trl", "loratune": f"{place}/loratune/adapter"}
        score = {name: printed(SCORE, arguments.model, unseen, adapter)["nll"] for name, adapter in adapters.items()}
    print("| | tokens/s | resident peak | first step after | nll on unseen rows |\n|---|---|---|---|---|")
    for name, runs in figures.items():
        every = ", ".join(f"{one['tokens'] / one['seconds']:.0f}" for one in runs)
        peak = max(one["resident"] for one in runs) / 1e9
        print(f"| {name} | {every} | {peak:.1f} GB | {runs[-1]['first_step']:.0f} s | {score[name]:.4f} |")
    print(f"\nuntrained: {score['untrained']:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": figures, "nll": score}, indent=2))


def train_with_trl(arguments: argparse.Namespace, train: Path, place: Path) -> dict[str, float]:
    """Tokens without padding, seconds of train(), seconds until the first step is done, resident bytes."""
    return printed(
        TRL, arguments.model, train, place, arguments.batch, arguments.epochs, arguments.max_length
    )  # fmt: skip


def train_with_loratune(arguments: argparse.Namespace, train: Path, place: Path) -> dict[str, float]:
    """The same of a run of loratune."""
    flags = {
        "model.base": arguments.model, "data.train": train, "data.validation": 0, "lora.dropout": 0,
        "training.batch_size": arguments.batch, "training.gradient_accumulation": 1, "training.warmup": 0,
        "training.epochs": arguments.epochs, "training.max_length": arguments.max_length,
        "training.learning_rate": 2e-4, "data.too_long": "truncate_answer", "output": place,
    }  # fmt: skip
    command = [sys.executable, "-m", "loratune", "sft", "--overwrite"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    wall, resident, _ = measure(command)
    report = json.loads((place / "report.json").read_text())
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    in_steps = lines[-1]["seconds"]
    return {
        "tokens": report["tokens"],
        "seconds": in_steps,
        "first_step": wall - in_steps + lines[0]["seconds"],
        "resident": resident,
    }


def printed(code: str, *settings: object) -> dict[str, float]:
    """Figures that a program prints, and the resident memory that it took."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "output"
        _, resident, _ = measure([sys.executable, "-c", code, *map(str, settings)], log)
        line = next(line for line in log.read_text().splitlines() if line.startswith("FIGURES"))
    found: dict[str, float] = json.loads(line.removeprefix("FIGURES"))
    return found | {"resident": resident}
