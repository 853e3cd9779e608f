"""The chat's input line: history, multi-line input, completion, and pastes of any size."""

from __future__ import annotations

import math
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from loratune import console
from loratune.errors import LoratuneError, counted
from loratune.generation.chat.history import ChatHistory, history_path

MOST_PASTED_CHARACTERS = 2000
MOST_PASTED_LINES = 20
"""Larger pastes are shown as a placeholder, because each key press redraws the whole line."""
_MOST_TYPED_AT_ONCE = 64
_ONE_PASTE_SECONDS = 1


class ChatLine:
    """Reads questions from a terminal.

    Args:
        complete: returns completions of the last word, with short explanations.
        check_length: raises an error if a text is too long.
    """

    def __init__(self, complete: Callable[[str], list[tuple[str, str]]], check_length: Callable[[str], None]) -> None:
        self._check_length = check_length
        self._words = _Words(complete)
        self._pasted: dict[str, str] = {}
        self._inserted = ""
        """What the last paste inserted into the current line."""
        self._refused = -math.inf
        self._session: PromptSession[str] = PromptSession(
            history=_WithoutPastes(history_path(), self._pasted),
            multiline=True,
            key_bindings=self._keys(),
            completer=self._words,
            complete_while_typing=False,
            prompt_continuation="  ",
            enable_suspend=True,
            input=_Keyboard(sys.stdin),
            # If stdout is a file, the line is edited on stderr.
            output=create_output(always_prefer_tty=True),
        )

    def read(self, label: str) -> str | None:
        """Return the next text; None at its end (Ctrl-D).

        Args:
            label: text before the prompt sign.
        """
        while True:
            self._inserted = ""
            try:
                typed = self._session.prompt([("bold", f"{label}> ")])
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    console.say("Ctrl-D or /exit leaves the chat", style="dim")
                continue
            for sign, text in self._pasted.items():
                typed = typed.replace(sign, text)
            return typed

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Hide what is typed or pasted while an answer is shown; the next `read` returns it."""
        before = termios.tcgetattr(sys.stdin)
        unseen = [*before]
        unseen[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, unseen)
        # Without bracketed paste, each line of a paste would be sent as a separate question.
        self._session.output.enable_bracketed_paste()
        self._session.output.flush()
        try:
            yield
        finally:
            self._session.output.disable_bracketed_paste()
            self._session.output.flush()
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        editing = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=editing)
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=editing)
        def begin_line(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @keys.add("tab", filter=editing)
        def complete(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            found = [] if buffer.complete_state else list(self._words.get_completions(buffer.document))
            if len(found) == 1:  # synchronously: the library's own completion would lose to a quick Enter
                buffer.apply_completion(found[0])
            elif buffer.complete_state:
                buffer.complete_next()
            else:
                buffer.start_completion(insert_common_part=True)

        @keys.add(Keys.BracketedPaste, filter=editing)
        def paste(event: KeyPressEvent) -> None:
            self._paste(event.current_buffer, event.data.replace("\r\n", "\n").replace("\r", "\n"))

        return keys

    def _paste(self, buffer: Buffer, text: str) -> None:
        """Insert pasted text or its placeholder, or reject it if it is too long."""
        # Terminals deliver a long paste in parts; join a part to the one before it.
        before = self._inserted if buffer.document.text_before_cursor.endswith(self._inserted) else ""
        text = self._pasted.pop(before, before) + text
        buffer.delete_before_cursor(len(before))
        self._inserted = self._sign_for(text) if self._is_accepted(text) else ""
        buffer.insert_text(self._inserted)

    def _sign_for(self, text: str) -> str:
        """Return the text for the line: the pasted text if it is short, otherwise a placeholder."""
        line_count = text.count("\n") + 1
        if len(text) <= MOST_PASTED_CHARACTERS and line_count <= MOST_PASTED_LINES:
            return text
        sign = f"[paste {len(self._pasted) + 1}: {counted(len(text), 'character')}, {counted(line_count, 'line')}]"
        self._pasted[sign] = text
        return sign

    def _is_accepted(self, text: str) -> bool:
        """Return whether a text is short enough; warn once for all parts of a paste."""
        now = time.monotonic()
        belongs_to_refused = now < self._refused + _ONE_PASTE_SECONDS
        try:
            self._check_length(text)
        except LoratuneError as error:
            message = f"not pasted: {error}"
            if not belongs_to_refused:
                run_in_terminal(lambda: console.warn(message))
        else:
            if not belongs_to_refused:
                return True
        self._refused = now
        return False


class _Keyboard(Vt100Input):
    """Treats many characters that arrive at once as a paste, because some terminals do not mark pastes."""

    def read_keys(self) -> list[KeyPress]:
        pressed: list[KeyPress] = []
        for is_text, keys in groupby(super().read_keys(), key=lambda press: not isinstance(press.key, Keys)):
            run = list(keys)
            if is_text and len(run) > _MOST_TYPED_AT_ONCE:
                run = [KeyPress(Keys.BracketedPaste, "".join(press.data for press in run))]
            pressed += run
        return pressed


class _WithoutPastes(ChatHistory):
    """Excludes texts with placeholders from the history, since the placeholders only have a meaning in this chat."""

    def __init__(self, path: Path, pasted: dict[str, str]) -> None:
        super().__init__(path)
        self._pasted = pasted

    def store_string(self, string: str) -> None:
        if not any(sign in string for sign in self._pasted):
            super().store_string(string)


class _Words(Completer):
    def __init__(self, complete: Callable[[str], list[tuple[str, str]]]) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent | None = None) -> Iterable[Completion]:
        before = document.text_before_cursor
        length = len(before) - before.rfind(" ") - 1
        for word, meaning in self._complete(before):
            yield Completion(word, start_position=-length, display_meta=meaning)
