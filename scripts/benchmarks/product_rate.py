"""Tokens per second if a model's frozen matrix products were all that training took; prints its figures.

python product_rate.py MODEL TOKENS

Each product is timed by itself on a batch of TOKENS, as training needs it: forward, and backward to the input. The
head is not among them: how many positions it sees depends on the rows. Nor are attention and the adapter.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import matmul

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def shapes(folder: str) -> Counter[tuple[int, int]]:
    """(out, in) of each linear layer of the decoder → how many there are."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = (module for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    return Counter(tuple(layer.weight.shape) for layer in layers)


def seconds_of(product: Callable[[], object], runs: int = 7) -> float:
    """The median of some runs, after one that does not count."""
    product()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        product()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(folder: str, batch_tokens: str) -> None:
    """Time every shape once."""
    tokens, seconds, operations = int(batch_tokens), 0.0, 0
    for (out, width), count in shapes(folder).items():
        weight = torch.randn(out, width, dtype=torch.bfloat16)
        inputs = torch.randn(tokens, width, dtype=torch.bfloat16)
        gradients = torch.randn(tokens, out, dtype=torch.bfloat16)
        seconds += count * (
            seconds_of(partial(matmul, inputs, weight.T)) + seconds_of(partial(matmul, gradients, weight))
        )
        operations += count * 4 * tokens * out * width
    print("FIGURES", json.dumps({"tokens_per_second": tokens / seconds, "tflops": operations / seconds / 1e12}))


if __name__ == "__main__":
    main(*sys.argv[1:])
