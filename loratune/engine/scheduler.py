"""Continuous batching: sequences start and finish independently while they share each forward pass.

As in Orca (Yu et al. 2022), scheduling is per iteration: each step processes a part of new prompts, then one token of
every running sequence.
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from loratune.engine.cache_choice import make_cache
from loratune.engine.forward_batch import ForwardBatch, use_slot_attention
from loratune.engine.kv_cache import KVCache
from loratune.engine.prefix_cache import PrefixCache
from loratune.engine.sequence import RunningSequence
from loratune.engine.token_choice import BatchChooser, TokenChooser
from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.architecture.structure import causal_model, is_adapted, output_layer
from loratune.model.kernels.few_rows import give_up_few_row_products, use_few_row_products
from loratune.protocols import AdaptedModel, CausalModel

PROMPT_PART = 512
"""Maximum prompt tokens of a sequence per step, so that a long prompt does not block running sequences."""
PROMPT_TOKENS = 2048
"""Maximum prompt tokens of all sequences per step."""
KEPT_BYTES = 2 * 2**30
"""Maximum size of an idle KV cache that grows, which is kept for the next request of a conversation."""


class Decoder:
    """Decodes many sequences concurrently with one model.

    Args:
        model: a causal language model in eval mode, with or without PEFT adapters; its attention is replaced.
        slots: maximum number of running sequences.
        cache_budget_bytes: limit of the KV cache; sequences that could exceed it wait. None for no limit on a CPU, and
            for what is free on a GPU.

    Raises:
        DecodingError: the model has layers without keys and values.
    """

    def __init__(self, model: CausalModel, slots: int = 32, cache_budget_bytes: float | None = None) -> None:
        self.model = model
        self._adapted = model if is_adapted(model) else None
        base = causal_model(model)
        use_slot_attention(base)
        self._large_layers = use_few_row_products(base)
        # The last position's states are strided, and CPU bfloat16 products of strided rows are a hundred times slower.
        self._hook = output_layer(base).register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.slots = slots
        self.device = model.device
        self.generation_config = base.generation_config
        self.running: list[RunningSequence] = []
        """The sequence in each slot; slots are numbered from 0 without gaps."""
        self.waiting: deque[RunningSequence] = deque()
        self._cache = make_cache(base, slots, cache_budget_bytes)
        self._prefixes = PrefixCache(self._cache)
        self._chooser = BatchChooser(self.device)
        self._adapter: str | None = None
        self._own = own_parameters(base)
        # PEFT computes rows of several adapters at once, but not with DoRA.
        configs = self._adapted.peft_config if self._adapted else {}
        self._apart = {name for name in configs if configs[name].use_dora or self._own.is_apart(name)}

    def vocabulary(self, adapter: str) -> int:
        """Return an adapter's vocabulary size; prompt ids must be below it."""
        return self._own.vocabulary(adapter)

    @property
    def room(self) -> int | None:
        """Number of tokens whose keys and values fit, of all running sequences; None for no limit."""
        return self._cache.tokens

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

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
        free = last.slot
        has_ended = self._cache.end(running.slot, free, last.held)
        left = running if has_ended else last
        self._prefixes.keep(free, left.adapter, left.ids[: left.held])
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
        if self.is_idle and not self._cache.is_fixed and self._cache.size_bytes > KEPT_BYTES:
            self.reset()
        return advanced

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def loss(self, prompt: list[int], answer: list[int], adapter: str = BASE) -> float:
        """Return the negative log-likelihood of an answer, in nats, summed over its tokens.

        Args:
            prompt: token ids, at least one.
            answer: token ids, including the end token if it counts.
            adapter: PEFT's name of the adapter.
        """
        sequence = [*prompt, *answer]
        cache, read, total = self._cache.another(len(sequence)), 0, 0.0
        cache.begin([len(sequence)])
        while read < len(sequence) - 1:
            part = sequence[read : min(read + PROMPT_PART, len(sequence) - 1)]
            feed = cache.batch([0], [read], [len(part)], self.device)
            read += len(part)
            scored = min(len(part), read + 1 - len(prompt))  # positions followed by a token of the answer
            logits = self._pass(cache, feed, [part], [adapter], max(1, scored))[0]
            if scored > 0:
                wanted = torch.tensor(sequence[read + 1 - scored : read + 1], device=self.device)
                total += float(functional.cross_entropy(logits.float(), wanted, reduction="sum"))
        return total

    def reset(self) -> None:
        """Give all memory of keys and values back; no answer may be running."""
        self._cache.clear()
        self._prefixes.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the memory and restore the model, except for its attention."""
        self._cache.clear()
        self._hook.remove()
        give_up_few_row_products(self._large_layers)
        if self._adapted and self._adapter == BASE:
            self._adapted.base_model.enable_adapter_layers()
        if self._adapted:
            self._own.select([self._adapted.active_adapter])

    def _begin(self, running: RunningSequence) -> None:
        """Assign a slot to a sequence, and reuse a cached prefix of its prompt."""
        running.slot = len(self.running)
        settled = running.sampling.with_defaults(self.generation_config)
        running.chooser = TokenChooser(settled, running.prompt, self.device)
        source, shared = self._prefixes.take(running, self.running)
        self.running.append(running)
        running.read = self._cache.begin([one.longest for one in self.running], source, shared)

    def _has_room(self) -> bool:
        """Return whether the next sequence fits, even if all running ones reach their maximum length."""
        lengths = [one.longest for one in (*self.running, self.waiting[0])]
        return len(self.running) < self.slots and (not self.running or self._cache.fits(lengths))

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
            by_pass[running.adapter if running.adapter in self._apart else None].append(index)
        groups = list(by_pass.values())
        parts = []
        for group in groups:
            chosen = [rows[index] for index in group]
            feed = self._cache.batch(
                [r.slot for r in chosen], [r.held for r in chosen], [len(new[i]) for i in group], self.device
            )
            logits = self._pass(self._cache, feed, [new[index] for index in group], [r.adapter for r in chosen])
            parts.append(logits[:, -1])
        if len(groups) == 1:
            return parts[0]
        order = torch.tensor([index for group in groups for index in group]).argsort()
        return _one_below_the_other(parts)[order.to(self.device, non_blocking=True)]

    def _pass(
        self,
        cache: KVCache,
        feed: ForwardBatch,
        new: Sequence[Sequence[int]],
        adapters: list[str],
        keep: int = 1,
    ) -> torch.Tensor:
        """Return logits [rows, keep, vocabulary] of the last positions of a forward pass."""
        filled = [[0] * (feed.width - len(tokens)) + list(tokens) for tokens in new]
        cache.feed = feed
        output = self.model(
            input_ids=torch.tensor(filled).to(self.device, non_blocking=True),  # without waiting for what runs
            position_ids=feed.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            feed=feed,
            **self._take_adapters(adapters),
        )
        logits: torch.Tensor = output.logits
        return logits

    def _take_adapters(self, names: list[str]) -> dict[str, Any]:
        """Have each row computed with its adapter, by PEFT's own mixed forward where there are several."""
        if self._adapted is None:
            return {}
        is_mixed = len(set(names)) > 1
        self._switch(self._adapted, next(name for name in names if name != BASE) if is_mixed else names[0])
        self._own.select(names)
        return {"adapter_names": names} if is_mixed else {}

    def _switch(self, model: AdaptedModel, adapter: str) -> None:
        if adapter == self._adapter:
            return
        if adapter == BASE:
            with warnings.catch_warnings():  # the warning claims that trained biases stay in the base; here they do not
                warnings.simplefilter("ignore", UserWarning)
                model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter)
        self._adapter = adapter

    def _choose(self, rows: Sequence[RunningSequence], logits: torch.Tensor) -> None:
        choosers = [running.chooser for running in rows if running.chooser]
        tokens = self._chooser.choose(choosers, [running.tokens for running in rows], logits)
        for running, token in zip(rows, tokens, strict=True):
            running.tokens.append(token)
            if token in running.ends:
                running.finish = "stop"
            elif len(running.tokens) >= running.sampling.max_new_tokens:
                running.finish = "length"


def _one_below_the_other(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join [rows, vocabulary] of several passes, whose adapters may have vocabularies of different sizes."""
    if len(logits) == 1:
        return logits[0]
    widest = max(part.shape[-1] for part in logits)
    return torch.cat([functional.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in logits])
