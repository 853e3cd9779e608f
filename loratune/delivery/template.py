"""The training's prompt settings as a chat template that needs nothing else: other programs know only the template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from loratune.data.conversation import Message
from loratune.data.encoding import Encoder
from loratune.errors import Exit, LoratuneError

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
SYSTEM = """\
{{%- if messages[0].role != 'system' %}}\
{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}{{%- endif %}}"""
PREFIX = """\
{{%- set prefixed = namespace(messages=[]) %}}{{%- for message in messages %}}{{%- if message.role == 'user' %}}\
{{%- set prefixed.messages = prefixed.messages + [dict(message, content={text} + message.content)] %}}{{%- else %}}\
{{%- set prefixed.messages = prefixed.messages + [message] %}}{{%- endif %}}{{%- endfor %}}\
{{%- set messages = prefixed.messages %}}"""
THINKING = "{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {text} %}}{{%- endif %}}"
TURNS: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
SYSTEM_TURN: Message = {"role": "system", "content": "zero"}


def write_portable_template(encoder: Encoder, folder: Path) -> bool:
    """Give a folder with the tokenizer's files the template of the training, where its own renders other prompts.

    Args:
        encoder: how the training rendered prompts.
        folder: holds the tokenizer's files, which stay byte for byte as they are but for the template.

    Returns:
        Whether the template was changed.

    Raises:
        LoratuneError: no template can render these prompts by itself.
    """
    if _renders_alike(encoder, None):
        return False
    template = _portable(encoder)
    if not _renders_alike(encoder, template):
        raise LoratuneError(
            "the training's system prompt, instruction prefix or thinking mode cannot be put into the tokenizer's chat "
            "template; other programs would prompt the model differently",
            Exit.MODEL,
        )
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="\n")
    config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    if "chat_template" in config:  # where older programs look
        config["chat_template"] = template
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    return True


def _portable(encoder: Encoder) -> str:
    settings = encoder.settings
    start = THINKING.format(text=str(settings.thinking).lower()) if "enable_thinking" in encoder.template else ""
    # As in training, the prefix is not for the system prompt.
    start += PREFIX.format(text=_literal(settings.instruction_prefix)) if settings.instruction_prefix else ""
    start += SYSTEM.format(text=_literal(settings.system)) if settings.system else ""
    start += "{%- set adds_bos = true %}" if encoder.adds_bos and "adds_bos" in encoder.template else ""
    return start + encoder.template


def _literal(text: str) -> str:
    """A text as Jinja writes it; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _renders_alike(encoder: Encoder, template: str | None) -> bool:
    """Whether a template by itself gives the training's prompts; None for the tokenizer's own."""
    conversations: list[Sequence[Message]] = [TURNS[:1], TURNS, [SYSTEM_TURN, *TURNS]]
    return all(_plain(encoder, turns, template) == _trained(encoder, turns) for turns in conversations)


def _plain(encoder: Encoder, turns: Sequence[Message], template: str | None) -> Any:
    """The ids that any program gets."""
    try:
        return encoder.tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=True, return_dict=False
        )
    except (TemplateError, ValueError):  # refused, or there is none
        return None


def _trained(encoder: Encoder, turns: Sequence[Message]) -> Any:
    try:
        return encoder.prompt_ids(turns)
    except LoratuneError:  # a template that takes no system prompt
        return None
