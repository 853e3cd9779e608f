"""Diagnoses an adapter after training: whether it has learnt anything, in all modules, and without overfitting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from loratune.errors import counted
from loratune.model.adapter.tensors import PREFIX
from loratune.model.adapter.update_size import update_sizes
from loratune.protocols import AdaptedModel
from loratune.runs.report import Answers, ExpertUse, Health, Updates
from loratune.training.callbacks import Metrics
from loratune.training.checkpoints.best import judged_by, validations

HARDLY = 1e-4
"""Threshold of ‖ΔW‖ / ‖W‖ below which answers hardly change; trained adapters have 1e-3 to 1e-1."""
WORSE = 1.05
"""Maximum ratio of the last validation loss to the best one."""


class GradientFlow(TrainerCallback):
    """Checks the first step's gradients: each B must have one, while A's are 0 as long as B is 0."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._has_looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Check the gradients, after clipping."""
        if self._has_looked:
            return
        self._has_looked = True
        for name, weight in model.named_parameters():
            if weight.requires_grad and ".lora_B." in name and (weight.grad is None or not weight.grad.any()):
                self.missing.append(name.partition(".lora_B.")[0].removeprefix(PREFIX))


def examine(
    model: AdaptedModel,
    flow: GradientFlow,
    metrics: Metrics,
    answers: Answers | None = None,
    experts: ExpertUse | None = None,
    norms: Mapping[str, float] | None = None,
) -> Health:
    """Measure the final adapter.

    Args:
        model: the model with the final weights.
        flow: result of the gradient check.
        metrics: the run's metrics.
        answers: sample generations.
        experts: how many experts the training's tokens reached.
        norms: of the base's weights, where they are sharded.
    """
    updates = {name: _updates(ratios) for name, ratios in update_sizes(model, norms=norms).items()}
    missing = tuple(flow.missing)
    sentences = (*_about_updates(updates, missing), *_about_answers(answers), *_about_losses(metrics))
    return Health(updates, missing, answers, sentences, experts)


def _updates(ratios: Mapping[str, float]) -> Updates:
    finite = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
    return Updates(
        modules=len(ratios),
        median=statistics.median_low(finite) if finite else math.nan,
        largest=max(finite, default=math.nan),
        unchanged=tuple(name for name, ratio in ratios.items() if ratio == 0),
        not_finite=tuple(name for name, ratio in ratios.items() if not math.isfinite(ratio)),
    )


def _about_updates(updates: Mapping[str, Updates], without_gradient: Sequence[str]) -> list[str]:
    sizes = list(updates.values())
    broken = [name for size in sizes for name in size.not_finite]
    unchanged = [name for size in sizes for name in size.unchanged]
    sentences = []
    if broken:
        sentences.append(f"{_modules(broken)} with NaN or infinity in the update: do not use this adapter")
    if unchanged:
        sentences.append(f"{_modules(unchanged)} unchanged: no gradient has reached them, or the learning rate was 0")
    if sizes and not broken and max(size.largest for size in sizes) < HARDLY:
        sentences.append(
            "the training hardly changes the model: raise training.learning_rate, train longer, or, with LoRA, raise "
            "lora.alpha"
        )
    if without_gradient:
        sentences.append(f"{_modules(without_gradient)} without a gradient in the first step")
    return sentences


def _about_answers(answers: Answers | None) -> list[str]:
    sentences = []
    if answers and answers.told and not answers.changed and not answers.cut_short:
        sentences.append(
            f"none of {counted(len(answers.told), 'question')} is answered differently from the base: the training has "
            "changed nothing visible; raise training.learning_rate, train longer, or, with LoRA, raise lora.rank"
        )
    if answers and answers.ended < answers.judged / 2:
        sentences.append(
            f"{answers.judged - answers.ended} of {counted(answers.judged, 'answer')} did not end with an end token: "
            "train longer, and look for answers that are cut off in the rows (loratune data preview); until then "
            "limit them with --max-new-tokens"
        )
    return sentences


def _modules(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'module')} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _about_losses(metrics: Metrics) -> list[str]:
    """Detect overfitting: the validation loss rises while the training loss falls.

    Where most answers are exact, it is none as long as no fewer are: what is learnt by heart is said with more
    certainty, what is wrong too, and the loss counts how certain that is.
    """
    measured = validations(metrics)
    losses = [loss for _, loss in metrics.of("loss")]
    part = max(1, len(losses) // 4)
    lowest = min(measured, key=lambda one: one.loss, default=None)
    if lowest is None or len(measured) < 3 or measured[-1].loss < WORSE * lowest.loss:
        return []
    if sum(losses[-part:]) >= sum(losses[:part]):
        return []
    then, now, fewer = lowest.exact, measured[-1].exact, ""
    if then is not None and now is not None and "exact" in (judged_by(one, "auto") for one in (lowest, measured[-1])):
        if now >= then:
            return []
        fewer = f" and exact answers have fallen from {then:.1%} to {now:.1%}"
    return [
        f"overfitting: the validation loss has risen from {lowest.loss:.3f} to {measured[-1].loss:.3f}{fewer} while "
        "the training loss kept falling; try fewer training.epochs, a lower training.learning_rate, more lora.dropout, "
        "a lower lora.rank, or more rows"
    ]
