"""Finds the parts of a chat template around tools and calls by rendering marked ones, and verifies them with others."""

from __future__ import annotations

import json
import os
from typing import Any

from loratune.data.formats.conversation import Message
from loratune.delivery.export.ollama.go_template import ChatParts, Render, common_end, split, split_parts
from loratune.delivery.export.ollama.go_tool_parts import SEPARATORS, CallParts, ListParts, Tool, ToolParts, as_json
from loratune.errors import Exit, LoratuneError

QUESTION, ANSWER, NEXT, RESULTS = "Mark-question", "Mark-answer", "Mark-next", ("Mark-result-a", "Mark-result-b")


def _tool(letter: str, is_described: bool = True) -> Tool:
    schema = {"type": "object", "properties": {f"key_{letter}": {"type": "string"}}, "required": [f"key_{letter}"]}
    described = {"description": f"Mark-description-{letter}"} if is_described else {}
    return {"type": "function", "function": {"name": f"mark_tool_{letter}", **described, "parameters": schema}}


def _call(letter: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"mark_tool_{letter}", "arguments": {"x": letter, "y": 1}}}


TOOLS = [_tool("a"), _tool("b")]


def derive_tools(render: Render, parts: ChatParts, end_text: str) -> ToolParts:
    """Find the parts of a template about tools, and check that they reproduce its renderings.

    Args:
        render: renders the prompt of messages and tools.
        parts: parts of the same template without tools.
        end_text: the token that ends an answer.

    Raises:
        LoratuneError: the template writes tools or calls in an unsupported way.
    """
    try:
        chat = split_parts(lambda messages, tools=(): render(messages, TOOLS), end_text)
        turns = ("before_user", "before_answer", "after_answer", "generation_prompt")
        if any(getattr(chat, name) != getattr(parts, name) for name in turns):
            raise LoratuneError("it renders turns in another way where tools are offered", Exit.MODEL)
        names = ("before_system", "after_system", "no_system")
        systems = {name: _split_list(getattr(chat, name)) for name in names}
        found = ToolParts(chat, systems, _split_calls(render, parts))
        for messages, tools in _trials():
            if found.compose(messages, tools) != render(messages, tools):
                roles = ", ".join(message["role"] for message in messages)
                raise LoratuneError(f"with tools it renders {roles} in a way of its own", Exit.MODEL)
        found.actions()
    except LoratuneError as error:
        raise LoratuneError(
            f"the chat template offers tools in a form that the Modelfile's TEMPLATE does not ({error.message})",
            Exit.MODEL,
        ) from error
    return found


def _split_list(text: str) -> ListParts | None:
    """Return the parts of a text with TOOLS in it; None if it contains no tools."""
    first, second = (tool["function"] for tool in TOOLS)
    if first["name"] not in text:
        return None
    for style in SEPARATORS:
        values = [
            value
            for function in (first, second)
            for value in (
                json.dumps(function["name"]),
                json.dumps(function["description"]),
                as_json(function["parameters"], style),
            )
        ]
        if values[2] in text:
            break
    start, description, schema, middle, description_again, schema_again, end = split(text, values)
    if (description, schema) != (description_again, schema_again):
        raise LoratuneError("it writes a second tool in another way than the first", Exit.MODEL)
    before_name = common_end(start, middle)
    closing = middle[: len(middle) - len(before_name)]
    after_schema = os.path.commonprefix([closing, end])  # noqa: RUF071 - of texts
    return ListParts(
        style=style,
        head=start[: len(start) - len(before_name)],
        before_name=before_name,
        before_description=description,
        before_schema=schema,
        after_schema=after_schema,
        between=closing[len(after_schema) :],
        tail=end[len(after_schema) :],
    )


