"""Takes the card's memory away, before commands start and while answers grow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gpu_checks import machine
from gpu_checks.commands import Finished, loratune, sft_words
from gpu_checks.models import random_model, write_rows
from gpu_checks.table import Figures, Workplace
from gpu_checks.training_speed import layers_of, shipped

FREE = 2e9
NO_ROOM = 6
"""Exit code of a command that has run out of memory."""
ADVICE = "out of memory"
LIMIT = 60
"""Seconds for a command, since a server that finds room would not end."""
SPARE = 200e6
CLIENTS, LONG_ANSWER, QUESTIONS = 24, 4000, 8
LAYERS = 4


def out_of_memory(place: Workplace) -> Figures:
    """Return how commands end without memory, and how many questions are answered after an answer has run out of it."""
    folder = place.folder / "out-of-memory"
    folder.mkdir(exist_ok=True)
    base, adapter = random_model(place, layers_of(place))
    with machine.only_free(FREE):
        ended = {name: loratune(*words, limit=LIMIT) for name, words in commands(folder, base, adapter).items()}
    failures, answered = answers_after_failure(*random_model(place, LAYERS))
    return {
        "exit codes": {name: done.exit_code for name, done in ended.items()},
        "said": {name: done.last_words for name, done in ended.items()},
        "unexplained failures": sum(not is_explained(name, done) for name, done in ended.items()),
        "answers without memory": failures,
        "answered afterwards": answered,
    }


def commands(folder: Path, base: Path, adapter: Path) -> dict[str, list[Any]]:
    """Return the command lines that load the whole model."""
    rows = write_rows(folder / "rows.json", [60, 70, 80, 90])
    given = ["--adapter", adapter, "--base-model", base]
    return {
        "sft": sft_words(shipped(base, rows) | {"output": folder / "run"}, "--config", "qwen7b", "--overwrite"),
        "infer": ["infer", *given, "--prompt", "Who are you?"],
        "serve": ["serve", *given, "--port", 0, "--no-api-key"],
        "merge": ["merge", *given, "--output", folder / "merged", "--overwrite"],
    }


def is_explained(name: str, done: Finished) -> bool:
    """Whether a command says what is wrong. A merge computes in main memory, where it may have room."""
    if name == "merge" and done.exit_code == 0:
        return True
    return done.exit_code == NO_ROOM and ADVICE in done.stderr and "Traceback" not in done.stderr


def answers_after_failure(base: Path, adapter: Path) -> tuple[int, int]:
    """Return how many long answers failed while no more memory could be had, and how many short ones came later.

    Raises:
        RuntimeError: none of the long ones failed, so that nothing was tested.
    """
    from loratune.engine.engine import load_engine

    engine = load_engine([("adapter", adapter)], str(base), slots=CLIENTS)
    try:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + SPARE) / total))
        failures = CLIENTS - ask(engine, CLIENTS, LONG_ANSWER)
        torch.cuda.set_per_process_memory_fraction(1.0)
        if not failures:
            raise RuntimeError("no answer ran out of memory")
        return failures, ask(engine, QUESTIONS, 16)
    finally:
        engine.close()


def ask(engine: Any, questions: int, tokens: int) -> int:
    """Ask all at once; return how many are answered to the end."""
    from loratune.engine.sampling import Sampling
    from loratune.engine.types import GenerationRequest

    def is_answered(number: int) -> bool:
        sampling = Sampling(max_new_tokens=tokens)
        request = GenerationRequest(f"{number} " + "word " * 200, sampling, "adapter")
        try:
            return any(piece.finish in ("stop", "length") for piece in engine.stream(request))
        except Exception:
            return False

    with ThreadPoolExecutor(questions) as pool:
        return sum(pool.map(is_answered, range(questions)))
