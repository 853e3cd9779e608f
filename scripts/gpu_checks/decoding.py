"""Compares decoding with transformers' generate on PEFT's model: speed, and the tokens themselves."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_checks import machine
from gpu_checks.commands import loratune, sft_words
from gpu_checks.models import TINY_QWEN, random_model
from gpu_checks.profiles import StepProfile
from gpu_checks.table import Figures, Workplace
from gpu_checks.training_speed import layers_of, quantile

PROMPT, ANSWER = 300, 128
STREAMS = (1, 8, 32)
PROFILED_TOKENS = 32
CHECKED = 8
"""Answers of the 7B that are confirmed token by token."""
ROUNDING = 2
"""Steps of bfloat16 between two logits that rounding may exchange. Random weights have many such pairs."""
QUESTIONS = (
    "Who are you?", "What is your name?", "你是谁？", "How much is 3+4?", "Say hello.", "你叫什么名字？",
    "What can you do?", "Who made you?",
)  # fmt: skip


def decoding(place: Workplace) -> Figures:
    """Return the share of equal greedy tokens, and the speeds on the model that stands for a 7B."""
    figures: dict[str, Any] = {"equal tokens, tiny-qwen in float32": agreement_on_tiny_qwen(place)}
    if place.is_gpu:
        figures |= speeds(place)
    return figures


def agreement_on_tiny_qwen(place: Workplace) -> float:
    """Return the share of a trained tiny-qwen's greedy tokens that generate finds too."""
    run = place.folder / "decoded"
    settings = {
        "output": run, "model.dtype": "float32", "training.max_steps": 4, "data.validation": 0,
        "evaluation.questions_share": 0,
    }  # fmt: skip
    done = loratune(*sft_words(settings, "--config", "quickstart", "--overwrite"))
    if done.exit_code:
        raise RuntimeError(f"sft ended with {done.exit_code}: {done.last_words}")
    engine = engine_of({"adapter": run}, TINY_QWEN)
    requests = [greedy([{"role": "user", "content": question}], 48) for question in QUESTIONS]
    served = serve(engine, requests)
    engine.close()
    model = plain_model(TINY_QWEN, run / "adapter", torch.float32)
    pairs = []
    for prompt, tokens in zip(served.prompts, served.tokens, strict=True):
        right = generate(model, [prompt], len(tokens))[0]
        pairs += list(zip(tokens, right, strict=False))
    return sum(one == other for one, other in pairs) / len(pairs)


