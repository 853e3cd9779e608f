"""The inference engine: one thread runs the model for concurrent requests from any thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import Message
from loratune.engine.cache_choice import CACHE_SHARE
from loratune.engine.decoder_choice import open_decoder
from loratune.engine.loading import Lease, LoadedModel, ServedModel, open_voices
from loratune.engine.request_handle import RequestHandle, gathering, make_handle
from loratune.engine.scheduler import Decoder
from loratune.engine.sequence import RunningSequence
from loratune.engine.types import Answer, Delta, Divergence, GenerationRequest, joined
from loratune.engine.worker import Worker
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import text_config
from loratune.model.hardware import detect_hardware
from loratune.model.memory import free_memory_bytes
from loratune.protocols import CausalModel

if TYPE_CHECKING:
    from loratune.engine.adapter_store import AdapterStore

AHEAD = 2
"""Submitted requests per slot, so that no slot waits for the next one."""


class Engine:
    """A loaded model that answers many requests concurrently.

    Args:
        loaded: base model, with or without adapters.
        slots: maximum number of concurrent requests.
    """

    def __init__(self, loaded: LoadedModel, slots: int = 32) -> None:
        self.model = model = loaded.model
        self.base = loaded.base
        self.store: AdapterStore | None = None
        """Further adapters, which are loaded when they are asked for."""
        self.base_name, self.voices = loaded.base_name, loaded.voices
        self.warnings = list(loaded.warnings)
        self.adapters = [name for name in self.voices if name is not None]
        self.context_tokens: int = text_config(model.config).max_position_embeddings
        self.slots = slots
        hardware = detect_hardware()
        decoder = open_decoder(model, slots, CACHE_SHARE * free_memory_bytes(hardware))
        if decoder.notice:
            self.warnings.append(decoder.notice)
        room = decoder.room
        # Not on a CPU, whose memory is taken only as it is written.
        if hardware.is_gpu and room is not None and room < self.context_tokens:
            self.warnings.append(
                f"this GPU has room for the keys and values of {room:,} tokens, the model for "
                f"{self.context_tokens:,}; longer conversations are refused"
            )
            self.context_tokens = room
        self._tokenizer_lock = threading.Lock()
        self.worker = Worker(decoder)
        atexit.register(self.close)  # a thread inside torch would abort the process at exit

    @property
    def decoder(self) -> Decoder:
        """The decoder, for which requests wait or run."""
        return self.worker.decoder

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        self.worker.decoder = decoder

    def prompt_ids(self, question: GenerationRequest, voice: ServedModel | None = None) -> list[int]:
        """Return the token ids of a request's prompt.

        Args:
            question: the request.
            voice: what answers it; None for the one of its adapter's name.

        Raises:
            ToolError: the template does not support tools or tool calls.
            LoratuneError: the template rejects the conversation.
        """
        encoder = (voice or self._voice(question)).encoder
        with self._tokenizer_lock:  # tokenizers are not thread-safe: concurrent use gives wrong ids
            if isinstance(question.messages, str):
                ids: list[int] = encoder.tokenizer(question.messages, split_special_tokens=True).input_ids
                return ids
            return encoder.prompt_ids(question.messages, question.tools)

    def prompt_tokens(self, question: GenerationRequest) -> int:
        """Return the number of tokens of a request's prompt."""
        return len(self.prompt_ids(question))

    def submit(
        self, question: GenerationRequest, deliver: Callable[[Delta], None], lease: Lease | None = None
    ) -> RequestHandle:
        """Submit a request; thread-safe.

        Args:
            question: the request.
            deliver: called from the engine's thread with each chunk; the last chunk has the finish reason.
            lease: the adapter of a store that answers, released when the request has ended or failed; None for the
                one of the request's name.

        Raises:
            LoratuneError: the prompt is empty or too long for the model's context.
        """
        try:
            voice = lease.voice if lease else self._voice(question)
            handle = self._handle(question, deliver, voice)
            handle.ended = lease.release if lease else handle.ended
        except BaseException:
            if lease:
                lease.release()
            raise
        self.worker.take(handle)
        return handle

    def _handle(
        self, question: GenerationRequest, deliver: Callable[[Delta], None], voice: ServedModel
    ) -> RequestHandle:
        if not self.worker.is_alive:
            raise RuntimeError("the engine is closed")
        prompt = self.prompt_ids(question, voice)
        room = self.context_tokens - len(prompt)
        if room < 1 or not prompt:
            fault = f"has {len(prompt):,} tokens and the model's context has {self.context_tokens:,}; shorten it"
            raise LoratuneError(f"the prompt {fault if prompt else 'is empty'}", Exit.USAGE)
        adapter = voice.answering(question.use_adapter, prompt, self.decoder.vocabulary)
        sampling = question.sampling.but(max_new_tokens=min(question.sampling.max_new_tokens, room))
        version = voice.version if adapter == voice.adapter else ""
        running = RunningSequence(prompt, sampling, self._ends(voice.encoder), adapter, version)
        with self._tokenizer_lock:
            return make_handle(question, running, voice.encoder, deliver)

    def stream(self, question: GenerationRequest) -> Generator[Delta, None, None]:
        """Yield the answer in chunks. Closing the iterator cancels the answer within a token.

        Raises:
            LoratuneError: see `submit`; or the model ran out of memory.
        """
        pieces: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        handle = self.submit(question, pieces.put)
        try:
            while True:
                piece = pieces.get()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.finish:
                    return
        finally:
            handle.cancel()

    def answers(self, questions: Iterable[GenerationRequest]) -> Iterator[tuple[int, Answer]]:
        """Yield complete answers as they finish, each with the index of its request.

        Closing the iterator cancels unfinished answers.

        Raises:
            LoratuneError: see `stream`.
        """
        ended: queue.SimpleQueue[tuple[int, list[Delta]]] = queue.SimpleQueue()
        handles: dict[int, RequestHandle] = {}
        numbered = enumerate(questions)
        try:
            while True:
                while len(handles) < AHEAD * self.slots and (following := next(numbered, None)):
                    index, question = following
                    handles[index] = self.submit(question, gathering(index, ended))
                if not handles:
                    return
                index, pieces = ended.get()
                handle, whole = handles.pop(index), joined(*pieces)
                if whole.error is not None:
                    raise whole.error
                length = handle.prompt_tokens
                yield index, Answer(whole.text, whole.reasoning, length, whole.tokens, str(whole.finish), whole.calls)
        finally:
            for handle in handles.values():
                handle.cancel()

    def reference_loss(self, question: GenerationRequest, answer: Message | str) -> tuple[float, int]:
        """Compute the loss of an answer.

        Returns:
            Negative log-likelihood in nats, summed over the answer's tokens including the end token, and their number.

        Raises:
            LoratuneError: prompt and answer do not fit into the model's context.
        """
        voice = self._voice(question)
        prompt = self.prompt_ids(question)
        with self._tokenizer_lock:
            asked = () if isinstance(question.messages, str) else question.messages
            wanted = voice.encoder.reply_ids(asked, answer, question.tools)
        if not prompt or len(prompt) + len(wanted) > self.context_tokens:
            raise LoratuneError("prompt and answer do not fit into the model's context", Exit.USAGE)
        return -self.likelihood(question, prompt, wanted)[0], len(wanted)

    def divergence(self, text: str, adapter: str) -> Divergence:
        """Compare an adapter with its base on a text without a template; on none of one that exceeds the context."""
        ids = self.prompt_ids(GenerationRequest(text, adapter=adapter))
        if len(ids) > self.context_tokens:  # a model with a longer context would read more of it
            return Divergence(0, 0.0, 0.0, 0.0)
        name = self.voices[adapter].answering(True, ids, self.decoder.vocabulary)
        with self.worker.lock:
            found: Divergence = self.decoder.divergence(ids, name)
            return found

    def likelihood(self, question: GenerationRequest, context: list[int], answer: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of ids after others, in nats, and whether greedy decoding gives them.

        The question names the model; its messages are not read.
        """
        adapter = self._voice(question).answering(question.use_adapter, context + answer, self.decoder.vocabulary)
        with self.worker.lock:
            found: tuple[float, bool] = self.decoder.likelihood(context, answer, adapter)
            return found

    def use(self, model: CausalModel) -> None:
        """Go on with the model after adapters have been exchanged, between two steps."""
        self.model = model
        self.decoder.use(model)

    def close(self) -> None:
        """Cancel all requests and free the KV cache."""
        atexit.unregister(self.close)
        if self.store:
            self.store.close()
        self.worker.close()
        self.decoder.close()

    def _voice(self, question: GenerationRequest) -> ServedModel:
        if question.adapter not in self.voices:
            raise LoratuneError(
                f"no adapter is called {question.adapter}; there are {', '.join(self.adapters) or 'none'}", Exit.USAGE
            )
        return self.voices[question.adapter]

    def _ends(self, encoder: Encoder) -> frozenset[int]:
        known = self.decoder.generation_config.eos_token_id
        ends = known if isinstance(known, list) else [known]
        return frozenset({*ends, encoder.end_id, encoder.tokenizer.eos_token_id} - {None})


def load_engine(
    adapters: Sequence[tuple[str, Path]],
    model: str | None,
    force: bool = False,
    slots: int = 32,
    like: Path | None = None,
) -> Engine:
    """Load a model with its adapters and start the engine.

    Args:
        adapters: name and folder of each adapter: run folder, checkpoint or plain PEFT folder.
        model: hub id or folder of the base; None uses the base that the first adapter names.
        force: accept a different base, or an adapter whose files have changed.
        slots: maximum number of concurrent requests.
        like: an adapter for which the base is loaded as for the first one, if none is given.

    Returns:
        The engine; its `warnings` list what could not be checked.

    Raises:
        LoratuneError: a file is missing or damaged, or adapter and base do not match.
    """
    return Engine(open_voices(adapters, model, force, like), slots)
