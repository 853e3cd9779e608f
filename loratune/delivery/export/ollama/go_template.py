"""Converts a chat template to a Go template for Ollama, by rendering the tokenizer's own.

Marked texts are rendered, and the texts between the marks become the parts. Conversations of several shapes are then
composed from the parts and compared with the tokenizer's renderings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loratune.data.formats.conversation import Message
from loratune.delivery.export.ollama.go_text import written
from loratune.errors import Exit, LoratuneError


class Render(Protocol):
    """Renders the prompt of messages, the last of which is from a user or tool."""

    def __call__(self, messages: list[Message], tools: Sequence[dict[str, Any]] = ()) -> str: ...


@dataclass(frozen=True)
class ToolActions:
    """The parts of a Go template that deal with tools."""

    offer: str
    """Writes the text before the first question if tools are offered, including the system prompt."""
    answer: str
    """Writes an answer and its calls."""
    result: str
    """Writes the result of a call."""


@dataclass(frozen=True)
class ChatParts:
    """The texts of a chat template around the messages.

    A prompt is `before_system` system `after_system`, or `no_system` without a system prompt; then `before_user` user
    `before_answer` answer `after_answer` for each earlier turn; then `before_user` user `generation_prompt`.
    """

    before_system: str
    after_system: str
    no_system: str
    before_user: str
    before_answer: str
    after_answer: str
    generation_prompt: str

    @property
    def default_system(self) -> str:
        """The template's default system prompt; empty if it has none."""
        text = self.no_system
        around = len(self.before_system) + len(self.after_system)
        is_framed = text.startswith(self.before_system) and text.endswith(self.after_system) and len(text) > around
        return text[len(self.before_system) : len(text) - len(self.after_system)] if is_framed else ""

    def compose(self, messages: list[Message]) -> str:
        """Compose a prompt from the parts, as Ollama does; the last message is the user's."""
        text = self.no_system
        for place, message in enumerate(messages):
            is_last = place == len(messages) - 1
            if message["role"] == "system":
                text = self.before_system + message["content"] + self.after_system
            elif message["role"] == "user":
                text += self.before_user + message["content"]
                text += self.generation_prompt if is_last else self.before_answer
            else:
                text += message["content"] + self.after_answer
        return text

    def go_template(self, tools: ToolActions | None = None) -> str:
        """Return the Go template; it leaves a conversation that ends with an answer open, to be continued.

        Args:
            tools: actions that write tools and calls, if they are supported.
        """
        part = {name: written(text) for name, text in vars(self).items()}
        after_user = part["before_answer"]
        if self.generation_prompt != self.before_answer:
            after_user = f"{{{{ if $last }}}}{part['generation_prompt']}{{{{ else }}}}{after_user}{{{{ end }}}}"
        after_answer = f"{{{{ if not $last }}}}{part['after_answer']}{{{{ end }}}}"
        lines = [
            *([f"{{{{- if .Tools }}}}{tools.offer}", "{{- else if .System }}"] if tools else ["{{- if .System }}"]),
            *(["{{- end }}", '{{- $before := "" }}'] if tools else ["{{- end }}"]),
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            f'{{{{- if eq .Role "user" }}}}{part["before_user"]}{{{{ .Content }}}}{after_user}',
            f'{{{{- else if eq .Role "assistant" }}}}{tools.answer if tools else "{{ .Content }}"}{after_answer}',
            *([f'{{{{- else if eq .Role "tool" }}}}{tools.result}'] if tools else []),
            *(["{{- end }}", "{{- $before = .Role }}"] if tools else ["{{- end }}"]),
            "{{- end }}",
        ]
        system = lines.index("{{- else if .System }}" if tools else "{{- if .System }}")
        lines[system] += f"{part['before_system']}{{{{ .System }}}}{part['after_system']}"
        lines.insert(system + 1, f"{{{{- else }}}}{part['no_system']}")
        return "\n".join(lines)


def derive_parts(render: Render, end_text: str) -> ChatParts:
    """Find a template's parts, and check that they reproduce its renderings.

    Args:
        render: renders the prompt of messages that end with a user's.
        end_text: the token that ends an answer.

    Raises:
        LoratuneError: they do not, or the template rejects a conversation.
    """
    try:
        parts = split_parts(render, end_text)
        for messages in trial_conversations():
            if parts.compose(messages) != render(messages):
                roles = ", ".join(message["role"] for message in messages)
                raise LoratuneError(f"it renders {roles} in a way of its own", Exit.MODEL)
    except LoratuneError as error:
        raise LoratuneError(
            f"the chat template cannot be written for Ollama: {error}; "
            "use the GGUF file with a program that reads its chat template, such as llama.cpp's server",
            Exit.MODEL,
        ) from error
    return parts


def split_parts(render: Render, end_text: str) -> ChatParts:
    """Find a template's parts, without checking them.

    Raises:
        LoratuneError: the template rejects a conversation, or drops or changes a message.
    """
    marks = ["Mark-of-the-system", "Mark-of-the-first-question", "Mark-of-the-answer", "Mark-of-the-second-question"]
    turns = conversation(*marks[1:])
    before_system, to_first, before_answer, to_second, generation_prompt = split(
        render([{"role": "system", "content": marks[0]}, *turns]), marks
    )
    no_system, _ = split(render(turns[:1]), marks[1:2])
    before_user = common_end(to_first, to_second, no_system)
    # Every split is correct as a whole; the most readable one puts a turn's end token into that turn.
    own_text = to_second.removeprefix(end_text).lstrip("\n")
    if before_user.endswith(own_text):
        before_user = own_text
    return ChatParts(
        before_system=before_system,
        after_system=to_first.removesuffix(before_user),
        no_system=no_system.removesuffix(before_user),
        before_user=before_user,
        before_answer=before_answer,
        after_answer=to_second.removesuffix(before_user),
        generation_prompt=generation_prompt,
    )


def split(text: str, marks: list[str]) -> list[str]:
    """Return the texts before, between and after the marks."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise LoratuneError("it leaves out or changes what is said", Exit.MODEL)
        parts.append(before)
    return [*parts, text]


def common_end(*texts: str) -> str:
    return next(
        texts[0][place:] for place in range(len(texts[0]) + 1) if all(t.endswith(texts[0][place:]) for t in texts)
    )


def trial_conversations() -> list[list[Message]]:
    """Return conversations of several shapes that end with a question, with texts that look like syntax."""
    texts = ("one", 'two "lines"\n\n{{ .Content }}', "三", "four `", "five", "<b>six</b>", "seven\\n")
    system: Message = {"role": "system", "content": 'Be "brief".\n\nBe kind.'}
    return [[*first, *conversation(*texts[:count])] for count in (1, 3, 5, 7) for first in ([], [system])]


def conversation(*texts: str) -> list[Message]:
    """Return alternating user and assistant messages."""
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]