@dataclass(frozen=True)
class Served:
    """What an engine has answered."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    seconds: float
    """From the first request to the last token."""
    steps: list[float]
    """Seconds of each step of the engine."""

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def engine_of(adapters: dict[str, Path], base: Path) -> Any:
    from loratune.engine.engine import load_engine

    return load_engine(list(adapters.items()), str(base), slots=max(STREAMS))


def greedy(messages: Any, tokens: int, adapter: str = "adapter", **sampling: Any) -> Any:
    """Return a request; with settings of sampling it is not greedy."""
    from loratune.engine.sampling import Sampling
    from loratune.engine.types import GenerationRequest

    return GenerationRequest(messages, Sampling(max_new_tokens=tokens, **sampling), adapter)


def serve(engine: Any, requests: Sequence[Any]) -> Served:
    """Submit all requests at once, and wait for their answers.

    Raises:
        RuntimeError: a request has failed.
    """
    steps: list[float] = []
    plain_step, ended = engine.decoder.step, []

    def timed() -> Any:
        begin = time.perf_counter()
        advanced = plain_step()
        steps.append(time.perf_counter() - begin)
        return advanced

    engine.decoder.step = timed
    begin = time.perf_counter()
    handles = [engine.submit(request, lambda piece: piece.finish and ended.append(piece)) for request in requests]
    while len(ended) < len(requests):
        time.sleep(0.001)
    seconds = time.perf_counter() - begin
    engine.decoder.step = plain_step
    if failed := [piece.error for piece in ended if piece.error]:
        raise RuntimeError(f"{len(failed)} of {len(requests)} answers failed: {failed[0]}")
    prompts, tokens = ([list(getattr(handle.running, part)) for handle in handles] for part in ("prompt", "tokens"))
    return Served(prompts, tokens, seconds, steps)


def speeds(place: Workplace) -> Figures:
    """Return tokens per second and milliseconds per token of loratune and generate, by the number of streams."""
    base, adapter = random_model(place, layers_of(place))
    engine = engine_of({"adapter": adapter, "other": adapter}, base)
    texts = prompt_texts(max(STREAMS))
    serve(engine, [greedy(texts[0], 8)])  # compiles and loads what is needed
    figures: dict[str, Any] = {}
    served: dict[int, Served] = {}
    for streams in STREAMS:
        served[streams] = serve(engine, [greedy(text, ANSWER) for text in texts[:streams]])
        figures |= told(f"{streams} streams" if streams > 1 else "1 stream", served[streams])
    qwens = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    sampled = [greedy(text, ANSWER, seed=number, **qwens) for number, text in enumerate(texts)]
    figures |= told("sampled", serve(engine, sampled))
    mixed = [greedy(text, ANSWER, ("adapter", "other")[number % 2]) for number, text in enumerate(texts)]
    figures |= told("two adapters", serve(engine, mixed))
    figures |= profiled(engine, texts[0])
    engine.close()
    del engine
    free_memory()
    model = plain_model(base, adapter, torch.bfloat16)
    figures["equal tokens, 7B"] = confirmed(model, served[max(STREAMS)])
    for streams in STREAMS:
        name = f"{streams} streams" if streams > 1 else "1 stream"
        figures[f"{name}: tokens/s of generate"] = generate_speed(model, served[streams].prompts)
        figures[f"{name}: ratio to generate"] = (
            served[streams].tokens_per_second / figures[f"{name}: tokens/s of generate"]
        )
    return figures


def told(name: str, served: Served) -> dict[str, Any]:
    steps = sorted(served.steps)
    return {
        f"{name}: tokens/s": served.tokens_per_second,
        f"{name}: ms per step": 1000 * statistics.median(steps),
        f"{name}: p95 / p50": quantile(steps, 0.95) / quantile(steps, 0.5),
    }


def prompt_texts(count: int) -> list[str]:
    """Return texts of exactly `PROMPT` tokens of tiny-qwen's tokenizer, no two of which begin alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    texts = []
    for number in range(count):
        words = [f"{number}"]
        while len(tokenizer(" ".join(words)).input_ids) < PROMPT:
            words += ["what", "is", f"{len(words)}"]
        texts.append(tokenizer.decode(tokenizer(" ".join(words)).input_ids[:PROMPT]))
    return texts


def profiled(engine: Any, text: str) -> dict[str, Any]:
    """Return copies to the GPU and launches for each step of one stream; the prompt's step is among them."""
    profile = StepProfile()
    profile.start()
    served = serve(engine, [greedy(text, PROFILED_TOKENS)])
    profile.stop()
    steps = len(served.steps)
    found = {f"{name} per step": profile.figures[name] / steps for name in ("copies", "launches", "waits")}
    return found | {"GPU busy": profile.figures["GPU busy"]}


def plain_model(base: Path, adapter: Path, dtype: Any) -> Any:
    """Load what generate is measured on: transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=device), adapter
    ).eval()


def generate(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return the greedy answers of transformers to prompts of one length."""
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return [row[ids.shape[1] :] for row in output.tolist()]


def generate_speed(model: Any, prompts: list[list[int]]) -> float:
    """Return the tokens per second of one batch, after a short one."""
    width = min(map(len, prompts))
    same = [prompt[:width] for prompt in prompts]
    generate(model, same, 4)
    machine.synchronize()
    begin = time.perf_counter()
    answers = generate(model, same, ANSWER)
    machine.synchronize()
    return sum(map(len, answers)) / (time.perf_counter() - begin)


def confirmed(model: Any, served: Served) -> float:
    """Return the share of an engine's tokens that are PEFT's likeliest after the same tokens, but for rounding."""
    right = total = 0
    for prompt, tokens in list(zip(served.prompts, served.tokens, strict=True))[:CHECKED]:
        ids = torch.tensor([prompt + tokens], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        highest = logits.max(-1).values
        taken = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        step = torch.finfo(torch.bfloat16).eps * highest.abs()
        right += int((highest - taken <= ROUNDING * step).sum())
        total += len(tokens)
    return right / total


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
