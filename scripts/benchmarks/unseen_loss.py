"""Computes nats per token with PEFT and transformers alone, one row at a time; prints a figure for each file.

python unseen_loss.py MODEL ADAPTER|none ROWS.json ...

The tokens are those of the answers to Alpaca rows, and all but the first of rows that have only a "text".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT_TOKENS = 160
"""Tokens of a text that are read."""


def main(folder: str, adapter: str, *paths: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)
    if adapter != "none":
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    rows = {path: json.loads(Path(path).read_text(encoding="utf-8")) for path in paths}
    print("FIGURES", json.dumps({"nll": [mean_loss(model, tokenizer, some) for some in rows.values()]}))


def mean_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    loss, count = 0.0, 0
    for row in rows:
        before, scored = prompt_and_answer(tokenizer, row)
        with torch.no_grad():
            ids = torch.tensor([before + scored], device=model.device)
            logits = model(ids).logits[0, len(before) - 1 : -1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[0, len(before) :], reduction="sum").item()
        count += len(scored)
    return loss / count


def prompt_and_answer(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Return the ids before the scored ones, and the scored ones."""
    if "text" in row:
        ids = tokenizer(row["text"], add_special_tokens=False).input_ids[:TEXT_TOKENS]
        return ids[:1], ids[1:]
    question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return prompt, [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]


if __name__ == "__main__":
    main(*sys.argv[1:])
