"""The parts of a chat template around tools, calls and results, and their composition in Python and in Go.

A template writes tools and arguments of calls as JSON. Ollama writes them with its own `json` function, without spaces
and with its own order of a schema's keys; everything else is identical.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.formats.conversation import Message
from loratune.delivery.export.ollama.go_template import ChatParts, ToolActions
from loratune.delivery.export.ollama.go_text import written
from loratune.errors import Exit, LoratuneError

Tool = dict[str, Any]
SEPARATORS = {"spaced": (", ", ": "), "compact": (",", ":")}
ARGUMENTS = {
    "spaced": (
        '{{ "{" }}{{ $first := true }}{{ range $key, $value := .Function.Arguments }}{{ if not $first }}{{ ", " }}'
        '{{ end }}{{ $first = false }}{{ json $key }}{{ ": " }}{{ json $value }}{{ end }}{{ "}" }}'
    ),
    "compact": "{{ json .Function.Arguments }}",
}


@dataclass(frozen=True)
class ListParts:
    """The texts around the list of tools, and around the name, description and schema of each."""

    style: str
    head: str
    before_name: str
    before_description: str
    before_schema: str
    after_schema: str
    between: str
    tail: str

    def compose(self, tools: Sequence[Tool]) -> str:
        """Return the list as the template renders it."""
        pieces = []
        for function in (tool["function"] for tool in tools):
            text = self.before_name + json.dumps(function["name"])
            if function.get("description"):
                text += self.before_description + json.dumps(function["description"], ensure_ascii=False)
            pieces.append(text + self.before_schema + as_json(function["parameters"], self.style) + self.after_schema)
        return self.head + self.between.join(pieces) + self.tail

    def actions(self) -> str:
        between = f"{{{{ if $i }}}}{written(self.between)}{{{{ end }}}}" if self.between else ""
        described = f"{written(self.before_description)}{{{{ json .Function.Description }}}}"
        return (
            f"{written(self.head)}{{{{ range $i, $_ := .Tools }}}}{between}{written(self.before_name)}"
            f"{{{{ json .Function.Name }}}}{{{{ if .Function.Description }}}}{described}{{{{ end }}}}"
            f"{written(self.before_schema)}{{{{ json .Function.Parameters }}}}{written(self.after_schema)}"
            f"{{{{ end }}}}{written(self.tail)}"
        )


@dataclass(frozen=True)
class CallParts:
    """The texts around calls and results."""

    style: str
    first: str
    """Text before the first call of an answer without text."""
    after_text: str
    """Text before the first call of an answer with text."""
    next: str
    """Text before any other call."""
    opening: str
    """The following text, up to the name."""
    before_arguments: str
    closing: str
    before_result: str
    between_results: str
    to_generation: str
    to_answer: str
    to_question: str
    """Text from a result to the following question."""

    def compose(self, message: Message) -> str:
        """Return the calls of an answer as the template renders them."""
        text = ""
        for place, call in enumerate(message.get("tool_calls") or []):
            function, said = call["function"], message["content"]
            text += self.next if place else self.after_text if said else self.first
            text += self.opening + json.dumps(function["name"]) + self.before_arguments
            text += as_json(function["arguments"], self.style) + self.closing
        return text

    def answer(self) -> str:
        """Return an answer with its calls as Go actions.

        Ollama uses the first plain text in it, up to a brace, as the prefix that identifies a call.
        """
        sign, brace, rest = self.opening.partition("{")
        starts = [start + sign for start in (self.next, self.after_text, self.first)]
        if any("{{" in start for start in starts):
            raise LoratuneError("it writes calls with signs of Go's", Exit.MODEL)
        return (
            "{{ $content := .Content }}{{ .Content }}{{ if .ToolCalls }}{{ range $j, $_ := .ToolCalls }}"
            f"{{{{ if $j }}}}{starts[0]}{{{{ else if $content }}}}{starts[1]}{{{{ else }}}}{starts[2]}{{{{ end }}}}"
            f"{written(brace + rest)}{{{{ json .Function.Name }}}}{written(self.before_arguments)}"
            f"{ARGUMENTS[self.style]}{written(self.closing)}{{{{ end }}}}{{{{ end }}}}"
        )

    def result(self) -> str:
        """Return a tool's result as Go actions."""
        return (
            f'{{{{ if eq $before "tool" }}}}{written(self.between_results)}{{{{ else }}}}{written(self.before_result)}'
            f"{{{{ end }}}}{{{{ .Content }}}}{{{{ if $last }}}}{written(self.to_generation)}{{{{ else }}}}"
            "{{ $next := (index (slice $.Messages $i) 1).Role }}"
            f'{{{{ if eq $next "assistant" }}}}{written(self.to_answer)}'
            f'{{{{ else if eq $next "user" }}}}{written(self.to_question)}{{{{ end }}}}{{{{ end }}}}'
        )


@dataclass(frozen=True)
class ToolParts:
    """A template's parts if tools are offered."""

    chat: ChatParts
    """The chat's parts with tools; the text before the first question includes TOOLS."""
    systems: dict[str, ListParts | None]
    """Name of a part about the system prompt → the list of tools in it."""
    calls: CallParts

    def actions(self) -> ToolActions:
        part = {
            name: found.actions() if found else written(getattr(self.chat, name))
            for name, found in self.systems.items()
        }
        offer = f"{{{{ if .System }}}}{part['before_system']}{{{{ .System }}}}{part['after_system']}"
        offer += f"{{{{ else }}}}{part['no_system']}{{{{ end }}}}"
        return ToolActions(offer, self.calls.answer(), self.calls.result())

    def compose(self, messages: list[Message], tools: Sequence[Tool]) -> str:
        """Compose a prompt from the parts, as Ollama does, except for the spaces in JSON."""
        part = {
            name: found.compose(tools) if found else getattr(self.chat, name) for name, found in self.systems.items()
        }
        text, calls = part["no_system"], self.calls
        for place, message in enumerate(messages):
            is_last, before = place == len(messages) - 1, messages[place - 1]["role"] if place else ""
            following = "" if is_last else messages[place + 1]["role"]
            if message["role"] == "system":
                text = part["before_system"] + message["content"] + part["after_system"]
            elif message["role"] == "user":
                text += self.chat.before_user + message["content"]
                text += self.chat.generation_prompt if is_last else self.chat.before_answer
            elif message["role"] == "assistant":
                text += message["content"] + calls.compose(message) + self.chat.after_answer
            else:
                text += calls.between_results if before == "tool" else calls.before_result
                text += message["content"]
                ends = {"": calls.to_generation, "assistant": calls.to_answer, "user": calls.to_question}
                text += ends.get(following, "")
        return text


def as_json(value: Any, style: str) -> str:
    """Return a value as JSON in a template's style: spaced or compact."""
    return json.dumps(value, ensure_ascii=False, separators=SEPARATORS[style])
