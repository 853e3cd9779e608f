"""Chooses the next token of every answer of a step from the logits.

All answers are computed together. Only the random numbers are an answer's own, so that what it draws for a seed does
not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from loratune.engine.sampling import Sampling
from loratune.errors import Exit, LoratuneError

_CANDIDATES = 1024
"""Number of most likely tokens that are examined first on a CPU; a wider distribution is sorted as a whole."""
_SPARE = 64
"""Tokens of answers for which room is made at a time."""


class TokenChooser:
    """The settings, the prompt and the random numbers of one answer.

    Args:
        sampling: settings with all values resolved.
        prompt: token ids before the answer.
        device: device of the logits.
    """

    def __init__(self, sampling: Sampling, prompt: list[int], device: Any) -> None:
        self.sampling = sampling
        self.penalty = sampling.repetition_penalty or 1.0
        self.prompt = torch.tensor(prompt) if self.penalty != 1 else None
        self.generator: Any = None
        if sampling.temperature > 0:
            self.generator = torch.Generator(device)
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed)


class BatchChooser:
    """Chooses the tokens of answers that advance together.

    Their settings stay on the device until other answers advance, so that a step copies none.

    Args:
        device: device of the logits.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._choosers: list[TokenChooser] = []
        """Those of the last step; empty after a failure, in which a token may have been lost."""
        self._groups: list[Group] = []
        self._said: _Said | None = None

    def choose(self, choosers: Sequence[TokenChooser], tokens: Sequence[list[int]], logits: torch.Tensor) -> list[int]:
        """Return the id of the next token of each answer.

        Args:
            choosers: one for each answer.
            tokens: each answer so far.
            logits: [answers, vocabulary], any float dtype; not modified.

        Raises:
            LoratuneError: the logits of an answer that is sampled are not numbers.
        """
        is_known, self._choosers = self._choosers == [*choosers], []
        if not is_known:
            self._said = _said(choosers, tokens, self._device)
            self._groups = grouped(choosers, logits.shape[-1], self._device)
        scores = logits if self._said is None else self._said.penalised(logits.float())
        drawn = [group.draw(scores) for group in self._groups]
        if len(drawn) == 1 and self._groups[0].rows is None:
            chosen = drawn[0]
        else:
            chosen = scores.argmax(-1)
            for group, ids in zip(self._groups, drawn, strict=True):
                chosen[group.rows] = ids
        if self._said is not None:
            self._said.add(chosen)
        found: list[int] = chosen.tolist()
        if min(found) < 0:
            raise LoratuneError("the model's scores for the next token are not numbers", Exit.MODEL)
        self._choosers = [*choosers]
        return found


