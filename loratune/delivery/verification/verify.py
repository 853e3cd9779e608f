"""The second half of a merge's proof, which needs transformers and PEFT: the models' comparison and the verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from loratune import console
from loratune.delivery.verification.parity import Parity, compare_models
from loratune.delivery.verification.proof import (
    BOUNDS,
    OTHER_BASE,
    Bounds,
    check_parity,
    compare_answers,
    probe_rows,
    relative_bounds,
)
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.reference import load_reference
from loratune.runs.probe import ProbeRow, read_probe

if TYPE_CHECKING:
    from loratune.delivery.merge.job import Candidate, Job

EFFECT_ROWS = 2
"""On which the base alone is run: enough for a mean over tokens, for one more reading of the base."""


def prove(job: Job, candidates: list[Candidate]) -> tuple[Candidate, dict[str, Any]]:
    """Compare the merged models with base + adapter, and choose the closer one.

    Args:
        job: what is merged.
        candidates: complete model folders.

    Returns:
        The one to keep, and what verification.json says of it.

    Raises:
        LoratuneError: it is not what base + adapter is.
    """
    with console.status("comparing with base + adapter"):
        encoder = job.encoder
        probe = read_probe(job.source.run)
        reference = load_reference(job.settings, job.base, job.source.adapter)
        models = [load_mapped(candidate.folder) for candidate in candidates]
        rows = probe_rows(probe, encoder)
        parities = compare_models(reference, models, rows)
        chosen, parity = min(zip(candidates, parities, strict=True), key=lambda pair: pair[1].mean_kl)
        effect = _effect(job, chosen, reference, rows)
        bounds = _bounds(job, chosen, effect)
        _require_within(parity, bounds)
        answers = compare_answers(load_mapped(chosen.folder, in_float32=False), reference, encoder, probe)
    return chosen, {
        "logits": {c.merge_base: asdict(p) for c, p in zip(candidates, parities, strict=True)},
        "compared_on": "the run's validation rows" if probe.rows else "built-in questions",
        "without_adapter": asdict(effect) if effect else None,
        "bounds": asdict(bounds),
        "answers": [asdict(answer) for answer in answers],
    }


def _effect(job: Job, chosen: Candidate, reference: Any, rows: list[ProbeRow]) -> Parity | None:
    """How far the base alone is from base + adapter; None where more than the adapter lies between them."""
    base_rows = chosen.files.infos[vocabulary_of(chosen.files.infos).embedding].shape[0]
    if job.settings.quantization != "none" or chosen.plan.vocabulary != base_rows:
        return None
    (effect,) = compare_models(reference, [load_mapped(job.base)], rows[:EFFECT_ROWS])
    return effect


def _bounds(job: Job, chosen: Candidate, effect: Parity | None) -> Bounds:
    if job.settings.quantization != "none" and chosen.merge_base == "original":
        return OTHER_BASE
    dtypes = {tensor.info.dtype for tensor in chosen.plan.tensors.values() if tensor.info.dtype in BOUNDS}
    if job.settings.quantization == "int8":
        dtypes.add(torch.bfloat16)  # bitsandbytes rounds what goes into a layer too
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return relative_bounds(BOUNDS[coarsest], coarsest, effect) if effect else BOUNDS[coarsest]


def _require_within(parity: Parity, bounds: Bounds) -> None:
    problems = check_parity(parity, bounds)
    if problems:
        raise LoratuneError(
            f"the merged model is not what base + adapter is:\n{bullet_list(problems)}\n"
            "please report this with the versions that `loratune --version` and pip list show",
            Exit.MODEL,
        )
