"""The terminal chat: a conversation with streamed answers and a few commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from prompt_toolkit import PromptSession

from loratune import console
from loratune.data.conversation import Message
from loratune.errors import LoratuneError
from loratune.generation.engine import Engine, Sampling

HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt and start anew; without TEXT the usual one
/help           these lines
/exit           leave; so does Ctrl-D
Ctrl-C          stop an answer"""


class Chat:
    """A conversation that grows turn by turn."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.system = system
        """System prompt; None leaves it to the settings that the adapter was trained with."""
        self.messages: list[Message] = []

    def run(self) -> None:
        """Read lines and answer them until the end of input or /exit."""
        console.say("type a question; /help lists the commands", style="dim")
        for line in _read_lines():
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._answer(text)

    def answer_once(self, question: str) -> None:
        """Write one answer, and nothing else, to stdout."""
        self.messages.append({"role": "user", "content": question})
        for piece in self.engine.stream(self._prompt(), self.sampling):
            console.write_result(piece, end="")
        console.write_result("")

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        match name:
            case "/reset":
                self.messages = []
                console.say("forgotten; the next question starts a new conversation", style="dim")
            case "/system":
                self.system = rest.strip() or None
                self.messages = []
                console.say(f"system prompt: {self.system or 'the usual one'}; a new conversation", style="dim")
            case "/help":
                console.say(HELP, style="dim")
            case _:
                console.warn(f"no command {name}; /help lists them")

    def _answer(self, question: str) -> None:
        """Stream one answer; Ctrl-C ends it and keeps what has been said."""
        self.messages.append({"role": "user", "content": question})
        self._forget_oldest()
        said: list[str] = []
        with _Interrupts() as interrupted, closing(self.engine.stream(self._prompt(), self.sampling)) as pieces:
            try:
                for piece in pieces:
                    console.write_result(piece, end="")
                    said.append(piece)
                    if interrupted():
                        break
            except LoratuneError as error:
                console.error(str(error))
        console.write_result(" [stopped]" if interrupted() else "")
        if said:
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()

    def _prompt(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _forget_oldest(self) -> None:
        """Drop the oldest turns when a full answer would no longer fit into the model's context."""
        room = self.engine.context_tokens - min(self.sampling.max_new_tokens, self.engine.context_tokens // 2)
        forgotten = 0
        while len(self.messages) > 1 and len(self.engine.encoder.prompt_ids(self._prompt())) > room:
            del self.messages[:2]
            forgotten += 1
        if forgotten:
            console.warn(
                f"the conversation is longer than the model's context; the oldest {forgotten} turns are dropped"
            )


class _Interrupts:
    """Turns Ctrl-C into a question that a loop can ask, for as long as the block lasts."""

    def __enter__(self) -> Any:
        self.pressed = False
        self.previous = signal.signal(signal.SIGINT, self._press)
        return lambda: self.pressed

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _press(self, *_: object) -> None:
        self.pressed = True


def _read_lines() -> Iterator[str]:
    """Lines typed at a prompt with history and editing, or piped in."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    session: PromptSession[str] = PromptSession()
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