class _Said:
    """The tokens of prompts and answers, for the repetition penalty.

    Args:
        ids: int64 [answers, length]; a token may be repeated.
        penalties: float32 [answers, 1].
    """

    def __init__(self, ids: torch.Tensor, penalties: torch.Tensor) -> None:
        self._ids, self._penalties, self._length = ids, penalties, ids.shape[1]

    def penalised(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [answers, vocabulary] with the penalty."""
        own = scores.gather(1, self._ids)
        return scores.scatter(1, self._ids, torch.where(own < 0, own * self._penalties, own / self._penalties))

    def add(self, tokens: torch.Tensor) -> None:
        """Add a token of each answer: int64 [answers]."""
        if self._length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, self._ids[:, :1].expand(-1, _SPARE)], dim=1)
        self._ids[:, self._length] = tokens
        self._length += 1


def _said(choosers: Sequence[TokenChooser], tokens: Sequence[list[int]], device: Any) -> _Said | None:
    """Return the tokens so far; None if there is no penalty."""
    if all(chooser.prompt is None for chooser in choosers):
        return None
    own = [
        torch.zeros(1).long() if chooser.prompt is None else torch.cat([chooser.prompt, torch.tensor(made).long()])
        for chooser, made in zip(choosers, tokens, strict=True)
    ]
    ids = pad_sequence(own, batch_first=True, padding_value=-1)
    penalties = torch.tensor([[chooser.penalty] for chooser in choosers])
    ids = ids.where(ids >= 0, ids[:, :1])
    return _Said(ids.to(device, non_blocking=True), penalties.to(device, non_blocking=True))


class Group:
    """Answers that are drawn from the same number of candidates.

    Args:
        numbers: their rows of the logits; None for all.
        choosers: theirs.
        width: number of the most likely tokens that are examined.
        is_open: whether more tokens may be drawn than these.
        device: device of the logits.
    """

    def __init__(
        self, numbers: list[int] | None, choosers: Sequence[TokenChooser], width: int, is_open: bool, device: Any
    ) -> None:
        self.rows = None if numbers is None else torch.tensor(numbers).to(device, non_blocking=True)
        self._width, self._is_open = width, is_open
        self._generators = [chooser.generator for chooser in choosers]
        values = [(one.sampling.temperature, one.sampling.top_p or 0.0, one.sampling.min_p or 0.0) for one in choosers]
        settings = torch.tensor(values).to(device, non_blocking=True)
        self._temperature, self._top_p, self._min_p = settings.split(1, dim=1)

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Sample with temperature, top-k, top-p and min-p, in transformers' order.

        Args:
            scores: float [all answers, vocabulary].

        Returns:
            int64 [answers of the group]; -1 where the scores are not numbers.
        """
        ids, probabilities = self.shortlist(scores if self.rows is None else scores[self.rows])
        # The largest quotient is a token's with its probability.
        largest = (probabilities / self._noise(probabilities)).max(-1)
        drawn = ids.gather(1, largest.indices.unsqueeze(1)).squeeze(1)
        return drawn.where(largest.values > 0, -1)

    def shortlist(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that may be sampled, most likely first, and their probabilities.

        Args:
            scores: float [answers of the group, vocabulary].

        Returns:
            ids, int64, and probabilities, float32, both [answers of the group, examined]. A probability is -1 for a
            token that may not be sampled, and they are not divided by their sum.
        """
        scores = scores.float() / self._temperature
        values, ids = _largest(scores, self._width)
        has_top_k = self._width < scores.shape[-1] and not self._is_open
        total = (values if has_top_k else scores).logsumexp(-1, keepdim=True)
        probabilities = (values - total).exp()
        if self._is_open and not self._reaches_a_cut(probabilities):
            values, ids = _largest(scores, scores.shape[-1])
            probabilities = (values - total).exp()
        # A token is kept while the tokens before it have not reached top_p; the first one always is.
        stays = probabilities.cumsum(-1) - probabilities < self._top_p
        stays &= probabilities >= self._min_p * probabilities[:, :1]
        stays[:, 0] = True
        return ids, probabilities.where(stays, -1)

    def _noise(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return exponential noise for probabilities, each row from its own generator."""
        noise = torch.ones_like(probabilities)
        for row, own, generator in zip(noise, probabilities, self._generators, strict=True):
            if row.device.type == "cpu":  # as many as there are tokens, which a GPU would have to wait for
                stays = own >= 0
                row[stays] = row.new_empty(int(stays.sum())).exponential_(generator=generator)
            else:
                row.exponential_(generator=generator)
        return noise

    def _reaches_a_cut(self, probabilities: torch.Tensor) -> bool:
        """Return whether top-p or min-p cuts within these most likely tokens of all answers."""
        has_top_p = (probabilities.sum(-1, keepdim=True) >= self._top_p) & (self._top_p < 1)
        has_min_p = probabilities[:, -1:] < self._min_p * probabilities[:, :1]
        return bool((has_top_p | has_min_p).all())


def grouped(choosers: Sequence[TokenChooser], vocabulary: int, device: Any) -> list[Group]:
    """Return the groups of the answers that are sampled."""
    members: dict[tuple[int, int], list[int]] = {}
    for number, chooser in enumerate(choosers):
        if chooser.generator is not None:
            width = min(chooser.sampling.top_k or vocabulary, vocabulary)
            cuts = (chooser.sampling.top_p or 0.0) < 1 or bool(chooser.sampling.min_p)
            # A CPU looks at some candidates before it sorts, where a GPU would wait for the look longer than it sorts.
            is_open = width == vocabulary > _CANDIDATES and cuts and torch.device(device).type == "cpu"
            members.setdefault((_CANDIDATES, number) if is_open else (width, -1), []).append(number)
    return [
        Group(
            None if len(numbers) == len(choosers) else numbers,
            [choosers[number] for number in numbers],
            width,
            alone >= 0,
            device,
        )
        for (width, alone), numbers in members.items()
    ]


def _largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest scores of each row and their ids, in order: [rows, count] of [rows, vocabulary]."""
    values, ids = scores.topk(count) if count < scores.shape[-1] else scores.sort(descending=True)
    return values, ids
