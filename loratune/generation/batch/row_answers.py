"""Generates and scores the answers of a file's rows, and assembles the output rows."""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune.data.formats.conversation import Message
from loratune.engine.engine import AHEAD, Engine
from loratune.engine.request_handle import RequestHandle
from loratune.engine.sampling import SEEDS, Sampling
from loratune.engine.types import Delta, GenerationRequest, joined
from loratune.errors import Interrupted, LoratuneError, counted
from loratune.generation.batch.answer_file import REFUSED, TOO_LONG, AnswerFile
from loratune.generation.batch.questions import AskedRow
from loratune.progress import counted_progress
from loratune.runtime import signals_to

BASE = "base"
"""Name of the side that an adapter is compared with."""
RESULTS = ("row", "answer", "reasoning", "tool_calls", "finish", "error", "tokens", "metrics", BASE)
"""Names of the columns that are added to a row."""
SHOW_SECONDS = 0.5
"""Maximum time between updates of the progress display."""


@dataclass(frozen=True)
class Side:
    """One of the models that answer: the base with or without an adapter."""

    name: str
    """Empty for the requested model; for a model that it is compared with, the column of its results, such as BASE."""
    adapter: str | None
    """Whose prompt settings it has; None for those of the base."""
    use_adapter: bool
    """False for the base alone."""

    @property
    def answer(self) -> str:
        """Kind of its answers in the file."""
        return f"{self.name} answer".strip()

    @property
    def loss(self) -> str:
        """Kind of its losses in the file."""
        return f"{self.name} loss".strip()


@dataclass(frozen=True)
class Work:
    """What is to be answered, and how."""

    rows: Sequence[AskedRow]
    sampling: Sampling
    sides: tuple[Side, ...]
    system: str | None
    """Replaces the system prompts of the rows and of the training."""
    scores: bool
    """Whether to compute the loss of the reference answers."""

    def question(self, row: AskedRow, side: Side) -> GenerationRequest:
        """Return the generation request for a row; each row has its own seed."""
        messages: list[Message] = list(row.messages)
        if self.system:
            messages = [{"role": "system", "content": self.system}, *(m for m in messages if m["role"] != "system")]
        seed = None if self.sampling.seed is None else (self.sampling.seed + row.number) % SEEDS
        return GenerationRequest(messages, self.sampling.but(seed=seed), side.adapter, side.use_adapter, row.tools)


@dataclass
class Tally:
    """Counts of one run."""

    answers: int = 0
    tokens: int = 0
    """Tokens of all answers, including unfinished ones."""
    seconds: float = 0.0


def answer_rows(engine: Engine, work: Work, file: AnswerFile) -> Tally:
    """Generate all results that are missing in the file.

    Raises:
        Interrupted: a signal arrived; finished results are kept.
        LoratuneError: the engine failed, or the file cannot be written.
    """
    tally = Tally()
    with _noted_signals() as events:
        try:
            _Answering(engine, work, file, events, tally).run()
            if work.scores:
                _add_losses(engine, work, file, events)
        except Interrupted as stop:
            total = len(work.rows) * len(work.sides)
            done = sum(file.count(side.answer) for side in work.sides)
            raise Interrupted(
                stop.signal_number,
                f"stopped: {done:,} of {counted(total, 'answer')} kept in {file.part}; the same command resumes",
            ) from stop
    return tally


