"""How a chat template writes calls of tools, found by rendering one: servers have a parser for each form."""

from __future__ import annotations

import json
import re
from typing import Any

from jinja2 import TemplateError

NAME, ARGUMENTS = "look_up_weather", {"city": "Rome"}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}
# vLLM's name of a parser → what it reads; the call's JSON object is the group, where there is one.
FORMS = {
    "hermes": re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>", re.DOTALL),
    "qwen3_coder": re.compile(rf"<tool_call>\s*<function={NAME}>.*<parameter=city>\s*Rome\s*</parameter>", re.DOTALL),
    "mistral": re.compile(r"\[TOOL_CALLS\]\s*\[(\{.*\})\]", re.DOTALL),
    "llama3_json": re.compile(r"^\s*(\{.*\})", re.DOTALL),
}


def offers_tools(tokenizer: Any, template: str) -> bool:
    """Whether a template tells the model which tools there are."""
    text = _render(tokenizer, template, [{"role": "user", "content": "?"}])
    return text is not None and NAME in text


def vllm_tool_parser(tokenizer: Any, template: str) -> str | None:
    """vLLM's parser for the calls that a template writes; None where the form is not recognised.

    Args:
        tokenizer: a transformers tokenizer.
        template: the chat template that is served.
    """
    question = {"role": "user", "content": "?"}
    before = _render(tokenizer, template, [question])
    whole = _render(tokenizer, template, [question, {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    if before is None or whole is None or not whole.startswith(before.rstrip()):
        return None
    written = whole[len(before.rstrip()) :]
    for parser, form in FORMS.items():
        found = form.search(re.sub(r"^.*?<\|end_header_id\|>", "", written, flags=re.DOTALL))
        if found and (not form.groups or _is_the_call(found[1])):
            return parser
    return None


def _is_the_call(text: str) -> bool:
    try:
        call, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    return bool(call.get("name") == NAME and ARGUMENTS in (call.get("arguments"), call.get("parameters")))


def _render(tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=[TOOL], chat_template=template, tokenize=False))
    except (TemplateError, TypeError):  # some fail on arguments that are no text
        return None
