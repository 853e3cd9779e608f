"""Compares the merged models with base + adapter, and chooses between candidates; needs transformers and PEFT."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratune import console
from loratune.delivery.verification.noise import bounds_of_noise, in_rounded_state, noise_of
from loratune.delivery.verification.parity import InState, compare_models, compare_pairs
from loratune.delivery.verification.place import room_for, run_proof
from loratune.delivery.verification.proof import (
    EXACT,
    OTHER_BASE,
    check_parity,
    compare_answers,
    probe_rows,
)
from loratune.delivery.verification.routes import Routes
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.architecture.roles import expert_stacks, quantised_matrices
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.files import weight_files
from loratune.model.hardware import Hardware
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.reference import load_reference
from loratune.model.weights.rounding import Rounding, tensor_modules
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel
from loratune.runs.probe import ProbeRow, read_probe
from loratune.runs.verification import Bounds, ModelProof, Parity

if TYPE_CHECKING:
    from loratune.delivery.merge.job import Candidate, Job

REPORT = "please report this with the versions that `loratune --version` and pip list show"
OTHER_BASE_ADVICE = (
    "the run trained on the quantised base, and the original one is too far from it for this adapter; --merge-base "
    "auto takes the closer"
)

NO_BASE_ADVICE = (
    "on either base some logits are far from what was trained (mean KL {figures}), and this one is the closer. No "
    "merged model rounds the inputs of layers to 8 bits, as LLM.int8 does. Train with model.quantization none or nf4; "
    "or merge with --merge-base dequantized, whose weights are those of the training, and compare its answers"
)


def prove(job: Job, candidates: list[Candidate]) -> tuple[Candidate, ModelProof]:
    """Compare the merged models with base + adapter, and choose the closer one.

    Args:
        job: the merge.
        candidates: complete model folders.

    Returns:
        The one to keep, and what running it has shown.

    Raises:
        LoratuneError: it differs from base + adapter.
    """
    with console.status("comparing with base + adapter"):
        (chosen, proof), computed_on = run_proof(functools.partial(_prove_on, job, candidates))
    return chosen, replace(proof, computed_on=computed_on)


def _prove_on(job: Job, candidates: list[Candidate], hardware: Hardware) -> tuple[Candidate, ModelProof]:
    probe = read_probe(job.source.run)
    rows = probe_rows(probe, job.encoder)
    reference = load_reference(job.settings, job.base, job.source.adapter, hardware)
    compared = _compare(job, candidates, reference, rows, hardware)
    chosen = min(compared, key=lambda one: one.parity.mean_kl)
    bounds, noise = _require_right(job, chosen, [one for one in compared if one is not chosen])
    effect = _effect(job, chosen.candidate, reference, rows, hardware)
    folder = chosen.candidate.folder
    merged = load_mapped(folder, in_float32=False, device=room_for(folder, hardware))
    undecided = bounds.difference * max(1.0, chosen.exact.largest_logit)
    answers = compare_answers(merged, reference, job.encoder, probe, undecided)
    return chosen.candidate, ModelProof(
        verified="files and logits",
        logits={one.candidate.merge_base: one.parity for one in compared},
        logits_with_rounding={one.candidate.merge_base: one.exact for one in compared},
        compared_on="the run's validation rows" if probe.rows else "built-in questions",
        without_adapter=effect,
        bounds=bounds,
        noise=noise or None,
        answers=tuple(answers),
    )


@dataclass(frozen=True)
class _Compared:
    candidate: Candidate
    parity: Parity
    """Difference from base + adapter."""
    exact: Parity
    """Difference from base + adapter with the rounding errors of the merged weights, and without those of LLM.int8,
    which also rounds the inputs of layers."""
    noise: Callable[[], tuple[Parity, ...]]
    """Measures what rounding alone does to base + adapter."""


def _compare(
    job: Job, candidates: list[Candidate], reference: CausalModel, rows: list[ProbeRow], hardware: Hardware
) -> list[_Compared]:
    merged = [load_mapped(candidate.folder, device=hardware.device) for candidate in candidates]
    roundings = [_roundings(job, candidate) for candidate in candidates]
    routes = [Routes() for _ in candidates]
    noted = [InState(model, route.noted) for model, route in zip(merged, routes, strict=True)]
    rounded = [in_rounded_state(reference, own, route) for own, route in zip(roundings, routes, strict=True)]
    count = len(candidates)
    with_reference = [(0, 1 + place) for place in range(count)]
    with_rounded = [(1 + count + place, 1 + place) for place in range(count)]
    found = compare_pairs([reference, *noted, *rounded], with_reference + with_rounded, rows)
    return [
        _Compared(candidate, parity, exact, functools.partial(noise_of, reference, model, own, rows))
        for candidate, parity, exact, model, own in zip(
            candidates, found[:count], found[count:], merged, roundings, strict=True
        )
    ]


def _require_right(job: Job, chosen: _Compared, others: Sequence[_Compared] = ()) -> tuple[Bounds, tuple[Parity, ...]]:
    """Refuse a merged model that is out of bounds.

    Args:
        job: the merge.
        chosen: the closest merged model.
        others: those on other bases.

    Returns:
        The bounds with the rounding errors, and the noise that they follow from; without any, they are the usual ones.
    """
    if job.settings.quantization != "none" and chosen.candidate.merge_base == "original":
        figures = " and ".join(f"{one.parity.mean_kl:.2g} {one.candidate.merge_base}" for one in (chosen, *others))
        advice = NO_BASE_ADVICE.format(figures=figures) if others else OTHER_BASE_ADVICE
        _require_within(chosen.parity, OTHER_BASE, advice)
    bounds, noise = EXACT, tuple[Parity, ...]()
    if check_parity(chosen.exact, EXACT):
        noise = chosen.noise()
        bounds = bounds_of_noise(noise)
    _require_within(chosen.exact, bounds)
    return bounds, noise


def _roundings(job: Job, candidate: Candidate) -> dict[str, Rounding]:
    """Return how each parameter of the reference was rounded in a merged model; unrounded ones are left out.

    Args:
        job: the merge, whose reference computes with quantised weights if the training did.
        candidate: the merged model; its files have been verified.
    """
    files, tensors, changes = candidate.files, candidate.plan.tensors, candidate.peft.changes if candidate.peft else {}
    vocabulary, merged = vocabulary_of(files.infos), TensorFiles(weight_files(candidate.folder))
    quantised = quantised_matrices(job.model) if job.settings.quantization != "none" else set()
    stacks = set(expert_stacks(job.model)) if job.settings.quantization == "nf4" else set()
    found = {}
    for parameter in tensor_modules(job.model):
        places = job.layout.places(parameter, files.infos)
        held = places[0].tensor
        written = tensors[vocabulary.embedding if held == vocabulary.head and candidate.plan.is_tied else held].info
        plain = files.infos[vocabulary.embedding if held not in files.infos else held]
        rounding = Rounding(written.dtype)
        if len(places) == 1:
            rounding = replace(rounding, change=changes.get(held), found=merged.tensor(written.name))
        if parameter in stacks and candidate.merge_base == "original":
            original = functools.partial(job.layout.matrix, parameter, files=files)
            found[parameter] = replace(rounding, original_matrix=original)
        elif parameter in quantised and candidate.merge_base == "original":
            found[parameter] = replace(rounding, original=files.tensor(held))
        elif parameter in quantised | stacks:
            found[parameter] = replace(rounding, held_as=plain.dtype)
        elif written.dtype != plain.dtype or any(place.tensor in changes for place in places):
            found[parameter] = rounding
    return found


def _effect(
    job: Job, chosen: Candidate, reference: CausalModel, rows: list[ProbeRow], hardware: Hardware
) -> Parity | None:
    """How far the base alone is from base + adapter; None where more than the adapter lies between them."""
    base_rows = chosen.files.infos[vocabulary_of(chosen.files.infos).embedding].shape[0]
    if job.settings.quantization != "none" or chosen.plan.vocabulary != base_rows:
        return None
    (effect,) = compare_models(reference, [load_mapped(job.base, device=hardware.device)], rows)
    return effect


def _require_within(parity: Parity, bounds: Bounds, advice: str = REPORT) -> None:
    problems = check_parity(parity, bounds)
    if problems:
        raise LoratuneError(
            f"the merged model is not what base + adapter is:\n{bullet_list(problems)}\n{advice}",
            Exit.MODEL,
        )
