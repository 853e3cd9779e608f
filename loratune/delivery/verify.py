"""The second half of a merge, which needs transformers and PEFT: side files, the models' comparison, the verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from loratune import console
from loratune.data.encoding import Encoder
from loratune.delivery.model_folder import write_model_files
from loratune.delivery.parity import Parity, compare_models
from loratune.delivery.proof import BOUNDS, OTHER_BASE, Answer, Bounds, check_parity, compare_answers, probe_rows
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.base import load_tokenizer
from loratune.model.mapped import load_mapped
from loratune.model.reference import load_reference
from loratune.runs.card import write_merged_card
from loratune.runs.probe import read_probe

if TYPE_CHECKING:
    from loratune.delivery.merge import Candidate, Job


def complete_and_prove(job: Job, candidates: list[Candidate]) -> tuple[Candidate, dict[str, Any]]:
    """Write what stands beside the weights, compare the models, and choose the closer one.

    Args:
        job: what is merged.
        candidates: the written weights.

    Returns:
        The one to keep, and what verification.json says of it.

    Raises:
        LoratuneError: it is not what base + adapter is.
    """
    tokenizer = job.source.tokenizer_folder(job.base)
    encoder = Encoder(load_tokenizer(tokenizer), job.source.prompt)
    for candidate in candidates:
        dtype, is_tied = job.options.dtype, candidate.plan.is_tied
        changes = write_model_files(encoder, tokenizer, job.base, candidate.folder, dtype, is_tied)
        write_merged_card(candidate.folder, "Merged model", job.settings.base, str(job.base.absolute()))
    _check_updates_survived(job, candidates[0])
    proof: dict[str, Any] = {"changed_files": changes, "verified": _extent(job), "logits": None, "answers": None}
    if not (job.options.verify and job.options.logits):
        return candidates[0], proof
    with console.status("comparing with base + adapter"):
        probe = read_probe(job.source.run)
        reference = load_reference(job.settings, job.base, job.source.adapter)
        models = [load_mapped(candidate.folder) for candidate in candidates]
        parities = compare_models(reference, models, probe_rows(probe, encoder))
        _, chosen, parity = min(
            zip([p.mean_kl for p in parities], candidates, parities, strict=True), key=lambda x: x[0]
        )
        bounds = _bounds(job, chosen)
        _require_within(parity, bounds)
        answers = compare_answers(load_mapped(chosen.folder, in_float32=False), reference, encoder, probe)
    return chosen, proof | {
        "logits": {c.merge_base: asdict(p) for c, p in zip(candidates, parities, strict=True)},
        "compared_on": "the run's validation rows" if probe.rows else "built-in questions",
        "bounds": asdict(bounds),
        "answers": [asdict(answer) for answer in answers],
    }


def _extent(job: Job) -> str:
    if not job.options.verify:
        return "nothing"
    return "files and logits" if job.options.logits else "files"


def _bounds(job: Job, chosen: Candidate) -> Bounds:
    if job.settings.quantization != "none" and chosen.merge_base == "original":
        return OTHER_BASE
    dtypes = {tensor.info.dtype for tensor in chosen.plan.tensors.values() if tensor.info.dtype in BOUNDS}
    if job.settings.quantization == "int8":
        dtypes.add(torch.bfloat16)  # bitsandbytes rounds what goes into a layer too
    return BOUNDS[max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)]


def _require_within(parity: Parity, bounds: Bounds) -> None:
    problems = check_parity(parity, bounds)
    if problems:
        raise LoratuneError(
            f"the merged model is not what base + adapter is, and has been removed:\n{bullet_list(problems)}\n"
            "please report this with the versions that `loratune --version` and pip list show",
            Exit.MODEL,
        )


def _check_updates_survived(job: Job, candidate: Candidate) -> None:
    """Refuse a merge that leaves everything as it was; tell of tensors whose update was too small to hold."""
    if candidate.read_back is None or not candidate.read_back.unchanged:
        return
    unchanged, updated = candidate.read_back.unchanged, candidate.read_back.updated
    message = (
        f"{len(unchanged)} of {updated} tensors that the adapter changes still equal the base's: the change is "
        f"zero, or too small for {unchanged[0]} and its type"
    )
    if len(unchanged) == updated and not job.options.force:
        raise LoratuneError(
            f"{message}. The merged model would be the base itself; was the adapter trained? --dtype float32 keeps "
            "small changes, --force merges as it is",
            Exit.MODEL,
        )
    console.warn(message)
    job.warnings.append(message)


def show_verification(report: dict[str, Any]) -> None:
    """The closing table of a merge."""
    rows = []
    if report["read_back"]:
        back = report["read_back"]
        rows += [
            ("files", f"{back['tensors']} tensors read back, {back['identical']} equal to the base's byte for byte"),
            (
                "changed",
                f"{back['updated']} tensors, {back['sampled_rows']} rows computed again in float64: off by at most "
                f"{back['largest_error_steps']:.2f} rounding steps (0.5 is rounding once)",
            ),
        ]
    for name, values in (report["logits"] or {}).items():
        parity = Parity(**values)
        label = "logits" if len(report["logits"]) == 1 else name
        chosen = " ← taken" if len(report["logits"]) > 1 and name == report["merge_base"] else ""
        rows.append((label, f"{parity}{chosen}"))
    rows += [("beside", change) for change in report["changed_files"]]
    console.table(rows, title="verified" if report["verified"] != "nothing" else "NOT VERIFIED")
    if report["answers"]:
        console.table(_answer_rows([Answer(**values) for values in report["answers"]]), title="answers, greedy")


def _answer_rows(answers: list[Answer]) -> list[tuple[str, str]]:
    rows = []
    for answer in answers:
        rows += [("question", answer.question), ("merged", answer.merged)]
        rows.append(("base+adapter", "the same" if answer.adapter == answer.merged else f"{answer.adapter} …"))
    return rows
