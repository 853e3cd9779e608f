"""Chat templates that write tools and calls of them in the ways of several families, in a few lines each."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from conftest import TINY_QWEN
from transformers import AddedToken, AutoTokenizer

from loratune.data.encoding.encoder import Encoder
from loratune.recipe.sections import PromptSettings

_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_OFFER = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
)
# Up to the calls, and from there on.
_CHATML = (
    _OFFER + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content %}{{ m.content }}{% endif %}{% if m.tool_calls %}",
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _PROMPT,
)
_HERMES_CALLS = (
    "{% for c in m.tool_calls %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}"
)
_CODER_CALLS = (
    "{% for c in m.tool_calls %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}"
    "{% for key, value in c.function.arguments | items %}{{ '<parameter=' + key + '>\\n' }}"
    "{{ value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}"
    "{{ '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}"
)
_MISTRAL = (
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == last %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + (m.content | tojson) + ', \"call_id\": \"' }}"
    "{{ m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) }}'
    "{{ ', \"id\": \"' + c.id + '\"}' }}{{ '' if loop.last else ', ' }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if tools and loop.first %}{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + c.name + '\", \"parameters\": ' + (c.arguments | tojson) + '}' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _PROMPT
)
TEMPLATES = {
    "hermes": _HERMES_CALLS.join(_CHATML),
    "coder": _CODER_CALLS.join(_CHATML),
    "mistral": _MISTRAL,
    "llama": _LLAMA,
}
SPECIAL = "[TOOL_CALLS]"
SPECIAL_ID = 3005
"""A row of the practice model's vocabulary that no token has."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}},
            "required": ["city"],
        },
    },
}


def call_of(name: str = "get_weather", **arguments: Any) -> dict[str, Any]:
    """A call as rows and templates have it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@cache
def tool_tokenizer(template: str) -> Any:
    """The practice model's tokenizer with one of TEMPLATES, or another text; [TOOL_CALLS] is a special token of it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    tokenizer.add_tokens([AddedToken(SPECIAL, special=True, normalized=False)], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == SPECIAL_ID
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


@cache
def tool_encoder(template: str) -> Encoder:
    """The renderer of such a tokenizer."""
    return Encoder(tool_tokenizer(template), PromptSettings())


def tool_base(folder: Path, template: str) -> Path:
    """A folder of the practice model with such a tokenizer."""
    shutil.copytree(TINY_QWEN, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[template], encoding="utf-8")
    token = {"id": SPECIAL_ID, "content": SPECIAL, "special": True}
    token |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    known["added_tokens"].append(token)
    path.write_text(json.dumps(known), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"][str(SPECIAL_ID)] = {key: value for key, value in token.items() if key != "id"}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder
