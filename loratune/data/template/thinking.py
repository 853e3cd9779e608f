"""Determines how a chat template asks for reasoning, and which arguments it reads, by rendering it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratune.data.formats.conversation import CLOSING, OPENING
from loratune.data.template.answer_ends import ANSWER, NEXT_QUESTION, QUESTION, Render, Tools
from loratune.data.template.reasoning_form import CALL, REASONED, REASONED_CALL, REASONING_MARK, ReasoningForm
from loratune.errors import LoratuneError

EXCERPT = 60
RESULT = {"role": "tool", "name": "probe", "tool_call_id": CALL["id"], "content": "!"}
REASONED_IN_TEXT = {**ANSWER, "content": f"{OPENING}\n{REASONING_MARK}\n{CLOSING}\n\n{ANSWER['content']}"}
# Where templates treat reasoning differently: in the next answer, in earlier ones, and before calls.
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [QUESTION],
    [QUESTION, REASONED, NEXT_QUESTION],
    [QUESTION, REASONED_IN_TEXT, NEXT_QUESTION],
    [QUESTION, REASONED_CALL, RESULT],
    [QUESTION, REASONED_CALL, RESULT, REASONED, NEXT_QUESTION],
]
VALUES: dict[str, tuple[Any, ...]] = {
    "enable_thinking": (True, False),
    "preserve_thinking": (True, False),
    "reasoning_effort": ("loratune-effort", "low", "high"),
}
"""Values to try for each argument. No template knows the first effort: it writes it, refuses it, or ignores it."""


@dataclass(frozen=True)
class Reasoning:
    """How prompts ask for reasoning under some prompt settings."""

    is_enabled: bool
    """As prompt.enable_thinking."""
    by_default: bool | None
    """The thinking mode without the argument enable_thinking; None if the template does not read it."""
    prompt_end: str
    """The reasoning block that ends prompts, open or empty; empty if there is none."""
    answer_start: str
    """Text that is trained before an answer without reasoning, such as the end of the block."""
    keeps_earlier: bool
    """Whether the reasoning of earlier answers stays in prompts."""
    instruction: str
    """Beginning of the text about reasoning that is added before the question; empty if there is none."""


def reads_argument(render: Render, text: str, tools: Tools, name: str, others: Mapping[str, Any]) -> bool:
    """Return whether the value of an argument changes a prompt.

    Args:
        render: renders messages with any template's text; its option `arguments` replaces the settings' arguments.
        text: the template's text, which must not depend on the clock.
        tools: tools of the probe conversations; empty for the template without tools.
        name: the argument, such as enable_thinking.
        others: all other arguments.
    """
    rest = {other: value for other, value in others.items() if other != name}
    usual = _prompts(render, text, tools, rest)
    return any(_prompts(render, text, tools, {**rest, name: value}) != usual for value in VALUES[name])


def describe_reasoning(
    render: Render,
    text: str,
    tools: Tools,
    arguments: Mapping[str, Any],
    form: ReasoningForm,
    answer_start: str,
) -> Reasoning | None:
    """Return how a template asks for reasoning; None if it neither has a thinking mode nor writes reasoning.

    Args:
        render, text, tools: see `reads_argument`.
        arguments: the arguments of the settings.
        form: the form in which it writes reasoning.
        answer_start: text between the prompt and an answer without reasoning.
    """
    is_enabled, rest = bool(arguments["enable_thinking"]), dict(arguments)
    del rest["enable_thinking"]
    usual, off, on = (
        _prompts(render, text, tools, {**rest, **mode})
        for mode in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    )
    prompt = (on if is_enabled else off)[0]
    end = form.block_at_end(prompt)
    if on == off and not end and not form.key:
        return None
    return Reasoning(
        is_enabled=is_enabled,
        by_default=None if on == off else usual == on,
        prompt_end=end,
        answer_start=answer_start if form.is_closed_in(answer_start) else "",
        keeps_earlier=REASONING_MARK in (on if is_enabled else off)[1],
        instruction=_instruction(prompt, (off if is_enabled else on)[0]),
    )


def _instruction(prompt: str, other: str) -> str:
    """Return the beginning of the text before the question that a prompt has in one thinking mode only."""
    asked, unasked = (one.rpartition(QUESTION["content"])[0] for one in (prompt, other))
    added = asked[len(os.path.commonprefix([asked, unasked])) :]  # noqa: RUF071 - of texts
    return added[:EXCERPT] if len(asked) > len(unasked) else ""


def _prompts(render: Render, text: str, tools: Tools, arguments: Mapping[str, Any]) -> list[str]:
    """Render the probe conversations as prompts; the reason of a refusal takes the place of a refused one."""
    prompts = []
    for messages in CONVERSATIONS:
        try:
            prompts.append(render(text, messages, tools, add_generation_prompt=True, arguments=dict(arguments)))
        except LoratuneError as error:
            prompts.append(str(error.__cause__))  # without the settings, which the message may quote
    return prompts
