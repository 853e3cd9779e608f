"""The inference engine: one thread runs the model for concurrent requests from any thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import Message
from loratune.engine.cache_choice import CACHE_SHARE
from loratune.engine.decoder_choice import open_decoder
from loratune.engine.loading import LoadedModel, ServedModel, open_voices
from loratune.engine.request_handle import RequestHandle, gathering, make_handle
from loratune.engine.sequence import RunningSequence
from loratune.engine.types import NOTHING, Answer, Delta, Divergence, GenerationRequest, joined
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import text_config
from loratune.model.hardware import detect_hardware
from loratune.model.memory import free_memory_bytes, is_out_of_memory

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
        self.base_name, self.voices = loaded.base_name, loaded.voices
        self.warnings = list(loaded.warnings)
        self.adapters = [name for name in self.voices if name is not None]
        self.context_tokens: int = text_config(model.config).max_position_embeddings
        self.slots = slots
        hardware = detect_hardware()
        self.decoder = open_decoder(model, slots, CACHE_SHARE * free_memory_bytes(hardware))
        if self.decoder.notice:
            self.warnings.append(self.decoder.notice)
        room = self.decoder.room
        # Not on a CPU, whose memory is taken only as it is written.
        if hardware.is_gpu and room is not None and room < self.context_tokens:
            self.warnings.append(
                f"this GPU has room for the keys and values of {room:,} tokens, the model for "
                f"{self.context_tokens:,}; longer conversations are refused"
            )
            self.context_tokens = room
        self._inbox: queue.SimpleQueue[RequestHandle | None] = queue.SimpleQueue()
        self._handles: dict[RunningSequence, RequestHandle] = {}
        self._model_lock, self._tokenizer_lock = threading.Lock(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch would abort the process at exit

    def prompt_ids(self, question: GenerationRequest) -> list[int]:
        """Return the token ids of a request's prompt.

        Raises:
            ToolError: the template does not support tools or tool calls.
            LoratuneError: the template rejects the conversation.
        """
        encoder = self._voice(question).encoder
        with self._tokenizer_lock:  # tokenizers are not thread-safe: concurrent use gives wrong ids
            if isinstance(question.messages, str):
                ids: list[int] = encoder.tokenizer(question.messages, split_special_tokens=True).input_ids
                return ids
            return encoder.prompt_ids(question.messages, question.tools)

    def prompt_tokens(self, question: GenerationRequest) -> int:
        """Return the number of tokens of a request's prompt."""
        return len(self.prompt_ids(question))

    def submit(self, question: GenerationRequest, deliver: Callable[[Delta], None]) -> RequestHandle:
        """Submit a request; thread-safe.

        Args:
            question: the request.
            deliver: called from the engine's thread with each chunk; the last chunk has the finish reason.

        Raises:
            LoratuneError: the prompt is empty or too long for the model's context.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the engine is closed")
        voice, prompt = self._voice(question), self.prompt_ids(question)
        room = self.context_tokens - len(prompt)
        if room < 1 or not prompt:
            fault = f"has {len(prompt):,} tokens and the model's context has {self.context_tokens:,}; shorten it"
            raise LoratuneError(f"the prompt {fault if prompt else 'is empty'}", Exit.USAGE)
        adapter = voice.answering(question.use_adapter, prompt, self.decoder.vocabulary)
        sampling = question.sampling.but(max_new_tokens=min(question.sampling.max_new_tokens, room))
        running = RunningSequence(prompt, sampling, self._ends(voice.encoder), adapter)
        with self._tokenizer_lock:
            handle = make_handle(question, running, voice.encoder, deliver)
        self._inbox.put(handle)
        return handle

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
        with self._model_lock:
            found: Divergence = self.decoder.divergence(ids, name)
            return found

    def likelihood(self, question: GenerationRequest, context: list[int], answer: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of ids after others, in nats, and whether greedy decoding gives them.

        The question names the model; its messages are not read.
        """
        adapter = self._voice(question).answering(question.use_adapter, context + answer, self.decoder.vocabulary)
        with self._model_lock:
            found: tuple[float, bool] = self.decoder.likelihood(context, answer, adapter)
            return found

    def close(self) -> None:
        """Cancel all requests and free the KV cache."""
        atexit.unregister(self.close)
        self._inbox.put(None)
        self._thread.join()
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

    def _work(self) -> None:
        """Run the engine's thread: accept requests, make a step, deliver new tokens."""
        while self._take_in():
            try:
                for handle in [handle for handle in self._handles.values() if handle.is_cancelled.is_set()]:
                    self._end(handle, "cancelled")
                if self.decoder.is_idle:
                    continue
                with self._model_lock:
                    advanced = self.decoder.step()
                for running in advanced:
                    self._hand_out(self._handles[running])
            except BaseException as error:  # delivered to all waiting requests
                for handle in list(self._handles.values()):
                    self._end(handle, "error", _explained(error))
                self.decoder.reset()
        while not self._inbox.empty():
            if late := self._inbox.get():
                self._handles[late.running] = late
        for handle in list(self._handles.values()):
            self._end(handle, "cancelled")

    def _take_in(self) -> bool:
        """Accept submitted requests, blocking if there is no other work; return False at the end."""
        wait = not self._handles
        while wait or not self._inbox.empty():
            handle = self._inbox.get()
            if handle is None:
                return False
            self._handles[handle.running] = handle
            self.decoder.add(handle.running)
            wait = False
        return True

    def _hand_out(self, handle: RequestHandle) -> None:
        running = handle.running
        try:
            piece = handle.push(running.tokens[-1])
        except Exception as error:  # a decoding error ends only this request
            self._end(handle, "error", error)
            return
        finish = "stop" if handle.is_stopped else running.finish
        if finish:
            self._end(handle, finish, before=piece)
        elif piece.has_come:
            self._tell(handle, piece)

    def _end(
        self, handle: RequestHandle, finish: str, error: BaseException | None = None, before: Delta = NOTHING
    ) -> None:
        """Deliver the last chunk and remove the request."""
        self.decoder.remove(handle.running)
        del self._handles[handle.running]
        try:
            last = handle.finish(before, finish, error)
        except Exception as fault:
            last = replace(before, finish="error", error=error or fault)
        self._tell(handle, last)

    def _tell(self, handle: RequestHandle, piece: Delta) -> None:
        """Deliver a chunk; an exception in the consumer cancels only its own request."""
        try:
            handle.deliver(piece)
        except Exception:
            handle.cancel()


def _explained(error: BaseException) -> BaseException:
    if is_out_of_memory(error):
        return LoratuneError("out of memory during generation; shorten the conversation, or use fewer slots", Exit.IO)
    return error


def load_engine(
    adapters: Sequence[tuple[str, Path]], model: str | None, force: bool = False, slots: int = 32
) -> Engine:
    """Load a model with its adapters and start the engine.

    Args:
        adapters: name and folder of each adapter: run folder, checkpoint or plain PEFT folder.
        model: hub id or folder of the base; None uses the base that the first adapter names.
        force: accept a different base, or an adapter whose files have changed.
        slots: maximum number of concurrent requests.

    Returns:
        The engine; its `warnings` list what could not be checked.

    Raises:
        LoratuneError: a file is missing or damaged, or adapter and base do not match.
    """
    return Engine(open_voices(adapters, model, force), slots)
