"""Checks logits of a merged model against bounds, and its answers against base + adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.delivery.verification.parity import likeliest_tokens
from loratune.model.weights.mapped import device_of
from loratune.protocols import CausalModel
from loratune.runs.probe import Probe, ProbeRow
from loratune.runs.verification import Answer, Bounds, Parity

ANSWER_TOKENS = 20


EXACT = Bounds(difference=3e-5, mean_kl=1e-6, clear_disagreement=0.0)
"""For two equivalent computations in float32, which differ by 1e-7 to 3e-6 of the largest logit."""
OTHER_BASE = Bounds(0.6, 0.3, 0.25)
"""For an adapter of a quantised base on the plain base: the difference includes the effect of quantisation."""
NOTICED = 0.1
"""Rounding error, relative to the adapter's effect (mean KL), above which there is a warning."""


def check_parity(parity: Parity, bounds: Bounds) -> list[str]:
    """Return the violations of the bounds."""
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


def probe_rows(probe: Probe, encoder: Encoder) -> list[ProbeRow]:
    """Return the run's rows; without any, the prompts, of which every token counts."""
    if probe.rows:
        return probe.rows
    prompts = [encoder.prompt_ids(question) for question in probe.questions]  # type: ignore[arg-type]
    return [ProbeRow(ids, [IGNORED, *ids[1:]]) for ids in prompts]


def compare_answers(
    merged: CausalModel, reference: CausalModel, encoder: Encoder, probe: Probe, undecided: float
) -> list[Answer]:
    """Let the merged model answer greedily, and base + adapter confirm each token of it.

    One forward pass of the reference over an answer is enough; generating with it would take many times as long.

    Args:
        merged: the model as any program loads it.
        reference: base + adapter.
        encoder: renders the prompts.
        probe: the prompts.
        undecided: difference of two of the reference's logits up to which rounding in float32 decides which is larger;
            either token is its answer then.
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
        same = next((place for place, one in enumerate(likeliest) if one.lead > undecided), len(answer))
        text, lead = decode(answer, skip_special_tokens=True), 0.0
        other = text
        if same < len(answer):
            other = decode([*answer[:same], likeliest[same].token], skip_special_tokens=True)
            lead = likeliest[same].lead
        ended = answer[-1] == encoder.end_id
        found.append(Answer(question[-1]["content"], text, other, len(answer), same, lead, ended))
    return found


def _generate(model: CausalModel, prompts: Sequence[list[int]], encoder: Encoder) -> list[list[int]]:
    """Greedy answers, all prompts at once, each up to its end token."""
    longest = max(map(len, prompts))
    pad = encoder.end_id
    device = device_of(model)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False,
            temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            eos_token_id=encoder.end_id, pad_token_id=pad,
        )  # fmt: skip
    answers = output[:, longest:].tolist()
    return [answer[: answer.index(pad) + 1] if pad in answer else answer for answer in answers]
