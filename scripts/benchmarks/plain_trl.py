"""A typical training with TRL's SFTTrainer and a LoraConfig; prints its figures.

python plain_trl.py MODEL ROWS.json OUTPUT BATCH EPOCHS MAX_LENGTH none|nf4 [SETTING=VALUE …]

A SETTING is one of SFTConfig, or of LoraConfig if it is target_modules or begins with lora_; its value is written as
JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class FirstStep(TrainerCallback):
    """Measures the time from the start of the program, including imports, to the end of the first step."""

    seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = self.seconds or time.perf_counter() - STARTED


def conversation(row: dict[str, str]) -> dict[str, Any]:
    """Convert an Alpaca row to TRL's format, so that only the answer is trained."""
    question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def load(folder: str, quantization: str) -> Any:
    """Load the base, optionally in 4 bits."""
    if quantization == "none":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=nf4)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def main(
    folder: str, path: str, place: str, batch: str, epochs: str, max_length: str, quantization: str, *others: str
) -> None:
    chosen = {name: json.loads(value) for name, value in (other.split("=", 1) for other in others)}
    of_adapter = {name: value for name, value in chosen.items() if name.startswith(("lora_", "target_modules"))}
    settings = {"use_cpu": not torch.cuda.is_available(), "bf16": False, "gradient_checkpointing": False}
    settings |= {name: value for name, value in chosen.items() if name not in of_adapter}
    rows = [conversation(row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    first = FirstStep()
    trainer = SFTTrainer(
        model=load(folder, quantization),
        args=SFTConfig(
            output_dir=place,
            per_device_train_batch_size=int(batch),
            num_train_epochs=float(epochs),
            learning_rate=2e-4,
            max_length=int(max_length),
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=42,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=8,
            task_type="CAUSAL_LM",
            **{"lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"} | of_adapter,
        ),
        callbacks=[first],
    )
    tokens = sum(map(len, trainer.train_dataset["input_ids"])) * float(epochs)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.save_model(place)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print("FIGURES", json.dumps({
        "tokens": tokens, "seconds": seconds, "first_step": first.seconds, "losses": [float(loss) for loss in losses],
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
