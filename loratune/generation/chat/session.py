"""The chat session, in a terminal or with piped input: streams answers and runs commands."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from loratune import console
from loratune.engine.engine import Engine
from loratune.engine.sampling import NUMBERS, Sampling
from loratune.errors import Exit, LoratuneError, counted
from loratune.generation.chat.answering import Reply, Screen, ask, interrupts
from loratune.generation.chat.commands import Asked, Left, complete, run_command
from loratune.generation.chat.screen import OneAnswer
from loratune.generation.chat.state import ChatState, Turn

if TYPE_CHECKING:
    from loratune.generation.chat.line import ChatLine


class Chat:
    """A conversation that grows turn by turn.

    Args:
        engine: generates the answers.
        sampling: sampling settings.
        adapter: name of the first adapter; None for the base alone.
        system: system prompt; None uses the one that the adapter was trained with.
        use_adapter: False disables the adapter's weights, but keeps its prompt settings.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        adapter: str | None = None,
        system: str | None = None,
        use_adapter: bool = True,
    ) -> None:
        self.state = ChatState(engine, sampling, adapter, clean(system) if system else None, use_adapter)
        self._line: ChatLine | None = None
        self._takes_commands = True

    def run(self) -> None:
        """Answer what is typed, or each piped line, until the end of input or /exit.

        Raises:
            LoratuneError: a piped line is not UTF-8, or cannot be answered.
        """
        if not sys.stdin.isatty():
            self._run_piped()
            return
        from loratune.generation.chat.line import ChatLine  # noqa: PLC0415 - one answer needs no line editor

        console.say("type a question; /help lists the commands", style="dim")
        self._line = ChatLine(partial(complete, self.state), self.state.check_length)
        while (typed := self._line.read(self._label())) is not None:
            try:
                self._answer_if_asked(self._asked(typed))
            except LoratuneError as error:
                console.error(str(error))
            except Left:
                return

    def answer_once(self, question: str) -> None:
        """Write one answer, and nothing else, to stdout.

        Raises:
            LoratuneError: the question does not fit into the context, or the engine failed.
        """
        self._takes_commands = False
        self._answer(Asked(clean(question)))

    def _run_piped(self) -> None:
        for line in _piped_lines(most_bytes=4 * self.state.most_characters + 4):
            try:
                asked = self._asked(line)
            except LoratuneError as error:
                console.warn(str(error))
            except Left:
                return
            else:
                self._answer_if_asked(asked)

    def _label(self) -> str:
        """Return the name of the model that answers, if there is a choice."""
        if self.state.compares:
            return "compare "
        return f"{self.state.answers_from} " if self.state.engine.adapters else ""

    @property
    def _is_watched(self) -> bool:
        """Whether questions are typed and answers are shown on a terminal, not written to a file."""
        return self._line is not None and sys.stdout.isatty()

    def _asked(self, typed: str) -> Asked | None:
        """Return the typed question, or the one that results from a typed command."""
        text = clean(typed).strip()
        if text.startswith("/") and not text.startswith("//"):
            return run_command(self.state, text)
        return Asked(text[1:] if text.startswith("//") else text)

    def _answer_if_asked(self, asked: Asked | None) -> None:
        if asked and asked.text:
            self._answer(asked)

    def _answer(self, asked: Asked) -> None:
        state = self.state
        state.check_length(asked.text)
        state.attempt = state.attempt + 1 if asked.is_retry else 0
        state.unanswered = asked.text
        try:
            self._make_room(asked.text)
            reply = self._ask(asked)
            state.keep(asked.text, reply)
        finally:
            if asked.earlier and state.unanswered is not None:
                state.turns.append(asked.earlier)
                state.unanswered = None
        self._say_how_it_ended(reply, asked.earlier)
        if self._is_watched:
            console.write_result("")

    def _make_room(self, text: str) -> None:
        if self.state.make_room(text):
            console.warn(
                f"the conversation has outgrown the model's context of {self.state.engine.context_tokens:,} tokens; "
                f"the prompt leaves out the oldest {counted(self.state.left_out, 'turn')}"
            )

    def _ask(self, asked: Asked) -> Reply:
        """Return the answer that becomes part of the conversation."""
        state = self.state
        compares = asked.compares or state.compares
        uses = (False, True) if compares else (state.use_adapter,)
        questions = [state.question(asked.text, use) for use in uses]
        screen: Screen = OneAnswer(self._is_watched)
        if compares:
            from loratune.generation.chat.columns import Columns  # noqa: PLC0415 - loads prompt_toolkit

            width = shutil.get_terminal_size().columns if self._is_watched else None
            screen = Columns((f"{state.engine.base_name} (base)", str(state.adapter)), width)
        if self._line is None:  # Ctrl-C ends the program
            return ask(state.engine, questions, screen, lambda: False)[-1]
        with interrupts() as is_stopped, self._line.unseen():
            return ask(state.engine, questions, screen, is_stopped)[-1]

    def _say_how_it_ended(self, reply: Reply, earlier: Turn | None) -> None:
        """Print why an answer ended, unless it ended by itself."""
        instead = "the earlier answer is kept" if earlier else "the question is not kept; /retry repeats it"
        is_empty = not reply.text.strip()
        note = "an empty answer" + (f"; {instead}" if self._takes_commands else "") if is_empty else ""
        if reply.finish == "cancelled":
            note = f"stopped; {instead if is_empty else 'the partial answer is kept'}"
        elif reply.finish == "length":
            note = f"cut off after {counted(reply.tokens, 'token')}" + self._way_on(reply.tokens)
        elif earlier and earlier.reply.text == reply.text and self.state.sampling.temperature == 0:
            note = "the same answer; /set temperature=0.7 lets answers differ"
        if note:
            console.say(f"[{note}]", style="dim")

    def _way_on(self, tokens: int) -> str:
        """Return what lets an answer be longer than so many tokens."""
        limit, highest = self.state.sampling.max_new_tokens, int(NUMBERS["max_new_tokens"].high)
        if tokens < limit:
            return "; the context is full"
        if limit == highest:
            return ""
        flag = "/set max_new_tokens=" if self._takes_commands else "--max-new-tokens "
        return f"; {flag}{min(2 * limit, highest)} allows more"


def clean(text: str) -> str:
    """Replace undecodable bytes and unpaired surrogates, which no model can read, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _piped_lines(most_bytes: int) -> Iterator[str]:
    """Yield the non-blank lines of stdin.

    Args:
        most_bytes: longer lines are split.

    Raises:
        LoratuneError: a line is not UTF-8.
    """
    for number, line in enumerate(iter(partial(sys.stdin.buffer.readline, most_bytes), b""), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise LoratuneError(
                f"standard input, line {number}: not UTF-8 ({error.reason}); convert it first", Exit.DATA
            ) from error
        if text.strip():
            yield text
