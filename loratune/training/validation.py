"""What a validation measures: the loss per labelled token, and how many answers greedy decoding would give exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FIGURES = 4
"""Number of sums of a validation."""


def sums_of(output: Any) -> torch.Tensor:
    """Return the sums of a pass.

    An answer is exact if each of its labels is the likeliest token after the prompt and the labels before it, so that
    greedy decoding gives exactly this answer. Answers of earlier turns are judged by themselves, after the row's own
    earlier turns.

    Args:
        output: `LabelledLoss` of a pass without gradients.

    Returns:
        Loss, labelled positions, exact answers, answers: float64 [4], on the output's device, which is not waited for.
    """
    losses, positions = output.losses, output.positions
    # Answers are runs of adjacent labels: the first token of a row and what a template writes have none.
    begins = torch.ones_like(output.predicted)
    begins[1:] = positions.diff() != 1
    answers = begins.cumsum(0) - 1
    mistakes = torch.zeros_like(positions).index_add_(0, answers, (~output.predicted).long())
    begun = begins.sum()
    return torch.stack([losses.double().sum(), begun.new_tensor(len(losses)), begun - mistakes.count_nonzero(), begun])


def figures(sums: Sequence[float]) -> dict[str, Any]:
    """Return the loss per labelled token and the share of exact answers, each with what it is measured on."""
    loss, tokens, exact, answers = sums
    return {"loss": loss / tokens, "tokens": int(tokens), "exact_answers": exact / answers, "answers": int(answers)}
