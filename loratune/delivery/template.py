"""Puts the training's prompt settings into the chat template, since other programs only use the template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import Message
from loratune.data.template.chat_template import PROBE_TOOL
from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object
from loratune.protocols import Tokenizer
from loratune.runs.tokenizer_files import CHAT_TEMPLATE, NAMED_TEMPLATES, TOKENIZER_CONFIG

SYSTEM = """\
{{%- if messages[0].role != 'system' %}}\
{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}{{%- endif %}}"""
PREFIX = """\
{{%- set prefixed = namespace(messages=[]) %}}{{%- for message in messages %}}{{%- if message.role == 'user' %}}\
{{%- set prefixed.messages = prefixed.messages + [dict(message, content={text} + message.content)] %}}{{%- else %}}\
{{%- set prefixed.messages = prefixed.messages + [message] %}}{{%- endif %}}{{%- endfor %}}\
{{%- set messages = prefixed.messages %}}"""
ARGUMENT = "{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}"
TURNS: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
REASONED_TURNS: list[Message] = [
    TURNS[0],
    {"role": "assistant", "content": "<think>\nbecause\n</think>\n\ntwo"},
    TURNS[2],
]
SYSTEM_TURN: Message = {"role": "system", "content": "zero"}
BY_TOOLS = "{{%- if tools %}}\n{with_tools}{{{{ '' }}}}{{% else %}}\n{without}{{{{ '' }}}}{{% endif %}}"
"""Two templates as one. Jinja trims a line break after a block, and whitespace on a line with only a block."""


def write_portable_template(encoder: Encoder, folder: Path) -> bool:
    """Write a template that reproduces the training's prompts, unless the tokenizer's own does.

    Args:
        encoder: renders prompts as in training.
        folder: folder with the tokenizer's files, of which only the template changes.

    Returns:
        Whether the template was changed.

    Raises:
        LoratuneError: no template reproduces the prompts.
    """
    template = portable_template(encoder)
    if template is None:
        return False
    shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8", newline="\n")
    config = read_json_object(folder / TOKENIZER_CONFIG)
    if "chat_template" in config:  # read by older programs
        config["chat_template"] = template
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    return True


def portable_template(encoder: Encoder) -> str | None:
    """Return a template that reproduces the training's prompts; None if the tokenizer's own does.

    Raises:
        LoratuneError: no template does.
    """
    encoder = encoder.at_a_day()
    if _renders_alike(encoder, None):
        return None
    template = _portable(encoder)
    if not _renders_alike(encoder, template):
        raise LoratuneError(
            "the training's system prompt, instruction prefix, thinking mode, reasoning effort or generation prompt "
            "cannot be put into the tokenizer's chat template; other programs would prompt the model differently",
            Exit.MODEL,
        )
    return template


def renders_training_prompts(encoder: Encoder, tokenizer: Tokenizer) -> bool:
    """Return whether a program with this tokenizer and no other settings renders the prompts of the training."""
    return _renders_alike(encoder.at_a_day(), None, tokenizer)


def about_the_date(programs: str, trained: str | None) -> str:
    """Return the warning about a template that writes dates, for other programs.

    Args:
        programs: subject and verb of the sentence.
        trained: the date in the prompts of the training, if known.
    """
    told = f"; in training it was {trained}" if trained else ""
    return f"the chat template writes the date into prompts: {programs} the current one{told}"


def _portable(encoder: Encoder) -> str:
    settings = encoder.settings
    texts = encoder.template + encoder.tool_template
    start = "".join(
        ARGUMENT.format(name=name, value=json.dumps(value, ensure_ascii=False))
        for name, value in settings.template_arguments.items()
        if encoder.reads(name)
    )
    # As in training, the prefix does not apply to the system prompt.
    start += PREFIX.format(text=_literal(settings.instruction_prefix)) if settings.instruction_prefix else ""
    start += SYSTEM.format(text=_literal(settings.system)) if settings.system else ""
    start += "{%- set adds_bos = true %}" if encoder.adds_bos and "adds_bos" in texts else ""
    if encoder.tool_template == encoder.template:
        return start + encoder.template
    # Without the trailing line break, which Jinja would drop from each template by itself.
    with_tools, without = (text.removesuffix("\n") for text in (encoder.tool_template, encoder.template))
    return start + BY_TOOLS.format(with_tools=with_tools, without=without)


def _literal(text: str) -> str:
    """Return a text as a Jinja literal; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _renders_alike(encoder: Encoder, template: str | None, tokenizer: Tokenizer | None = None) -> bool:
    """Return whether a template reproduces the training's prompts; None uses the tokenizer's, or the encoder's."""
    tokenizer = tokenizer or encoder.tokenizer
    conversations: list[Sequence[Message]] = [TURNS[:1], TURNS, [SYSTEM_TURN, *TURNS]]
    if encoder.reads_reasoning:
        conversations.append(REASONED_TURNS)
    offered: list[list[dict[str, Any]]] = [[], [PROBE_TOOL]] if encoder.offers_tools else [[]]
    return all(
        _plain(encoder, tokenizer, turns, template, tools) == _trained(encoder, turns, tools)
        for turns in conversations
        for tools in offered
    )


def _plain(
    encoder: Encoder, tokenizer: Tokenizer, turns: Sequence[Message], template: str | None, tools: list[dict[str, Any]]
) -> Any:
    """Return the ids that another program gets on the encoder's date; None if the template fails."""
    try:
        text = tokenizer.get_chat_template(template, tools or None)
        return tokenizer.apply_chat_template(
            [encoder.with_reasoning_apart(turn) for turn in turns],
            tools or None,
            chat_template=encoder.at_its_day(text),
            add_generation_prompt=True,
            return_dict=False,
        )
    except (TemplateError, ValueError):  # rejected, or no template
        return None


def _trained(encoder: Encoder, turns: Sequence[Message], tools: list[dict[str, Any]]) -> Any:
    try:
        return encoder.prompt_ids(turns, tools)
    except LoratuneError:  # a template without support for system prompts
        return None
