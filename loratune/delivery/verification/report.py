"""Describes a merge and its verification, for verification.json and for the user."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratune import console
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.runs.base_check import how_checked, known_hashes
from loratune.runs.card import base_name
from loratune.runs.folder import file_sha256

if TYPE_CHECKING:
    from loratune.delivery.merge.job import Candidate, Job


def described(job: Job, chosen: Candidate) -> dict[str, Any]:
    """Return the entries of verification.json about a merge, except for its verification."""
    return {
        "base": base_name(job.settings.base, str(job.base.absolute())),  # the folder may go to a hub: no local paths
        "base_checked": how_checked(known_hashes(job.source)),
        "quantization_in_training": job.settings.quantization,
        "merge_base": chosen.merge_base,
        "adapter_sha256": file_sha256(job.source.adapter / WEIGHTS_FILE),
        "combined": job.source.combined,
        "thinking": job.source.prompt.enable_thinking,
        "generation_prompt": job.source.prompt.generation_prompt,
        "date": job.source.prompt.date,
        "dtype": chosen.plan.dtype_names,
        "bytes": chosen.plan.nbytes,
        "read_back": asdict(chosen.read_back) if chosen.read_back else None,
        "warnings": [_without_paths(warning, job) for warning in job.warnings],
    }


def _without_paths(text: str, job: Job) -> str:
    """Replace local paths with their last parts, since the folder may be published."""
    for place in (job.base, job.source.adapter, job.source.run):
        for path in (place, place.absolute()) if place else ():
            text = text.replace(str(path), path.name)
    return text


BASE_CHECKED = {
    "every byte": "every byte of its weights compared with the trained one's",
    "sampled": "sampled: 4096 bytes of each tensor compared, since the run of an earlier version knows no more",
    "nothing": "not compared with the trained one, of which nothing is known",
}


def show_verification(report: dict[str, Any]) -> None:
    """Print the closing table of a merge."""
    rows = []
    if report["read_back"]:
        back = report["read_back"]
        rows += [
            ("files", f"{back['tensors']} tensors read back, {back['identical']} equal to the base's byte for byte"),
            (
                "changed",
                f"{back['updated']} tensors: all {back['rows']} rows are what PEFT's own merge makes of the base, "
                f"rounded once; {back['sampled_rows']} in float64 are at most {back['largest_error_steps']:.2f} "
                f"rounding steps off, and rounding takes {back['lost_to_rounding']:.1%} of the update",
            ),
        ]
    for name, values in (report["logits"] or {}).items():
        label = "logits" if len(report["logits"]) == 1 else name
        chosen = " ← taken" if len(report["logits"]) > 1 and name == report["merge_base"] else ""
        rows.append((label, f"{parity_text(**values)}{chosen}"))
    rows.append(("base", BASE_CHECKED[report.get("base_checked", "nothing")]))
    if report.get("without_adapter"):
        rows.append(("base alone", parity_text(**report["without_adapter"])))
    rows += [("beside", change) for change in report["changed_files"]]
    console.table(rows, title="verified" if report["verified"] != "nothing" else "NOT VERIFIED")
    if report["answers"]:
        console.table(_answer_rows(report["answers"]), title="answers, greedy")


def _answer_rows(answers: list[dict[str, str]]) -> list[tuple[str, str]]:
    rows = []
    for answer in answers:
        is_same = answer["adapter"] == answer["merged"]
        rows += [("question", answer["question"]), ("merged", answer["merged"])]
        rows.append(("base+adapter", "the same" if is_same else f"{answer['adapter']} …"))
    return rows


def parity_text(
    tokens: int, top1_agreement: float, mean_kl: float, largest_difference: float, largest_logit: float, **_: float
) -> str:
    """Format a comparison of logits as one line; the arguments are Parity's fields."""
    return (
        f"{tokens} tokens: same likeliest {top1_agreement:.2%}, mean KL {mean_kl:.1e}, largest difference "
        f"{largest_difference:.2g} of {largest_logit:.3g}"
    )
