"""Chooses the next token from the logits."""

from __future__ import annotations

from typing import Any

import torch

from loratune.engine.sampling import Sampling

_CANDIDATES = 1024
"""Number of most likely tokens that are examined first; a wider distribution is sorted as a whole."""


class TokenChooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: settings with all values resolved.
        prompt: token ids before the answer.
        device: device of the logits.
    """

    def __init__(self, sampling: Sampling, prompt: list[int], device: Any) -> None:
        self.sampling = sampling
        self._penalty = sampling.repetition_penalty or 1.0
        self._seen: Any = torch.tensor(sorted(set(prompt)), device=device) if self._penalty != 1 else None
        self._generator: Any = None
        if sampling.temperature > 0:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the choice is the argmax of the logits."""
        return self._generator is None and self._seen is None

    def choose(self, logits: torch.Tensor) -> int:
        """Return the id of the next token.

        Args:
            logits: [vocabulary], any float dtype; not modified.
        """
        scores = logits.float()
        if self._seen is not None:
            scores = scores.clone() if scores is logits else scores
            own = scores[self._seen]
            scores[self._seen] = torch.where(own < 0, own * self._penalty, own / self._penalty)
        token = int(scores.argmax()) if self._generator is None else self._draw(scores)
        if self._seen is not None and not bool((self._seen == token).any()):
            self._seen = torch.cat([self._seen, self._seen.new_tensor([token])])
        return token

    def _draw(self, scores: torch.Tensor) -> int:
        """Sample with temperature, top-k, top-p and min-p, in transformers' order."""
        ids, probabilities = shortlist(scores, self.sampling)
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])


def shortlist(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that may be sampled, most likely first, and their probabilities.

    Args:
        scores: float32 [vocabulary].
        sampling: settings with all values resolved and a temperature above 0.

    Returns:
        ids, int64 [kept], and probabilities, float32 [kept], which sum to 1.
    """
    scores = scores / sampling.temperature
    top_p, min_p = sampling.top_p or 0.0, sampling.min_p or 0.0
    count = min(sampling.top_k or len(scores), len(scores))
    total = scores.logsumexp(0)
    values, ids = scores.topk(min(count, _CANDIDATES))
    if count == len(scores) and len(values) < count:
        # All tokens may be sampled, unless top-p or min-p cuts the list within the candidates.
        likely = (values - total).exp()
        if not (likely.sum() >= top_p < 1 or likely[-1] < min_p * likely[0]):
            values, ids = scores.sort(descending=True)
    elif len(values) < count:
        values, ids = scores.topk(count)
    probabilities = (values - (total if count == len(scores) else values.logsumexp(0))).exp()
    # A token is kept while the tokens before it have not reached top_p; the first one always is.
    stays = probabilities.cumsum(0) - probabilities < top_p
    stays &= probabilities >= min_p * probabilities[0]
    stays[0] = True
    kept = probabilities[stays]
    return ids[stays], kept / kept.sum()
