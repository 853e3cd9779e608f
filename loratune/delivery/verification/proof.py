"""Whether a merged model says what base + adapter says: its logits against bounds, its answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.delivery.verification.parity import Parity, likeliest_tokens
from loratune.runs.probe import Probe, ProbeRow

ANSWER_TOKENS = 20


@dataclass(frozen=True)
class Bounds:
    """What rounding may do; a wrong merge is off by orders of magnitude.

    The share of equal likeliest tokens is no bound: where two are as likely, as everywhere in an untrained model, any
    rounding decides between them.
    """

    difference: float
    """Of logits, relative to the largest one."""
    mean_kl: float
    """nats."""
    clear_disagreement: float


# Measured on Qwen2.5 0.5B: bfloat16 0.005, 4e-5 and none; on random weights of 7B shapes 0.03 and 6e-4; into the plain
# base of an nf4 run 0.17 and 0.05; the base without its adapter 0.6, 1.7 and 40 %.
BOUNDS = {
    torch.float32: Bounds(1e-5, 1e-5, 0.0),
    torch.float16: Bounds(0.02, 3e-4, 0.005),
    torch.bfloat16: Bounds(0.1, 5e-3, 0.005),
}
# Mean KL that rounding may cause with any adapter; a merge that is further off must be nearer than the base.
ROUNDING_KL = {torch.float32: 1e-5, torch.float16: 6e-5, torch.bfloat16: 1e-3}
NEARER_THAN_BASE = 0.5
OTHER_BASE = Bounds(0.6, 0.3, 0.25)
"""For an adapter of a quantised base on the plain one: quantisation has an effect of its own."""


@dataclass(frozen=True)
class Answer:
    """The merged model's answer to a question, and where base + adapter would have gone another way."""

    question: str
    merged: str
    adapter: str
    """Up to its first other token; the merged model's text if there is none."""


def check_parity(parity: Parity, bounds: Bounds) -> list[str]:
    """What of a comparison is out of bounds."""
    tests = [
        (
            parity.largest_difference <= bounds.difference * max(1.0, parity.largest_logit),
            f"logits differ by {parity.largest_difference:.3g} where the largest is {parity.largest_logit:.3g}",
        ),
        (
            parity.mean_kl <= bounds.mean_kl,
            f"mean KL divergence {parity.mean_kl:.3g}, at most {bounds.mean_kl:g} allowed",
        ),
        (
            parity.clear_disagreement <= bounds.clear_disagreement,
            f"clearly another token is likeliest in {parity.clear_disagreement:.2%} of {parity.tokens}, at most "
            f"{bounds.clear_disagreement:.1%} allowed",
        ),
    ]
    return [message for is_within, message in tests if not is_within]


def relative_bounds(bounds: Bounds, dtype: torch.dtype, effect: Parity) -> Bounds:
    """Bounds no wider than the adapter's own effect asks for, so that one which does little is held as tightly.

    Args:
        bounds: of any adapter.
        dtype: the coarsest of the merged weights.
        effect: how far the base without its adapter is from base + adapter.
    """
    nearer = max(ROUNDING_KL[dtype], NEARER_THAN_BASE * effect.mean_kl)
    return replace(bounds, mean_kl=min(bounds.mean_kl, nearer))


def probe_rows(probe: Probe, encoder: Encoder) -> list[ProbeRow]:
    """The run's rows; without any, the questions themselves, each of whose tokens then counts."""
    if probe.rows:
        return probe.rows
    prompts = [encoder.prompt_ids(question) for question in probe.questions]  # type: ignore[arg-type]
    return [ProbeRow(ids, [IGNORED, *ids[1:]]) for ids in prompts]


def compare_answers(merged: Any, reference: Any, encoder: Encoder, probe: Probe) -> list[Answer]:
    """Let the merged model answer greedily, and base + adapter confirm each token of it.

    One pass of the reference over an answer shows whether it would have given the same; to let it answer by itself
    would take many times as long.

    Args:
        merged: the model as any program loads it.
        reference: base + adapter.
        encoder: makes the prompts.
        probe: the questions.
    """
    prompts = [encoder.prompt_ids(question) for question in probe.questions]  # type: ignore[arg-type]
    answers = _generate(merged, prompts, encoder)
    rows = [
        ProbeRow(prompt + answer, [IGNORED] * len(prompt) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    decode = encoder.tokenizer.decode
    confirmed = likeliest_tokens(reference, rows)
    found = []
    for question, answer, likeliest in zip(probe.questions, answers, confirmed, strict=True):
        same = next((place for place, token in enumerate(answer) if likeliest[place] != token), len(answer))
        text = decode(answer, skip_special_tokens=True)
        other = text if same == len(answer) else decode([*answer[:same], likeliest[same]], skip_special_tokens=True)
        found.append(Answer(question[-1]["content"], text, other))
    return found


def _generate(model: Any, prompts: Sequence[list[int]], encoder: Encoder) -> list[list[int]]:
    """Greedy answers, all prompts at once, each up to its end token."""
    longest = max(map(len, prompts))
    pad = encoder.end_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False,
            temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            eos_token_id=encoder.end_id, pad_token_id=pad,
        )  # fmt: skip
    answers = output[:, longest:].tolist()
    return [answer[: answer.index(pad) + 1] if pad in answer else answer for answer in answers]
