"""Computes nats per answer token with PEFT and transformers alone, one row at a time; prints its figure.

python unseen_loss.py MODEL ROWS.json ADAPTER|none
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, path: str, adapter: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)
    if adapter != "none":
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    loss, count = 0.0, 0
    for row in json.loads(Path(path).read_text(encoding="utf-8")):
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer], device=device)).logits[0, len(prompt) - 1 : -1].float()
        targets = torch.tensor(answer, device=device)
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(answer)
    print("FIGURES", json.dumps({"nll": loss / count}))


if __name__ == "__main__":
    main(*sys.argv[1:])