def _split_calls(render: Render, parts: ChatParts) -> CallParts:
    question: Message = {"role": "user", "content": QUESTION}
    one, two = _answer("a"), _answer("a", "b")
    results: list[Message] = [{"role": "tool", "content": text} for text in RESULTS]

    def pieces(messages: list[Message], *marks: str) -> list[str]:
        return split(render(messages, TOOLS), [QUESTION, *marks])[1:]

    style = "spaced" if _arguments("a", "spaced") in render([question, one, results[0]], TOOLS) else "compact"
    name_a, name_b = (json.dumps(f"mark_tool_{letter}") for letter in "ab")
    a, b = (_arguments(letter, style) for letter in "ab")
    silent, before_arguments, to_result, to_generation = pieces([question, one, results[0]], name_a, a, RESULTS[0])
    before_text, said, *_ = pieces([question, {**one, "content": ANSWER}, results[0]], ANSWER, name_a, a, RESULTS[0])
    _, _, to_next, _, _, between_results, _ = pieces([question, two, *results], name_a, a, name_b, b, *RESULTS)
    *_, to_answer, _, _ = pieces(
        [question, one, results[0], {"role": "assistant", "content": ANSWER}, {"role": "user", "content": NEXT}],
        name_a, a, RESULTS[0], ANSWER, NEXT,
    )  # fmt: skip
    *_, to_question, _ = pieces(
        [question, one, results[0], {"role": "user", "content": NEXT}], name_a, a, RESULTS[0], NEXT
    )
    if before_text != parts.before_answer or not silent.startswith(parts.before_answer):
        raise LoratuneError("it begins an answer that calls tools in another way", Exit.MODEL)
    silent = silent.removeprefix(parts.before_answer)
    closing = _closing(to_next, to_result, parts.after_answer)
    opening = common_end(silent, said, to_next[len(closing) :])
    return CallParts(
        style=style,
        first=silent[: len(silent) - len(opening)],
        after_text=said[: len(said) - len(opening)],
        next=to_next[len(closing) : len(to_next) - len(opening)],
        opening=opening,
        before_arguments=before_arguments,
        closing=closing,
        before_result=to_result[len(closing) :].removeprefix(parts.after_answer),
        between_results=between_results,
        to_generation=to_generation,
        to_answer=to_answer,
        to_question=to_question.removesuffix(parts.before_user),
    )


def _closing(to_next: str, to_result: str, after_answer: str) -> str:
    """Return the end of a call: the same before another call and at the end of an answer."""
    shared = os.path.commonprefix([to_next, to_result])  # noqa: RUF071 - of texts
    for length in range(len(shared), -1, -1):
        if to_result[length:].startswith(after_answer):
            return shared[:length]
    raise LoratuneError("it ends an answer that calls tools in another way", Exit.MODEL)


def _answer(*letters: str) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [_call(letter) for letter in letters]}


def _arguments(letter: str, style: str) -> str:
    return as_json(_call(letter)["function"]["arguments"], style)


def _trials() -> list[tuple[list[Message], list[Tool]]]:
    """Return conversations with tools that could reveal other rules, each with the offered tools."""
    result: Message = {"role": "tool", "content": '{"y": "三"}'}
    ask: Message = {"role": "user", "content": 'one\n\n"two"'}
    said: Message = {"role": "assistant", "content": "I look."}
    system: Message = {"role": "system", "content": "Be brief."}
    called, both, told = _answer("a"), _answer("a", "b"), {**_answer("b"), "content": "Wait."}
    shapes: list[list[Message]] = [
        [ask],
        [ask, said, ask],
        [ask, called, result],
        [ask, both, result, result],
        [ask, told, result, said, ask, called, result, said, ask],  # type: ignore[list-item]
        [ask, called, result, both, result, result],
        [ask, called, result, ask],
        [ask, said, ask, told, result],  # type: ignore[list-item]
    ]
    offers = [TOOLS, TOOLS[:1], [_tool("c", is_described=False), TOOLS[0]]]
    return [([*first, *shape], tools) for shape in shapes for first in ([], [system]) for tools in offers]
