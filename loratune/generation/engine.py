"""Load a model the way it was trained, and stream its answers."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, set_seed

from loratune.data.conversation import Message
from loratune.data.encoding import Encoder
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter import load_adapter
from loratune.model.base import load_base
from loratune.model.files import find_base, weight_files
from loratune.model.hardware import detect_hardware
from loratune.model.memory import is_out_of_memory
from loratune.model.tokenizer import load_tokenizer, set_pad_token
from loratune.recipe.sections import ModelSettings
from loratune.runs.opening import base_settings, check_same_base, merged_prompt, open_adapter


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    max_new_tokens: int = 512
    seed: int | None = None
    """Makes drawing repeatable."""


class Engine:
    """A loaded model with its prompt settings."""

    def __init__(self, model: Any, tokenizer: Any, encoder: Encoder) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.context_tokens: int = model.config.max_position_embeddings
        self._stop = threading.Event()

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, None]:
        """Yield the answer to the last message piece by piece.

        Closing the iterator stops the generation within a token.

        Raises:
            LoratuneError: the prompt fills the model's context, or memory runs out.
        """
        prompt = self.encoder.prompt_ids(messages)
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise LoratuneError(
                f"the prompt has {len(prompt)} tokens and the model takes {self.context_tokens}; shorten it", Exit.USAGE
            )
        self._stop.clear()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        worker = threading.Thread(target=self._generate, args=(prompt, sampling, room, streamer, failures), daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            self._stop.set()
            worker.join()
        if not failures.empty():
            raise _explained(failures.get())

    def _generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        room: int,
        streamer: TextIteratorStreamer,
        failures: queue.SimpleQueue[BaseException],
    ) -> None:
        try:
            if sampling.seed is not None:
                set_seed(sampling.seed)
            ids = torch.tensor([prompt], device=self.model.device)
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._generation_config(sampling, room),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopWhen(self._stop)]),
            )
        except BaseException as error:  # handed to the thread that reads the stream
            failures.put(error)
            streamer.end()

    def _generation_config(self, sampling: Sampling, room: int) -> GenerationConfig:
        """The model's own generation settings with the user's on top."""
        config = copy.deepcopy(self.model.generation_config)
        known = config.eos_token_id
        ends = known if isinstance(known, list) else [known]
        config.eos_token_id = sorted({*ends, self.encoder.end_id, self.tokenizer.eos_token_id} - {None})
        config.pad_token_id = self.tokenizer.pad_token_id
        config.max_new_tokens = min(sampling.max_new_tokens, room)
        config.max_length = None
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature if config.do_sample else None
        config.top_p = sampling.top_p if config.do_sample else None
        if not config.do_sample:
            config.top_k = None
        return config


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def load_engine(
    adapter: Path | None, model: str | None, use_adapter: bool, warnings: list[str], force: bool = False
) -> Engine:
    """Load an adapter on its base, or a model alone.

    Args:
        adapter: run folder, checkpoint or plain PEFT folder; None for a model alone.
        model: hub id or folder of the base; None takes what the adapter names.
        use_adapter: False leaves the adapter off and keeps its prompt settings, for a comparison.
        warnings: gets what could not be checked.
        force: take another base than that of the training, or an adapter whose files have changed.

    Raises:
        LoratuneError: something is missing, damaged, or does not belong together.
    """
    source = open_adapter(adapter, force) if adapter else None
    settings = base_settings(source, model) if source else ModelSettings(base=model or "")
    folder = find_base(settings)
    if source:
        warnings += check_same_base(source, settings.base, folder, weight_files(folder), force)
    tokenizer = load_tokenizer(source.tokenizer_folder(folder) if source else folder)
    encoder = Encoder(tokenizer, source.prompt if source else merged_prompt(folder))
    if source and source.manifest:
        _check_same_template(source.manifest, encoder)
    set_pad_token(tokenizer, {encoder.end_id, tokenizer.eos_token_id})
    loaded = load_base(settings, folder, detect_hardware())
    if source and use_adapter:
        loaded = load_adapter(loaded, source.adapter)
    loaded.eval()
    return Engine(loaded, tokenizer, encoder)


def _check_same_template(manifest: dict[str, Any], encoder: Encoder) -> None:
    if manifest["template"]["sha256"] != encoder.template_sha256:
        raise LoratuneError(
            "the prompt template is not the one of the training: the base's chat template has changed since; restore "
            "it, or use the run folder rather than a checkpoint",
            Exit.MODEL,
        )


def _explained(error: BaseException) -> BaseException:
    if is_out_of_memory(error):
        return LoratuneError("out of memory while answering; shorten the conversation with /reset", Exit.IO)
    return error