class _Answering:
    """Keeps the engine's slots full, longest prompts first: memory runs out early if at all, no long one is last."""

    def __init__(
        self, engine: Engine, work: Work, file: AnswerFile, events: queue.SimpleQueue[Any], tally: Tally
    ) -> None:
        self.engine, self.work, self.file, self.events, self.tally = engine, work, file, events, tally
        self._waiting = deque(
            (side, row)
            for side in work.sides
            for row in sorted(work.rows, key=lambda row: row.size_bytes, reverse=True)
            if not file.has(row.number, side.answer)
        )
        self._open: dict[tuple[int, str], RequestHandle] = {}
        """Row and kind of the answers in progress."""
        self._ended_tokens = 0

    def run(self) -> None:
        """Generate until nothing is missing."""
        total = len(self.work.rows) * len(self.work.sides)
        kept = total - len(self._waiting)
        started = time.monotonic()
        try:
            with counted_progress("answers", total, kept) as show:
                while self._waiting or self._open:
                    self._hand_in()
                    with suppress(queue.Empty):
                        self._take(self.events.get(timeout=SHOW_SECONDS) if self._open else None)
                    rate = self.tally.tokens / (time.monotonic() - started)
                    show(kept + self.tally.answers, f"{rate:,.0f} tokens/s", self._begun())
        finally:
            self.tally.seconds = time.monotonic() - started
            for handle in self._open.values():
                handle.cancel()

    def _begun(self) -> float:
        """Return how many answers those in progress amount to, if they get as long as the ended ones.

        Short answers end first, so one as long as the limit is counted with them.
        """
        usual = (self._ended_tokens + self.work.sampling.max_new_tokens) / (self.tally.answers + 1)
        return min((self.tally.tokens - self._ended_tokens) / usual, len(self._open))

    def _hand_in(self) -> None:
        while self._waiting and len(self._open) < AHEAD * self.engine.slots:
            side, row = self._waiting.popleft()
            question, key = self.work.question(row, side), (row.number, side.answer)
            try:
                self._open[key] = self.engine.submit(question, partial(self._gather, key, []))
            except LoratuneError as error:
                self._keep(key, {"answer": "", **self._why_unanswered(question, error), "tokens": 0})

    def _why_unanswered(self, question: GenerationRequest, error: LoratuneError) -> dict[str, str]:
        """Return the finish reason of a row that the engine did not accept.

        Raises:
            LoratuneError: the row is not the cause.
        """
        try:
            length = self.engine.prompt_tokens(question)
        except LoratuneError as refusal:
            return {"finish": REFUSED, "error": str(refusal)}
        if length >= self.engine.context_tokens:
            return {"finish": TOO_LONG}
        if length:
            raise error
        return {"finish": REFUSED, "error": str(error)}

    def _gather(self, key: tuple[int, str], pieces: list[Delta], piece: Delta) -> None:
        """Collect an answer's chunks in the engine's thread, without waking the main thread for each of them."""
        self.tally.tokens += piece.tokens - (pieces[-1].tokens if pieces else 0)
        pieces.append(piece)
        if piece.finish:
            self.events.put((key, pieces))

    def _take(self, event: Any) -> None:
        """Process an event: the number of a signal, or the chunks of a whole answer."""
        if event is None:
            return
        if isinstance(event, int):
            raise Interrupted(event)
        key, pieces = event
        whole = joined(*pieces)
        if whole.error is not None:
            raise whole.error
        del self._open[key]
        values = {"answer": whole.text, "finish": whole.finish, "tokens": whole.tokens}
        others = {"reasoning": whole.reasoning, "tool_calls": [call.in_message() for call in whole.calls]}
        self._keep(key, values | {name: value for name, value in others.items() if value})

    def _keep(self, key: tuple[int, str], values: dict[str, Any]) -> None:
        self.file.add(*key, values)
        self.tally.answers += 1
        self._ended_tokens += values["tokens"]


def _add_losses(engine: Engine, work: Work, file: AnswerFile, events: queue.SimpleQueue[Any]) -> None:
    """Compute the loss of each reference answer, while the engine is otherwise idle."""
    todo = [
        (side, row, row.answer)
        for side in work.sides
        for row in work.rows
        if row.answer is not None and not file.has(row.number, side.loss)
    ]
    total = sum(row.answer is not None for row in work.rows) * len(work.sides)
    with counted_progress("references scored", total, total - len(todo)) as show:
        for count, (side, row, answer) in enumerate(todo, start=total - len(todo) + 1):
            if not events.empty():
                raise Interrupted(events.get())
            loss: float | None = None
            tokens = 0
            with suppress(LoratuneError):  # prompt and reference do not fit into the context
                loss, tokens = engine.reference_loss(work.question(row, side), answer)
            known = loss if loss is not None and math.isfinite(loss) else None
            file.add(row.number, side.loss, {"loss": known, "tokens": tokens})
            show(count, "")


def free_names(work: Work) -> dict[str, str]:
    """Return input columns whose names collide with the answers' → their new names."""
    used = {key for row in work.rows for key in row.fields}
    renamed: dict[str, str] = {}
    for name in dict.fromkeys((*RESULTS, *(side.name for side in work.sides if side.name))):
        if name in used:
            other = f"input_{name}"
            while other in used:
                other = f"input_{other}"
            renamed[name] = other
    return renamed


def whole_rows(work: Work, file: AnswerFile, scores: dict[tuple[str, int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the final file: their own columns, then the answers.

    Args:
        work: the rows and sides that were answered.
        file: holds all results.
        scores: side and row → metrics.
    """
    renamed = free_names(work)
    for row in work.rows:
        whole = {renamed.get(key, key): value for key, value in row.fields.items()} | {"row": row.number}
        for side in work.sides:
            result = file.read(row.number, side.answer)
            if (side.name, row.number) in scores:
                result["metrics"] = scores[side.name, row.number]
            whole |= {side.name: result} if side.name else result
        yield whole


@contextmanager
def _noted_signals() -> Iterator[queue.SimpleQueue[Any]]:
    """Yield an event queue that also receives signals, so that a signal never interrupts a write."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with signals_to(lambda number, _: events.put(number)):
        yield events
