"""A typical training with unsloth and TRL's SFTTrainer; for machines where unsloth is installed.

python plain_unsloth.py MODEL ROWS.json OUTPUT BATCH STEPS MAX_LENGTH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  it patches TRL and transformers, so it comes first
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(folder: str, path: str, place: str, batch: str, steps: str, max_length: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=int(max_length), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, target_modules=TARGETS, lora_alpha=16, lora_dropout=0.05)
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in rows
    ]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in turns]
    SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=place,
            per_device_train_batch_size=int(batch),
            max_steps=int(steps),
            max_length=int(max_length),
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
