"""Describes a merge and its verification, for verification.json and for the user."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from loratune import console
from loratune.errors import agreeing, bullet_list, counted
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.files import weight_files
from loratune.printable import as_far_as_said, shortened
from loratune.runs.base_check import how_checked, known_hashes
from loratune.runs.card import base_name
from loratune.runs.folder import file_sha256, values_sha256
from loratune.runs.merged import ReadBack
from loratune.runs.tensor_hashes import TensorHashes
from loratune.runs.verification import Answer, MergedModel, ModelProof, Parity

if TYPE_CHECKING:
    from loratune.delivery.merge.job import Candidate, Job


def described(job: Job, chosen: Candidate) -> MergedModel:
    """What verification.json says of a merge, as far as files tell."""
    return MergedModel(
        base=base_name(job.settings.base, str(job.base.absolute())),  # the folder may go to a hub: no local paths
        base_checked=how_checked(known_hashes(job.source)),
        base_sha256=values_sha256(TensorHashes(weight_files(job.base)).result()),
        quantization_in_training=job.settings.quantization,
        merge_base=chosen.merge_base,
        adapter_sha256=file_sha256(job.source.adapter / WEIGHTS_FILE),
        combined=job.source.combined,
        thinking=job.source.prompt.enable_thinking,
        generation_prompt=job.source.prompt.generation_prompt,
        date=job.source.prompt.date,
        dtype=chosen.plan.dtype_names,
        bytes=chosen.plan.nbytes,
        read_back=chosen.read_back,
        warnings=tuple(_without_paths(warning, job) for warning in job.warnings),
    )


def _without_paths(text: str, job: Job) -> str:
    """Replace local paths with their last parts, since the folder may be published."""
    for place in (job.base, job.source.adapter, job.source.run):
        for path in (place, place.absolute()) if place else ():
            text = text.replace(str(path), path.name)
    return text


RECORDED = "when it was merged: figures of verification.json, which --adapter computes again"
LARGE_LEAD = math.log(1000)
"""nats from which on it makes no difference by how much another token is likelier."""
BASE_CHECKED = {
    "every byte": "every byte of its weights compared with the trained one's",
    "sampled": "sampled: 4096 bytes of each tensor compared, since the run of an earlier version knows no more",
    "nothing": "not compared with the trained one, of which nothing is known",
}


def show_verification(merged: MergedModel, is_recorded: bool = False) -> None:
    """Print the closing table of a merge.

    Args:
        merged: the merge.
        is_recorded: whether the figures were read from verification.json, not computed now.
    """
    back, models = merged.read_back, merged.models
    rows = []
    if back:
        rows += [
            ("files", f"{counted(back.tensors, 'tensor')} read back, {_kept(back, merged.dtype)}"),
            (
                "changed",
                f"{counted(back.updated, 'tensor')}: all {counted(back.rows, 'row')} are what PEFT's own merge makes "
                f"of the base, rounded once; {back.sampled_rows:,} of them, computed in float64, are at most "
                f"{back.largest_error_steps:.2f} rounding steps off, and rounding takes {back.lost_to_rounding:.1%} of "
                "the update",
            ),
        ]
    logits = models.logits or {}
    for name, parity in logits.items():
        label = "logits" if len(logits) == 1 else name
        chosen = " ← taken" if len(logits) > 1 and name == merged.merge_base else ""
        rows.append((label, f"{parity_text(parity)}{chosen}"))
    rounded = (models.logits_with_rounding or {}).get(merged.merge_base)
    if rounded:  # the logits above are of other weights than base + adapter: those that the file's type can hold
        rows.append(("rounded alike", f"base + adapter rounded as the file is; {parity_text(rounded)}"))
    if models.bounds:
        rows.append(("bounds", _bounds_text(models)))
    if models.computed_on:
        rows.append(("run on", models.computed_on))
    rows.append(("base", BASE_CHECKED[merged.base_checked]))
    if models.without_adapter:
        rows.append(("base alone", parity_text(models.without_adapter)))
    rows += [("beside", change) for change in merged.changed_files]
    title = "verified" if models.verified != "nothing" else "NOT VERIFIED"
    console.table(rows, title=f"{title} {RECORDED}" if is_recorded else title)
    if models.answers:
        console.table(_answer_rows(models.answers), title="answers, greedy; base+adapter up to its first other token")


def _bounds_text(models: ModelProof) -> str:
    """The bounds that were held, and where they come from."""
    if models.bounds is None:
        raise RuntimeError("no models were run")
    origin = "the usual ones"
    if models.noise:
        origin = f"from what rounding alone does to this model in {counted(len(models.noise), 'run')}"
    held = "rounded alike: " if models.logits_with_rounding else ""
    allowed = f"largest difference {models.bounds.difference:.1e} of the largest logit"
    return f"{held}{allowed}, mean KL {models.bounds.mean_kl:.1e}: {origin}"


def _kept(back: ReadBack, dtype: str | None) -> str:
    """What has become of the tensors without an update."""
    if back.converted is None:  # an earlier version counted the two together
        return f"{back.identical} equal to the base's, or to its values in {dtype}"
    same = [f"{back.identical - back.converted} equal to the base's byte for byte"]
    converted = [f"{back.converted} equal to the base's values in {dtype}"] if back.converted else []
    return ", ".join([*(same if back.converted < back.identical or not converted else []), *converted])


def about_changed(answers: Iterable[Answer], left_quantization: str | None, dtype: str) -> str | None:
    """Return a warning about the greedy answers that are not those of base + adapter; None if all are.

    Args:
        answers: all of them.
        left_quantization: of the base in training, if it was merged into the base without; otherwise None.
        dtype: of the merged weights.
    """
    asked = list(answers)
    changed = [answer for answer in asked if answer.has_changed]
    if not changed:
        return None
    quantised = f", and leaving the {left_quantization} of the training," if left_quantization else ""
    wider = "" if dtype == "float32" else "; with --dtype float32, weights and answers are hardly rounded"
    wider += "; --merge-base dequantized merges into the base as it was trained on" if left_quantization else ""
    return (
        f"{len(changed)} of {counted(len(asked), 'greedy answer')} {agreeing(len(changed), 'differ')} from base + "
        f"adapter's, as rounding to {dtype}{quantised} may do:\n{bullet_list([*map(_change, changed)])}\n"
        "read both answers, and score both models on rows of yours: loratune infer --input ROWS --output FILE "
        f"--metrics, once with --model, once with --adapter{wider}"
    )


def _change(answer: Answer) -> str:
    times = math.exp(min(answer.lead or 0.0, LARGE_LEAD))
    likelier = f"{100 * (times - 1):.2g}% likelier" if times < 2 else f"{times:.0f} times as likely"
    return (
        f"{shortened(' '.join(answer.question.split()))!r}: the same for {answer.agreeing} of "
        f"{counted(answer.tokens or 0, 'token')}, then base + adapter finds another token {likelier}"
    )


def _answer_rows(answers: Iterable[Answer]) -> list[tuple[str, str]]:
    rows = []
    for answer in answers:
        rows += [("question", answer.question), ("merged", as_far_as_said(answer.merged, answer.ended))]
        rows.append(("base+adapter", f"{answer.adapter} …" if answer.has_changed else "the same"))
    return rows


def parity_text(parity: Parity) -> str:
    """A comparison of logits in a line."""
    return (
        f"{counted(parity.tokens, 'token')}: same likeliest {parity.top1_agreement:.2%}, mean KL {parity.mean_kl:.1e}, "
        f"largest difference {parity.relative_difference:.2g} of the largest logit ({parity.largest_logit:.3g})"
    )
