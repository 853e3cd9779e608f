"""Generation with plain transformers: many prompts in batches, or one prompt up to its first token.

python plain_generate.py batches MODEL PROMPTS.jsonl BATCH TOKENS
python plain_generate.py first MODEL PROMPT
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: str) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()


def batches(folder: str, path: str, batch: str, tokens: str) -> None:
    """Answer all prompts greedily, and print the number of tokens, the seconds and the answers."""
    prompts = [json.loads(line)["prompt"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    tokenizer, model = load(folder)
    answers, made, start = [], 0, time.perf_counter()
    for place in range(0, len(prompts), int(batch)):
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts[place : place + int(batch)]]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
        made += sum(count_tokens(row.tolist(), model.generation_config.eos_token_id) for row in new)
    seconds = time.perf_counter() - start
    print("FIGURES", json.dumps({"tokens": made, "seconds": seconds, "answers": answers}))


def count_tokens(row: list[int], ends: Any) -> int:
    """Return the number of tokens of an answer, including its end token."""
    known = set(ends if isinstance(ends, list) else [ends])
    return next((place for place, token in enumerate(row, start=1) if token in known), len(row))


class FirstToken:
    """A streamer that prints the first new token only."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def put(self, ids: Any) -> None:
        """Receive the prompt, then each token."""
        self.calls += 1
        if self.calls == 2:
            sys.stdout.write(self.tokenizer.decode(ids.flatten()))
            sys.stdout.flush()

    def end(self) -> None:
        """Receive the end."""


def first(folder: str, prompt: str) -> None:
    tokenizer, model = load(folder)
    turns = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        model.generate(
            **inputs.to(model.device), max_new_tokens=4, do_sample=False, streamer=FirstToken(tokenizer)
        )  # fmt: skip


if __name__ == "__main__":
    {"batches": batches, "first": first}[sys.argv[1]](*sys.argv[2:])
