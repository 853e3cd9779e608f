"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

_CANDIDATES = 1024
"""The likeliest tokens that are looked at first; a wider distribution is sorted whole."""
SEEDS = 2**32
"""How many a user can choose from."""
ALMOST_ZERO = 1e-4
"""Temperatures below take the likeliest token: a division by them would leave the range of float32."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. None leaves a setting to the model's own generation_config."""

    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; 0 from all."""
    min_p: float | None = None
    """Draw from tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens of prompt and answer less likely to come again (Keskar et al. 2019, CTRL)."""
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int | None = None
    """Makes drawing repeatable, whatever else is drawn at the same time."""

    def with_defaults(self, config: Any) -> Sampling:
        """The same with everything said.

        Args:
            config: the model's GenerationConfig.
        """

        def known(name: str, otherwise: float) -> Any:
            own, model_s = getattr(self, name), getattr(config, name, None)
            return own if own is not None else model_s if model_s is not None else otherwise

        return replace(
            self,
            temperature=self.temperature if self.temperature >= ALMOST_ZERO else 0.0,
            top_p=known("top_p", 1.0),
            top_k=known("top_k", 0),
            min_p=known("min_p", 0.0),
            repetition_penalty=known("repetition_penalty", 1.0),
        )


class TokenChooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: with everything said.
        prompt: token ids before the answer.
        device: of the logits.
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
        """Whether the token is the largest logit and nothing else."""
        return self._generator is None and self._seen is None

    def choose(self, logits: torch.Tensor) -> int:
        """The next token's id.

        Args:
            logits: [vocabulary], of any float dtype; not changed.
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
        """Temperature, top-k, top-p, min-p, in transformers' order, then one draw."""
        ids, probabilities = shortlist(scores, self.sampling)
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])


def shortlist(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn, likeliest first, and their probabilities.

    Args:
        scores: float32 [vocabulary].
        sampling: with everything said and a temperature above 0.

    Returns:
        ids, int64 [kept], and float32 [kept] that sums up to 1.
    """
    scores = scores / sampling.temperature
    top_p, min_p = sampling.top_p or 0.0, sampling.min_p or 0.0
    count = min(sampling.top_k or len(scores), len(scores))
    total = scores.logsumexp(0)
    values, ids = scores.topk(min(count, _CANDIDATES))
    if count == len(scores) and len(values) < count:
        # All tokens may be drawn unless top-p or min-p ends the list among the first candidates.
        likely = (values - total).exp()
        if not (likely.sum() >= top_p < 1 or likely[-1] < min_p * likely[0]):
            values, ids = scores.sort(descending=True)
    elif len(values) < count:
        values, ids = scores.topk(count)
    probabilities = (values - (total if count == len(scores) else values.logsumexp(0))).exp()
    # A token stays while those before it have not yet reached top_p; the first one always does.
    stays = probabilities.cumsum(0) - probabilities < top_p
    stays &= probabilities >= min_p * probabilities[0]
    stays[0] = True
    kept = probabilities[stays]
    return ids[stays], kept / kept.sum()
