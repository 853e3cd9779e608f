"""Renders tools, tool calls and tool results, and checks that the template supports them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import count
from typing import Any

from loratune.data.formats.conversation import Message, keys_in
from loratune.data.template.answer_ends import ANSWER, MARK, QUESTION
from loratune.data.template.rendering import ChatRenderer
from loratune.data.template.text_marks import free_marks
from loratune.data.tools.call_form import CallForm
from loratune.data.tools.call_probe import ARGUMENTS, NAMES, PROBE_TOOLS, find_call_form
from loratune.data.tools.call_shapes import Call
from loratune.errors import Exit, LoratuneError

PROBE_CALL = {"id": "loratune1", **Call(NAMES[0], ARGUMENTS).in_message()}
"""The id has the nine characters that Mistral's templates require."""


class ToolError(LoratuneError):
    """The template does not support tools, or tool calls."""


class ToolRenderer(ChatRenderer):
    """Renders conversations with tools. See `ChatRenderer` for arguments and errors."""

    @cached_property
    def offers_tools(self) -> bool:
        """Whether the template lists the available tools in the prompt."""
        return self._writes(NAMES[0], [QUESTION])

    @cached_property
    def call_form(self) -> CallForm | None:
        """The form of calls; None if it is unknown, or parsing would not return the rendered calls."""
        if not self.offers_tools and not self._writes_calls:
            return None
        return find_call_form(self._written, {mark: token for token, mark in self._marks_of_specials.items()})

    @property
    def about_calls(self) -> str:
        """Warning for users who offer tools; empty if calls are recognised in answers, or tools are rejected."""
        if not self.offers_tools or self.call_form:
            return ""
        return (
            "the chat template offers tools, but the form in which it writes calls is not recognised: calls stay text "
            "of the answer"
        )

    @cached_property
    def call_marks(self) -> dict[int, str]:
        """Token ids of special tokens in calls → their placeholder characters in `call_form`."""
        marks = self.call_form.marks if self.call_form else {}
        return {int(self.tokenizer.convert_tokens_to_ids(token)): mark for mark, token in marks.items()}

    def check_tools(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Raise if the template would silently drop tools, or a name in them contains a control token.

        Raises:
            ToolError: with advice.
        """
        calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
        needed = {
            "tools": bool(tools) and not self.offers_tools,
            "tool calls": bool(calls) and not self._writes_calls,
            "tool results": any(one["role"] == "tool" for one in messages) and not self._writes_results,
        }
        for what, is_lost in needed.items():
            if is_lost:
                raise ToolError(
                    f"the chat template ({self.settings.template}) does not support {what}, and some are given; use a "
                    "model whose template knows tools, or leave them out",
                    Exit.DATA,
                )
        if (tools or calls) and self._with_tools is not self._plain and self._find_end(self._with_tools) != self.end_id:
            raise ToolError(
                "tools are given, and the tokenizer's chat template for them ends answers with another token than the "
                "default one; leave them out",
                Exit.DATA,
            )
        for key in keys_in([*tools, *calls]):
            if self._control.search(key):
                raise ToolError(f"a name in the tools or calls holds a control token: {key!r}; rename it", Exit.DATA)

    @cached_property
    def _writes_calls(self) -> bool:
        called = {**ANSWER, "content": "", "tool_calls": [PROBE_CALL]}
        return self._writes(next(iter(ARGUMENTS.values())), [QUESTION, called])

    @cached_property
    def _writes_results(self) -> bool:
        called = {**ANSWER, "content": "", "tool_calls": [PROBE_CALL]}
        result = {"role": "tool", "name": NAMES[0], "tool_call_id": PROBE_CALL["id"], "content": MARK}
        before = called if self._writes_calls else {**ANSWER, "content": "!"}
        return self._writes(MARK, [QUESTION, before, result])

    def _writes(self, mark: str, messages: list[dict[str, Any]]) -> bool:
        """Return whether a conversation with tools renders the mark.

        A rejected conversation counts as rendered: the real one will raise an error too, so nothing is dropped
        silently.
        """
        try:
            return mark in self._apply(messages, PROBE_TOOLS, tokenize=False)
        except LoratuneError:
            return True

    def _takes(self, messages: list[dict[str, Any]]) -> bool:
        try:
            self._apply(messages, PROBE_TOOLS, tokenize=False)
        except LoratuneError:
            return False
        return True

    @cached_property
    def _needs_ids(self) -> bool:
        """Whether the template requires ids in calls, as Mistral's does."""
        bare = {key: value for key, value in PROBE_CALL.items() if key != "id"}
        takes = [
            self._takes([QUESTION, {**ANSWER, "content": "", "tool_calls": [call]}]) for call in (PROBE_CALL, bare)
        ]
        return takes == [True, False]

    def _with_ids(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Number calls and their results if the template requires ids, identically in training and inference."""
        if not any(message.get("tool_calls") for message in messages) or not self._needs_ids:
            return messages
        numbers, open_ids, numbered = count(1), iter(list[str]()), []
        for message in messages:
            if calls := message.get("tool_calls"):
                ids = [f"{next(numbers):09d}" for _ in calls]
                message = {**message, "tool_calls": [{"id": id_, **call} for id_, call in zip(ids, calls, strict=True)]}
                open_ids = iter(ids)
            elif message["role"] == "tool":
                message = {**message, "tool_call_id": next(open_ids, f"{0:09d}")}
            numbered.append(message)
        return numbered

    def _written(self, content: str, calls: Sequence[Call]) -> str | None:
        """Render an answer with calls, for `find_call_form`."""
        listed = [{"id": f"loratune{place}", **call.in_message()} for place, call in enumerate(calls)]
        message = {"role": "assistant", "content": content, "tool_calls": listed}
        try:
            before, whole = self._before_and_whole([QUESTION], message, PROBE_TOOLS)
        except LoratuneError:
            return None
        form = self._with_tools.form
        if not whole.startswith(before):  # the prompt opens a reasoning block, which the answer lacks
            before = before.rpartition(form.opening.strip())[0]
        if not before or not whole.startswith(before):
            return None
        text = whole[len(before) :].removesuffix(self._with_tools.behind_answers).rpartition(form.closing.strip())[2]
        return self._special.sub(lambda token: self._marks_of_specials[token[0]], text).strip()

    def _rendered_answer(
        self, prompt: list[dict[str, Any]], message: dict[str, Any], tools: Sequence[dict[str, Any]]
    ) -> str:
        """Return the text that the template writes for an answer with tool calls, up to the end token."""
        before, whole = self._before_and_whole(prompt, message, tools)
        answer, behind = whole[len(before) :], self._chat(tools).behind_answers
        if not whole.startswith(before) or not answer.endswith(behind):
            raise LoratuneError(
                "the tokenizer's chat template does not write an answer that calls tools as a continuation of its "
                "prompt; leave such rows out, or set prompt.enable_thinking as it was when their answers were written",
                Exit.DATA,
            )
        return answer.removesuffix(behind)

    def _before_and_whole(
        self, prompt: list[dict[str, Any]], message: dict[str, Any], tools: Sequence[dict[str, Any]]
    ) -> tuple[str, str]:
        before: str = self._apply(prompt, tools, tokenize=False, add_generation_prompt=True)
        whole: str = self._apply([*prompt, message], tools, tokenize=False)
        return before, whole

    def _parts_of_calls(
        self, prompt: list[dict[str, Any]], message: dict[str, Any], tools: Sequence[dict[str, Any]]
    ) -> list[tuple[str, bool]]:
        """Return an answer with tool calls as texts, each with whether its special tokens come from the template.

        Special tokens within a row are encoded as characters, as in every answer.
        """
        begin, end = free_marks(message)
        marked = _mapped(message, lambda text: self._special.sub(rf"{begin}\g<0>{end}", text))
        parts = re.split(f"{begin}(.*?){end}", self._rendered_answer(prompt, marked, tools))
        whole = [(part, place % 2 == 0) for place, part in enumerate(parts)]
        if not any(is_own and self._special.search(text) for text, is_own in whole):
            return [("".join(text for text, _ in whole), False)]
        return [part for part in whole if part[0]]


def _mapped(value: Any, change: Any) -> Any:
    """Return a JSON value with a function applied to every string except keys."""
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value
