"""Upper bound of training speed: tokens per second of a model's frozen matrix products alone; prints its figures.

python product_rate.py MODEL TOKENS

Each product is timed separately on a batch of TOKENS: forward, and backward to the input. It excludes the head, whose
number of positions depends on the rows, attention, and the adapter.
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
    """Return (out, in) of the decoder's linear layers → their number."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = (module for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    return Counter(tuple(layer.weight.shape) for layer in layers)


def seconds_of(product: Callable[[], object], runs: int = 7) -> float:
    """Return the median of several runs after a warm-up."""
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
