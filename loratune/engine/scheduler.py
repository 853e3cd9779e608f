"""Continuous batching: sequences start and finish independently while they share each forward pass.

As in Orca (Yu et al. 2022), scheduling is per iteration: each step processes a part of new prompts, then one token of
every running sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch.nn import functional

from loratune.engine.adapter_switch import AdapterSwitch
from loratune.engine.sequence import RunningSequence
from loratune.engine.token_choice import BatchChooser, TokenChooser
from loratune.engine.types import Divergence
from loratune.model.adapter.own_parameters import BASE
from loratune.model.architecture.cache_argument import cache_argument
from loratune.model.architecture.structure import causal_model, output_layer
from loratune.model.kernels.few_rows import give_up_few_row_products, use_few_row_products
from loratune.protocols import CausalModel

PROMPT_PART = 512
"""Maximum prompt tokens of a sequence per step, so that a long prompt does not block running sequences."""
PROMPT_TOKENS = 2048
"""Maximum prompt tokens of all sequences per step."""

Reader = Callable[[int, list[int], int], torch.Tensor]
"""Reads a sequence on: from the number of tokens read, the next tokens, and the number of last positions that are
wanted, to logits [positions, vocabulary]."""


class Decoder(ABC):
    """Decodes many sequences concurrently with one model.

    Args:
        model: a causal language model in eval mode, with or without PEFT adapters.
        slots: maximum number of running sequences.
    """

    notice: str | None = None
    """What a user is to be told of how this decoder works."""

    def __init__(self, model: CausalModel, slots: int = 32) -> None:
        self.model = model
        base = causal_model(model)
        self._adapters = AdapterSwitch(model)
        self._cache_argument = cache_argument(base)
        self._large_layers = use_few_row_products(base)
        # The last position's states are strided, and CPU bfloat16 products of strided rows are a hundred times slower.
        self._hook = output_layer(base).register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.slots = slots
        self.device = model.device
        self.generation_config = base.generation_config
        self.running: list[RunningSequence] = []
        """The sequence in each slot; slots are numbered from 0 without gaps."""
        self.waiting: deque[RunningSequence] = deque()
        self._chooser = BatchChooser(self.device)

    @property
    @abstractmethod
    def room(self) -> int | None:
        """Number of tokens whose keys and values fit, of all running sequences; None for no limit."""

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def vocabulary(self, adapter: str) -> int:
        """Return an adapter's vocabulary size; prompt ids must be below it."""
        return self._adapters.vocabulary(adapter)

    def use(self, model: CausalModel) -> None:
        """Go on with the same model, of which adapters have been exchanged; no running sequence has one of these."""
        self.model = model
        self._adapters = AdapterSwitch(model)

    def add(self, running: RunningSequence) -> None:
        self.waiting.append(running)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def remove(self, running: RunningSequence) -> None:
        """Remove a queued or running sequence; the last running one moves to its slot."""
        if running.slot < 0:
            if running in self.waiting:
                self.waiting.remove(running)
            return
        last = self.running.pop()
        self._leave(running, last)
        if last is not running:
            self.running[running.slot] = last
            last.slot = running.slot
        running.slot = -1

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(self) -> list[RunningSequence]:
        """Process a part of new prompts, and generate one token for each sequence whose prompt is complete.

        Returns:
            Sequences with a new token; finished ones have left their slot.
        """
        while self.waiting and self._has_room():
            self._begin(self.waiting.popleft())
        answering = [running for running in self.running if running.tokens]
        reading = self._next_prompts()
        passes = [self._read(reading)] if reading else []
        if answering:
            passes.append((answering, self._forward(answering, [running.tokens[-1:] for running in answering])))
        advanced = [running for rows, _ in passes for running in rows]
        if advanced:
            self._choose(advanced, _one_below_the_other([logits for rows, logits in passes if rows]))
        for running in advanced:
            if running.finish:
                self.remove(running)
        if self.is_idle:
            self._rest()
        return advanced

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def loss(self, prompt: list[int], answer: list[int], adapter: str = BASE) -> float:
        """Return the negative log-likelihood of an answer, in nats, summed over its tokens.

        Args:
            prompt: token ids, at least one.
            answer: token ids, including the end token if it counts.
            adapter: PEFT's name of the adapter.
        """
        likelihood: float = self.likelihood(prompt, answer, adapter)[0]
        return -likelihood

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def likelihood(self, prompt: list[int], answer: list[int], adapter: str = BASE) -> tuple[float, bool]:
        """Return the log-likelihood of an answer, in nats, and whether each token is the likeliest one; see `loss`."""
        total, is_greedy = 0.0, True
        for (logits,), wanted in self._predicted(prompt, answer, [adapter]):
            total -= _loss_of(logits, wanted)
            is_greedy = is_greedy and bool((logits.argmax(-1) == wanted).all())
        return total, is_greedy

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def divergence(self, ids: list[int], adapter: str) -> Divergence:
        """Compare an adapter with its base on a text.

        Args:
            ids: token ids of the text, at least two.
            adapter: PEFT's name of the adapter.
        """
        loss = of_base = kl = 0.0
        for (tuned, base), wanted in self._predicted(ids[:1], ids[1:], [adapter, BASE]):
            loss, of_base = loss + _loss_of(tuned, wanted), of_base + _loss_of(base, wanted)
            shared = min(tuned.shape[-1], base.shape[-1])  # an adapter may bring rows of its own
            expected, found = (functional.log_softmax(one[:, :shared].float(), -1) for one in (base, tuned))
            kl += float(functional.kl_div(found, expected, reduction="sum", log_target=True))
        return Divergence(len(ids) - 1, loss, of_base, kl)

    def _predicted(
        self, prompt: list[int], answer: list[int], adapters: Sequence[str]
    ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """Read a prompt and an answer part by part, with each adapter.

        Yields:
            For each adapter the logits [tokens, vocabulary] that predict some tokens of the answer, and these tokens.
        """
        sequence, read = [*prompt, *answer], 0
        readers = [self._reader(len(sequence), adapter) for adapter in adapters]
        while read < len(sequence) - 1:
            part = sequence[read : min(read + PROMPT_PART, len(sequence) - 1)]
            end = read + len(part)
            scored = min(len(part), end + 1 - len(prompt))  # positions followed by a token of the answer
            logits = [read_on(read, part, max(1, scored)) for read_on in readers]
            read = end
            if scored > 0:
                yield logits, torch.tensor(sequence[read + 1 - scored : read + 1], device=self.device)

    @abstractmethod
    def reset(self) -> None:
        """Give all memory of keys and values back; no answer may be running."""

    def close(self) -> None:
        """Free the memory and restore the model."""
        self.reset()
        self._release()

    def _release(self) -> None:
        """Restore the model."""
        self._hook.remove()
        give_up_few_row_products(self._large_layers)
        self._adapters.close()

    @abstractmethod
    def _enter(self, new: RunningSequence) -> int:
        """Make room for the sequence in the last slot; return how much of its prompt is read already."""

    @abstractmethod
    def _leave(self, running: RunningSequence, last: RunningSequence) -> None:
        """Let go of a running sequence; the last one, which may be the same, moves to its slot."""

    @abstractmethod
    def _fits(self, lengths: Sequence[int]) -> bool:
        """Return whether there is memory for sequences of these lengths, in tokens."""

    @abstractmethod
    def _rest(self) -> None:
        """Do what is to be done when nothing runs or waits any more."""

    @abstractmethod
    def _reader(self, length: int, adapter: str) -> Reader:
        """Return what reads a new sequence of at most so many tokens."""

    @abstractmethod
    def _pass_of(self, running: RunningSequence, count: int) -> Hashable:
        """Return what sequences with `count` new tokens have in common that can share a forward pass."""

    @abstractmethod
    def _logits(self, rows: Sequence[RunningSequence], new: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return logits [rows, vocabulary] of a forward pass, after the last new token of each row."""

    def _begin(self, running: RunningSequence) -> None:
        """Assign a slot to a sequence."""
        running.slot = len(self.running)
        settled = running.sampling.with_defaults(self.generation_config)
        running.chooser = TokenChooser(settled, running.prompt, self.device)
        self.running.append(running)
        running.read = self._enter(running)

    def _has_room(self) -> bool:
        """Return whether the next sequence fits, even if all running ones reach their maximum length."""
        lengths = [one.longest for one in (*self.running, self.waiting[0])]
        return len(self.running) < self.slots and (not self.running or self._fits(lengths))

    def _next_prompts(self) -> list[RunningSequence]:
        """Return the prompts of the next pass, in order of arrival, up to PROMPT_TOKENS."""
        chosen: list[RunningSequence] = []
        widest = 0
        for running in self.running:
            if running.tokens:
                continue
            widest = max(widest, min(PROMPT_PART, len(running.prompt) - running.read))
            if chosen and widest * (len(chosen) + 1) > PROMPT_TOKENS:
                break
            chosen.append(running)
        return chosen

    def _read(self, reading: Sequence[RunningSequence]) -> tuple[list[RunningSequence], torch.Tensor]:
        """Process a part of each prompt; return those that are complete, and their logits."""
        parts = [running.prompt[running.read : running.read + PROMPT_PART] for running in reading]
        logits = self._forward(reading, parts)
        for running, part in zip(reading, parts, strict=True):
            running.read += len(part)
        done = [index for index, running in enumerate(reading) if running.read == len(running.prompt)]
        return [reading[index] for index in done], logits if len(done) == len(reading) else logits[done]

    def _forward(self, rows: Sequence[RunningSequence], new: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return logits [rows, vocabulary] after the last new token of each row."""
        by_pass = defaultdict(list)
        for index, running in enumerate(rows):
            by_pass[self._pass_of(running, len(new[index]))].append(index)
        groups = list(by_pass.values())
        parts = [self._logits([rows[index] for index in group], [new[index] for index in group]) for group in groups]
        if len(groups) == 1:
            return parts[0]
        order = torch.tensor([index for group in groups for index in group]).argsort()
        return _one_below_the_other(parts)[order.to(self.device, non_blocking=True)]

    def _choose(self, rows: Sequence[RunningSequence], logits: torch.Tensor) -> None:
        choosers = [running.chooser for running in rows if running.chooser]
        tokens = self._chooser.choose(choosers, [running.tokens for running in rows], logits)
        for running, token in zip(rows, tokens, strict=True):
            running.tokens.append(token)
            if token in running.ends:
                running.finish = "stop"
            elif len(running.tokens) >= running.sampling.max_new_tokens:
                running.finish = "length"


def _loss_of(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the negative log-likelihood of tokens [tokens] under logits [tokens, vocabulary], in nats."""
    return float(functional.cross_entropy(logits.float(), wanted, reduction="sum"))


def _one_below_the_other(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join [rows, vocabulary] of several passes, whose adapters may have vocabularies of different sizes."""
    if len(logits) == 1:
        return logits[0]
    widest = max(part.shape[-1] for part in logits)
    return torch.cat([functional.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in logits])
