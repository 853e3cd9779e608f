"""loratune's own chat templates, for base models without one."""

# Both end an answer with the end token, so that a conversation can continue after it.
PLAIN_TEMPLATE = """\
{%- if adds_bos %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' %}{{ 'Human: ' + message.content + '\\n\\nAssistant: ' }}
{%- elif message.role == 'assistant' %}{{ message.content + eos_token }}
{%- else %}{{ message.content + '\\n\\n' }}{% endif -%}
{%- endfor -%}"""
ALPACA_TEMPLATE = """\
{%- if adds_bos %}{{ bos_token }}{% endif -%}
{%- if messages[0].role != 'system' %}{{ 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.\\n\\n' }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' }}
{%- elif message.role == 'assistant' %}{{ message.content + eos_token + '\\n\\n' }}
{%- else %}{{ message.content + '\\n\\n' }}{% endif -%}
{%- endfor -%}"""
OWN_TEMPLATES = {"plain": PLAIN_TEMPLATE, "alpaca": ALPACA_TEMPLATE}
