"""State of the chat: turns, settings, and the number of old turns that no longer fit into the context."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.data.formats.conversation import Message, with_reasoning
from loratune.engine.engine import Engine
from loratune.engine.sampling import SEEDS, Sampling
from loratune.engine.types import GenerationRequest
from loratune.errors import Exit, LoratuneError
from loratune.generation.chat.answering import Reply
from loratune.printable import printable_json, visible
from loratune.writing import write_text

BASE = "base"
"""Name of the model without adapter in commands."""
MOST_CHARACTERS_PER_TOKEN = 16
"""Longer texts are rejected without tokenising them, which is slow; hardly any token covers this many characters."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    reply: Reply


@dataclass
class ChatState:
    """A conversation and its settings."""

    engine: Engine
    sampling: Sampling
    adapter: str | None
    """Name of the adapter with the prompt settings, which also answers unless `use_adapter` is False."""
    system: str | None
    """System prompt; None uses the one that the adapter was trained with."""
    use_adapter: bool = True
    compares: bool = False
    """Whether both base and adapter answer every question."""
    turns: list[Turn] = field(default_factory=list)
    left_out: int = 0
    """Number of oldest turns that no longer fit into the context."""
    unanswered: str | None = None
    """The last question, if it has no answer; it can be repeated."""
    attempt: int = 0
    """How often the last question was repeated."""
    asked: int = 0
    tokens: int = 0
    """Generated tokens of all answers since the program started."""
    last: Reply | None = None

    @property
    def answers_from(self) -> str:
        """Name of the model that answers, as used in commands."""
        return self.adapter if self.adapter and self.use_adapter else BASE

    @property
    def most_characters(self) -> int:
        """Length of the longest text that is tokenised."""
        return self.engine.context_tokens * MOST_CHARACTERS_PER_TOKEN

    def check_length(self, text: str) -> None:
        """Raise if a text cannot fit into the context.

        Raises:
            LoratuneError: the text is too long.
        """
        if len(text) > self.most_characters:
            raise LoratuneError(
                f"a text of {len(text):,} characters is longer than the model's context of "
                f"{self.engine.context_tokens:,} tokens; shorten it",
                Exit.USAGE,
            )

    def question(self, text: str, use_adapter: bool | None = None, left_out: int | None = None) -> GenerationRequest:
        """Return a generation request with the conversation before the question.

        Args:
            text: the question.
            use_adapter: whether the adapter answers; None uses the chat's setting.
            left_out: number of oldest turns to omit; None uses the current number.
        """
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[self.left_out if left_out is None else left_out :]:
            messages.append({"role": "user", "content": turn.question})
            # The template decides whether it stays in the prompt.
            answer = with_reasoning(turn.reply.text, turn.reply.reasoning)
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": text})
        sampling = self.sampling
        if sampling.seed is not None and self.attempt:
            sampling = sampling.but(seed=(sampling.seed + self.attempt) % SEEDS)
        uses = self.use_adapter if use_adapter is None else use_adapter
        return GenerationRequest(messages, sampling, self.adapter, uses)

    def make_room(self, text: str) -> int:
        """Omit as many old turns as needed to fit the question and an answer of full length.

        Returns:
            The number of additionally omitted turns.
        """
        room = self.engine.context_tokens - min(self.sampling.max_new_tokens, self.engine.context_tokens // 2)

        def fits(left_out: int) -> bool:
            return self.engine.prompt_tokens(self.question(text, left_out=left_out)) <= room

        before, low, high = self.left_out, self.left_out + 1, len(self.turns)
        if before >= high or fits(before):
            return 0
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        self.left_out = high
        return high - before

    def keep(self, question: str, reply: Reply) -> None:
        """Add an answer to the conversation, unless it is empty."""
        self.asked += 1
        self.tokens += reply.tokens
        self.last = reply
        self.unanswered = None if reply.text.strip() else question
        if self.unanswered is None:
            self.turns.append(Turn(question, reply))

    def take_back(self) -> Turn | None:
        """Remove the last turn and return it; None if there is none."""
        self.unanswered, self.left_out = None, 0
        return self.turns.pop() if self.turns else None

    def forget(self) -> None:
        self.turns, self.unanswered, self.left_out, self.attempt = [], None, 0, 0

    def save(self, path: Path, overwrite: bool) -> None:
        """Save the conversation: .md for reading, .json as a training row.

        Raises:
            LoratuneError: there are no turns, the extension is unsupported, or the file exists or is not writable.
        """
        if path.suffix not in (".md", ".json"):
            raise LoratuneError(f"{path}: give a name that ends in .md or .json", Exit.USAGE)
        if not self.turns:
            raise LoratuneError("there is no conversation to save yet", Exit.USAGE)
        try:
            if path.exists() and not overwrite:
                raise LoratuneError(f"{path} exists; /save! {path} replaces it", Exit.USAGE)
            write_text(path, self._markdown() if path.suffix == ".md" else self._json())
        except OSError as error:
            raise LoratuneError(f"{path}: cannot be written: {error.strerror}", Exit.IO) from error

    def _markdown(self) -> str:
        parts = [f"**System**\n\n{self.system}"] if self.system else []
        for turn in self.turns:
            parts.append(f"**Question**\n\n{turn.question}")
            if turn.reply.reasoning.strip():
                lines = turn.reply.reasoning.strip().splitlines()
                parts.append("\n".join(f"> {line}".rstrip() for line in lines))
            parts.append(f"**Answer**\n\n{turn.reply.text.strip()}")
        return visible("\n\n".join(parts)) + "\n"

    def _json(self) -> str:
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            answer = {"role": "assistant", "content": turn.reply.text}
            if turn.reply.reasoning.strip():
                answer["reasoning_content"] = turn.reply.reasoning
            messages += [{"role": "user", "content": turn.question}, answer]
        return printable_json([{"messages": messages}]) + "\n"
