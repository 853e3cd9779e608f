"""Determines whether a chat template makes a model reason before it answers, by rendering it as servers do."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from loratune.data.formats.conversation import CLOSING, OPENING
from loratune.data.template.reasoning_form import ReasoningForm
from loratune.protocols import Tokenizer

QUESTION = {"role": "user", "content": "?"}
REASONED = {"role": "assistant", "content": "loratune-answer", "reasoning_content": "loratune-reasoning"}
SHOWN = re.compile(rf"{OPENING}\s*loratune-reasoning\s*{CLOSING}\s*loratune-answer")
OWN_FORMS = {"<|channel|>analysis<|message|>": "openai_gptoss", "<|channel>thought": "gemma4"}
"""vLLM's parsers by what begins the reasoning, for other forms than <think> blocks."""
OPEN, CLOSED = re.compile(rf"{OPENING}\s*\Z"), re.compile(rf"{OPENING}\s*{CLOSING}\s*\Z")


def vllm_reasoning_parser(tokenizer: Tokenizer, template: str, form: ReasoningForm) -> str | None:
    """Return vLLM's parser for a template's reasoning; None if answers have no reasoning, or none is known.

    Args:
        tokenizer: a transformers tokenizer.
        template: the served chat template, rendered as vLLM does, without options.
        form: how the template writes reasoning.
    """
    if not form.is_of_rows:
        return OWN_FORMS.get(form.opening.strip())
    prompt = _render(tokenizer, template, [QUESTION], add_generation_prompt=True)
    if OPEN.search(prompt):
        return "deepseek_r1"  # treats everything up to the closing tag as reasoning
    if CLOSED.search(prompt):
        return None
    return "qwen3" if SHOWN.search(_render(tokenizer, template, [QUESTION, REASONED])) else None


def _render(tokenizer: Tokenizer, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError):
        return ""
