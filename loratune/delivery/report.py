"""What a merge is about to do, what it has proved, and what its folder says of it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune import console
from loratune.delivery.merged_weights import MergePlan
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter_files import WEIGHTS_FILE
from loratune.runs.base_check import how_checked, known_hashes
from loratune.runs.card import base_name
from loratune.runs.folder import file_sha256, read_json

if TYPE_CHECKING:
    from loratune.delivery.merge import Candidate, Job

SIDE_FILES_BYTES = 30_000_000
LIBRARIES_BYTES, PROOF_LIBRARIES_BYTES = 250_000_000, 250_000_000
"""What torch takes by itself, and what transformers, PEFT and two tokenizers add."""


def announce(job: Job, candidates: list[Candidate], output: Path) -> None:
    """Say what is about to happen and what it takes; stop if the disk has no room for it."""
    plan = candidates[0].plan
    needed = sum(candidate.plan.nbytes for candidate in candidates) + SIDE_FILES_BYTES
    free = shutil.disk_usage(candidates[0].folder).free
    files = len(plan.shards)
    place = "a temporary folder" if job.options.stands_in_for else output
    console.table(
        [
            ("adapter", f"{job.source.adapter}: changes {len(plan.updated)} of {len(plan.tensors)} tensors"),
            ("base", f"{job.settings.base}, {_dtype_names(plan)}"),
            ("into", " and ".join(f"the {candidate.merge_base} base" for candidate in candidates)),
            ("writes", f"{console.memory(plan.nbytes)} in {files} file{'s' if files > 1 else ''} to {place}"),
            ("disk", f"{console.memory(needed)} needed, {console.memory(free)} free"),
            ("memory", f"at most {console.memory(_memory_bound(job, candidates))}"),
        ],
        title="merge",
    )
    for warning in job.warnings:
        console.warn(warning)
    if needed > free:
        raise LoratuneError(
            f"{output}: the merged model needs {console.memory(needed)} of disk and {console.memory(free)} are free; "
            "make room, or choose another disk with --output",
            Exit.IO,
        )


def _memory_bound(job: Job, candidates: list[Candidate]) -> int:
    """Bytes that the process will hold, pages of mapped files aside, which the system takes back when it needs them."""
    config = read_json(job.base / "config.json")
    bound = LIBRARIES_BYTES + PROOF_LIBRARIES_BYTES + (job.source.adapter / WEIGHTS_FILE).stat().st_size
    if job.options.verify and job.options.logits:
        activations = 40_000 * int(config["intermediate_size"])
        logits = 32 * 4 * 7 * int(config["vocab_size"])
        bound += activations + logits
    if job.settings.quantization != "none":  # the live model, its embedding in float32
        bound += candidates[0].plan.nbytes
    return bound


def _dtype_names(plan: MergePlan) -> str:
    names = dict.fromkeys(str(tensor.info.dtype).removeprefix("torch.") for tensor in plan.tensors.values())
    return " and ".join(names)


def described(job: Job, chosen: Candidate) -> dict[str, Any]:
    """What verification.json says of a merge, its proof aside."""
    return {
        "base": base_name(job.settings.base, str(job.base.absolute())),  # the folder may go to a hub: no local paths
        "base_checked": how_checked(known_hashes(job.source)),
        "quantization_in_training": job.settings.quantization,
        "merge_base": chosen.merge_base,
        "adapter_sha256": file_sha256(job.source.adapter / WEIGHTS_FILE),
        "combined": job.source.combined,
        "thinking": job.source.prompt.thinking,
        "generation_prompt": job.source.prompt.generation_prompt,
        "date": job.source.prompt.date,
        "dtype": _dtype_names(chosen.plan),
        "bytes": chosen.plan.nbytes,
        "read_back": asdict(chosen.read_back) if chosen.read_back else None,
        "warnings": [_without_paths(warning, job) for warning in job.warnings],
    }


def _without_paths(text: str, job: Job) -> str:
    """The folder may go to a hub, and where things lie here is nobody's business."""
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
    """The closing table of a merge."""
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
    """A comparison of logits in a line; the arguments are Parity's fields."""
    return (
        f"{tokens} tokens: same likeliest {top1_agreement:.2%}, mean KL {mean_kl:.1e}, largest difference "
        f"{largest_difference:.2g} of {largest_logit:.3g}"
    )
