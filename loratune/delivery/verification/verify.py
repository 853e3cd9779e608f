"""Compares the merged models with base + adapter, and chooses between candidates; needs transformers and PEFT."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune import console
from loratune.delivery.verification.noise import all_of, bounds_of_noise, input_noise_of, noise_of
from loratune.delivery.verification.parity import InState, compare_models, compare_pairs
from loratune.delivery.verification.proof import (
    EXACT,
    INT8,
    OTHER_BASE,
    check_parity,
    compare_answers,
    probe_rows,
)
from loratune.delivery.verification.routes import Routes
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.architecture.roles import quantised_matrices
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.reference import load_reference
from loratune.model.weights.rounding import Rounding, rounded_as, tensor_modules
from loratune.protocols import CausalModel
from loratune.runs.probe import ProbeRow, read_probe
from loratune.runs.verification import Bounds, ModelProof, Parity

if TYPE_CHECKING:
    from loratune.delivery.merge.job import Candidate, Job


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
        probe = read_probe(job.source.run)
        rows = probe_rows(probe, job.encoder)
        reference = load_reference(job.settings, job.base, job.source.adapter)
        compared = _compare(job, candidates, reference, rows)
        chosen = min(compared, key=lambda one: one.parity.mean_kl)
        bounds, noise = _require_right(job, chosen)
        effect = _effect(job, chosen.candidate, reference, rows)
        merged = load_mapped(chosen.candidate.folder, in_float32=False)
        answers = compare_answers(merged, reference, job.encoder, probe)
    return chosen.candidate, ModelProof(
        verified="files and logits",
        logits={one.candidate.merge_base: one.parity for one in compared},
        logits_with_rounding={one.candidate.merge_base: one.exact for one in compared if one.exact},
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
    exact: Parity | None
    """Difference from base + adapter with the rounding errors of the merged weights; None for LLM.int8, which also
    rounds activations."""
    noise: Callable[[], tuple[Parity, ...]]
    """Measures what rounding alone does to base + adapter."""


def _compare(job: Job, candidates: list[Candidate], reference: CausalModel, rows: list[ProbeRow]) -> list[_Compared]:
    merged = [load_mapped(candidate.folder) for candidate in candidates]
    if job.settings.quantization == "int8":
        parities = compare_models(reference, merged, rows)
        noise = functools.partial(input_noise_of, reference, rows)
        return [_Compared(*two, None, noise) for two in zip(candidates, parities, strict=True)]
    roundings = [_roundings(job, candidate) for candidate in candidates]
    routes = [Routes() for _ in candidates]
    noted = [InState(model, route.noted) for model, route in zip(merged, routes, strict=True)]
    rounded = [
        InState(reference, all_of(functools.partial(rounded_as, reference, own), route.follower()))
        for own, route in zip(roundings, routes, strict=True)
    ]
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


def _require_right(job: Job, chosen: _Compared) -> tuple[Bounds, tuple[Parity, ...]]:
    """Refuse a merged model that is out of bounds.

    Returns:
        The tightest bounds that were applied, and the noise that they follow from; without any, they are constants.
    """
    is_other_base = job.settings.quantization != "none" and chosen.candidate.merge_base == "original"
    if is_other_base:
        _require_within(chosen.parity, OTHER_BASE)
    if is_other_base and not chosen.exact:
        return OTHER_BASE, ()
    bounds, parity, noise = EXACT if chosen.exact else INT8, chosen.exact or chosen.parity, tuple[Parity, ...]()
    if check_parity(parity, bounds):
        noise = chosen.noise()
        bounds = bounds_of_noise(noise, bounds)
    _require_within(parity, bounds)
    return bounds, noise


def _roundings(job: Job, candidate: Candidate) -> dict[str, Rounding]:
    """Return how each parameter of the reference was rounded in a merged model; unrounded ones are left out.

    Args:
        job: the merge, whose reference computes with quantised weights if the training did.
        candidate: the merged model; its files have been verified.
    """
    files, tensors, changes = candidate.files, candidate.plan.tensors, candidate.peft.changes if candidate.peft else {}
    vocabulary = vocabulary_of(files.infos)
    quantised = quantised_matrices(job.model) if job.settings.quantization != "none" else set()
    found = {}
    for parameter in tensor_modules(job.model):
        places = job.layout.places(parameter, files.infos)
        held = places[0].tensor
        written = tensors[vocabulary.embedding if held == vocabulary.head and candidate.plan.is_tied else held].info
        plain = files.infos[vocabulary.embedding if held not in files.infos else held]
        if parameter in quantised and candidate.merge_base == "original":
            found[parameter] = Rounding(written.dtype, changes.get(held), original=files.tensor(held))
        elif parameter in quantised:
            found[parameter] = Rounding(written.dtype, changes.get(held), held_as=plain.dtype)
        elif written.dtype != plain.dtype or any(place.tensor in changes for place in places):
            found[parameter] = Rounding(written.dtype, changes.get(held) if len(places) == 1 else None)
    return found


def _effect(job: Job, chosen: Candidate, reference: CausalModel, rows: list[ProbeRow]) -> Parity | None:
    """How far the base alone is from base + adapter; None where more than the adapter lies between them."""
    base_rows = chosen.files.infos[vocabulary_of(chosen.files.infos).embedding].shape[0]
    if job.settings.quantization != "none" or chosen.plan.vocabulary != base_rows:
        return None
    (effect,) = compare_models(reference, [load_mapped(job.base)], rows)
    return effect


def _require_within(parity: Parity, bounds: Bounds) -> None:
    problems = check_parity(parity, bounds)
    if problems:
        raise LoratuneError(
            f"the merged model is not what base + adapter is:\n{bullet_list(problems)}\n"
            "please report this with the versions that `loratune --version` and pip list show",
            Exit.MODEL,
        )
