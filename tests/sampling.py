"""What one answer may draw its next token from."""

from __future__ import annotations

import torch

from loratune.engine.sampling import Sampling
from loratune.engine.token_choice import TokenChooser, grouped


def shortlisted(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of the tokens that may be sampled, most likely first, and their probabilities, which sum to 1."""
    (group,) = grouped([TokenChooser(sampling, [1], "cpu")], len(scores), "cpu")
    ids, probabilities = group.shortlist(scores[None])
    stays = probabilities[0] >= 0
    kept = probabilities[0][stays]
    return ids[0][stays], kept / kept.sum()
