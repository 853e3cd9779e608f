"""By how much a trial's adapter raises the loss of the bundled passages, as `loratune eval` measures it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from loratune.engine.engine import load_engine
from loratune.generation.general_texts import load_passages, read_passages


@dataclass(frozen=True)
class Forgetting:
    """Language → rise of the loss, mean over its passages."""

    nats_per_token: Mapping[str, float]
    bits_per_byte: Mapping[str, float]


def measure_forgetting(run: Path) -> Forgetting:
    """Read the bundled passages with a run's adapter and without it.

    Raises:
        LoratuneError: the model cannot be loaded.
        ValueError: its numbers overflow.
    """
    tokens, size = dict[str, list[float]](), dict[str, list[float]]()
    with closing(load_engine([(run.name, run)], None)) as engine:
        for passage, found in read_passages(engine, run.name, load_passages()):
            if not math.isfinite(found.loss - found.base_loss):
                raise ValueError(f"the loss of general passage {passage.number} is not a finite number")
            if found.tokens:
                rise = found.loss - found.base_loss
                tokens.setdefault(passage.language, []).append(rise / found.tokens)
                size.setdefault(passage.language, []).append(rise / (len(passage.text.encode()) * math.log(2)))
    nats, bits = ({language: fmean(rises) for language, rises in one.items()} for one in (tokens, size))
    return Forgetting(nats, bits)
