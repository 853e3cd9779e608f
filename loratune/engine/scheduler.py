"""Continuous batching: answers begin and end on their own while all that run share each forward pass.

As in Orca (Yu et al. 2022), steps are scheduled, not batches: part of the new prompts, then a token for every answer.
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from loratune.engine.kv_cache import Feed, SlotCache, reserved_tokens, token_bytes, use_slot_attention
from loratune.engine.prefix_cache import Prefixes
from loratune.engine.running import Running
from loratune.engine.token_choice import TokenChooser
from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.architecture.structure import causal_model, is_adapted, layer_count, output_layer
from loratune.model.kernels.few_rows import give_up_few_row_products, use_few_row_products
from loratune.protocols import AdaptedModel, CausalModel

PROMPT_PART = 512
"""Tokens of a prompt that are read at once, so that running answers don't wait for a long one."""
PROMPT_TOKENS = 2048
"""Tokens of all prompts that are read in one pass."""
KEPT_BYTES = 2 * 2**30
"""Keys and values that may stay while nothing runs: the next question of a conversation begins as the last one did."""


class Decoder:
    """Decodes many prompts with one model.

    Args:
        model: a causal language model in eval mode, with or without PEFT adapters; attends to slots from now on.
        slots: how many answers run at once.
        cache_budget_bytes: what keys and values may take; answers wait where they could need more. None is no bound.

    Raises:
        DecodingError: a kind of layer that has no keys and values.
    """

    def __init__(self, model: CausalModel, slots: int = 32, cache_budget_bytes: float | None = None) -> None:
        self.model = model
        self._adapted = model if is_adapted(model) else None
        base = causal_model(model)
        use_slot_attention(base)
        self._large_layers = use_few_row_products(base)
        # The last position's states are strided; a bfloat16 product of strided rows is a hundred times slower on a CPU.
        self._hook = output_layer(base).register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.slots = slots
        self.device = model.device
        self.generation_config = base.generation_config
        self.running: list[Running] = []
        """The answer in each slot; slots are taken from 0 on without a gap."""
        self.waiting: deque[Running] = deque()
        self._layers = layer_count(base.config)
        self._cache = SlotCache(self._layers)
        self._prefixes = Prefixes(self._cache)
        self._budget_tokens = None if cache_budget_bytes is None else cache_budget_bytes / token_bytes(base)
        self._adapter: str | None = None
        self._own = own_parameters(base)
        # PEFT computes rows of several adapters at once, but not with DoRA.
        configs = self._adapted.peft_config if self._adapted else {}
        self._apart = {name for name in configs if configs[name].use_dora or self._own.is_apart(name)}

    def vocabulary(self, adapter: str) -> int:
        """How many tokens an adapter knows: ids from it on cannot be in a prompt."""
        return self._own.vocabulary(adapter)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    def add(self, running: Running) -> None:
        """Put a prompt in the queue."""
        self.waiting.append(running)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def remove(self, running: Running) -> None:
        """End an answer, whether it waits or runs; its slot goes to the last one."""
        if running.slot < 0:
            if running in self.waiting:
                self.waiting.remove(running)
            return
        last = self.running.pop()
        self._prefixes.keep(last.slot, last.adapter, last.ids[: last.held])
        if last is not running:
            if last.held:
                self._cache.move(last.slot, running.slot, last.held)
            self.running[running.slot] = last
            last.slot = running.slot
        running.slot = -1

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(self) -> list[Running]:
        """Read a part of new prompts and make one token for each answer whose prompt is read.

        Returns:
            Those with a new token; they have left their slot if it was their last one.
        """
        while self.waiting and self._has_room():
            self._begin(self.waiting.popleft())
        answering = [running for running in self.running if running.tokens]
        reading = self._next_prompts()
        if reading:
            self._read(reading)
        if answering:
            logits = self._forward(answering, [running.tokens[-1:] for running in answering])
            self._choose(answering, logits)
        advanced = [*answering, *(running for running in reading if running.tokens)]
        for running in advanced:
            if running.finish:
                self.remove(running)
        if self.is_idle and self._cache.size_bytes > KEPT_BYTES:
            self.reset()
        return advanced

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def loss(self, prompt: list[int], answer: list[int], adapter: str = BASE) -> float:
        """Negative log-likelihood of an answer, in nats, summed over its tokens.

        Args:
            prompt: token ids, at least one.
            answer: token ids, the end token among them if it is to count.
            adapter: PEFT's name of it.
        """
        cache, read, total = SlotCache(self._layers), 0, 0.0
        sequence = [*prompt, *answer]
        cache.reserve(1, len(sequence))
        while read < len(sequence) - 1:
            part = sequence[read : min(read + PROMPT_PART, len(sequence) - 1)]
            feed = Feed([0], [read], [len(part)], self.device)
            read += len(part)
            scored = min(len(part), read + 1 - len(prompt))  # positions that an answer's token follows
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
        """Give the memory back, and the model as it was but for its attention."""
        self._cache.clear()
        self._hook.remove()
        give_up_few_row_products(self._large_layers)
        if self._adapted and self._adapter == BASE:
            self._adapted.base_model.enable_adapter_layers()
        if self._adapted:
            self._own.select([self._adapted.active_adapter])

    def _begin(self, running: Running) -> None:
        """Give an answer its slot, with what the slots know of its prompt already."""
        running.slot = len(self.running)
        settled = running.sampling.with_defaults(self.generation_config)
        running.chooser = TokenChooser(settled, running.prompt, self.device)
        self.running.append(running)
        self._cache.reserve(len(self.running), max(one.longest for one in self.running))
        running.read = self._prefixes.take(running.slot, running.adapter, running.prompt)

    def _has_room(self) -> bool:
        """Whether the next answer can run beside the others, even if all become as long as they may."""
        if not self.running or self._budget_tokens is None:
            return len(self.running) < self.slots
        longest = max(one.longest for one in (*self.running, self.waiting[0]))
        needed = reserved_tokens(len(self.running) + 1, longest)
        return len(self.running) < self.slots and needed <= self._budget_tokens

    def _next_prompts(self) -> list[Running]:
        """Prompts to be read next, in the order they came, as many as one pass takes."""
        chosen: list[Running] = []
        widest = 0
        for running in self.running:
            if running.tokens:
                continue
            widest = max(widest, min(PROMPT_PART, len(running.prompt) - running.read))
            if chosen and widest * (len(chosen) + 1) > PROMPT_TOKENS:
                break
            chosen.append(running)
        return chosen

    def _read(self, reading: Sequence[Running]) -> None:
        parts = [running.prompt[running.read : running.read + PROMPT_PART] for running in reading]
        logits = self._forward(reading, parts)
        for running, part in zip(reading, parts, strict=True):
            running.read += len(part)
        done = [index for index, running in enumerate(reading) if running.read == len(running.prompt)]
        self._choose([reading[index] for index in done], logits[done])

    def _forward(self, rows: Sequence[Running], new: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [rows, vocabulary] behind the last of each row's new tokens."""
        by_pass = defaultdict(list)
        for index, running in enumerate(rows):
            by_pass[running.adapter if running.adapter in self._apart else None].append(index)
        groups = list(by_pass.values())
        parts = []
        for group in groups:
            chosen = [rows[index] for index in group]
            feed = Feed([r.slot for r in chosen], [r.held for r in chosen], [len(new[i]) for i in group], self.device)
            logits = self._pass(self._cache, feed, [new[index] for index in group], [r.adapter for r in chosen])
            parts.append(logits[:, -1])
        if len(groups) == 1:
            return parts[0]
        order = torch.tensor([index for group in groups for index in group]).argsort()
        widest = max(part.shape[-1] for part in parts)  # one adapter may have a larger vocabulary than another
        padded = [functional.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts]
        return torch.cat(padded)[order.to(self.device)]

    def _pass(
        self, cache: SlotCache, feed: Feed, new: Sequence[Sequence[int]], adapters: list[str], keep: int = 1
    ) -> torch.Tensor:
        """Logits [rows, keep, vocabulary] of the last positions of a pass over new tokens."""
        filled = [[0] * (feed.width - len(tokens)) + list(tokens) for tokens in new]
        cache.feed = feed
        output = self.model(
            input_ids=torch.tensor(filled, device=self.device),
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
            with warnings.catch_warnings():  # that trained biases stay in the base, which they do not
                warnings.simplefilter("ignore", UserWarning)
                model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter)
        self._adapter = adapter

    def _choose(self, rows: Sequence[Running], logits: torch.Tensor) -> None:
        choosers = [running.chooser for running in rows]
        plain = all(chooser is not None and chooser.takes_likeliest for chooser in choosers)
        likeliest = logits.argmax(-1).tolist() if plain else []
        for index, (running, chooser) in enumerate(zip(rows, choosers, strict=True)):
            if chooser is None:
                raise RuntimeError("an answer without a slot")
            running.tokens.append(likeliest[index] if plain else chooser.choose(logits[index]))
            if running.tokens[-1] in running.ends:
                running.finish = "stop"
            elif len(running.tokens) >= running.sampling.max_new_tokens:
                running.finish = "length"
