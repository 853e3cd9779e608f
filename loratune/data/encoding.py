"""The one renderer: a conversation as token ids and labels, the same in training and in every kind of inference.

A training example is the prompt's ids + the answer's ids + the end token, so labels come by construction and are never
searched for. Text of a user or of a row never becomes a control token: `<|im_end|>` in it is encoded letter by letter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from loratune.data.conversation import Conversation, Message
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import PromptSettings

IGNORED = -100
"""Label of a position without loss, as torch's cross-entropy has it."""

# Both end a finished answer with the end token, so that a conversation may go on after it.
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


@dataclass(frozen=True)
class Example:
    """One training sequence: `labels[i]` is `input_ids[i]` where the model learns, IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        """How many positions carry a label."""
        return sum(label != IGNORED for label in self.labels)


class Encoder:
    """Renders conversations with one tokenizer and one set of prompt settings.

    Args:
        tokenizer: a transformers tokenizer.
        settings: template, system prompt, thinking mode, instruction prefix.

    Raises:
        LoratuneError: the tokenizer has no chat template, or no token that could end an answer.
    """

    def __init__(self, tokenizer: Any, settings: PromptSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.template: str = OWN_TEMPLATES.get(settings.template) or tokenizer.chat_template
        if not isinstance(self.template, str):
            raise LoratuneError(
                "the tokenizer has no chat template (a base model?); set prompt.template to plain or alpaca",
                Exit.MODEL,
            )
        self.adds_bos = tokenizer("").input_ids == [tokenizer.bos_token_id]
        self.end_id = self._find_end_id()

    @property
    def template_sha256(self) -> str:
        """Hash of the template's text."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the answer to the last message begins.

        Args:
            messages: an optional system message, then user and assistant in turn, a user message last.
        """
        ids: list[int] = self._apply(
            self._with_settings(messages), add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
        )
        return ids

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer and its end token. Of added tokens only ordinary ones, such as <think>, stay whole."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return [*ids, self.end_id]

    def encode(self, conversation: Conversation, train_on: str = "all") -> list[Example]:
        """The training sequences of a conversation.

        Every trained answer follows exactly the prompt that inference would give. Turns share a sequence where the
        template renders a longer conversation as a continuation of the shorter one; where it does not (Qwen3 drops
        the reasoning of earlier turns) each trained turn gets a sequence of its own.

        Args:
            conversation: what was said.
            train_on: `all` answers, or the `last` one.
        """
        turns = [
            place
            for place, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and place not in conversation.untrained
        ]
        examples: list[Example] = []
        for place in turns if train_on == "all" else turns[-1:]:
            prompt = self.prompt_ids(conversation.messages[:place])
            answer = self.answer_ids(conversation.messages[place]["content"])
            labels = [IGNORED] * len(prompt)
            if examples and prompt[: len(examples[-1].input_ids)] == examples[-1].input_ids:
                earlier = examples.pop().labels
                labels[: len(earlier)] = earlier
            examples.append(Example(prompt + answer, labels + answer))
        return examples

    def _with_reasoning_apart(self, message: Message) -> Message | dict[str, str]:
        """Hand an earlier answer's reasoning to a template that takes it by itself.

        Qwen3's template would find the reasoning in the content too, but not past the marks that keep control tokens of
        a text apart from the template's own.
        """
        content = message["content"]
        is_split = message["role"] == "assistant" and "</think>" in content and "reasoning_content" in self.template
        if not is_split:
            return message
        reasoning = content.partition("</think>")[0].rpartition("<think>")[2].strip("\n")
        return {
            "role": message["role"],
            "content": content.rpartition("</think>")[2].lstrip("\n"),
            "reasoning_content": reasoning,
        }

    def _with_settings(self, messages: Sequence[Message]) -> list[Message | dict[str, str]]:
        """Add the system prompt where there is none, and the prefix to each instruction."""
        prefix, system = self.settings.instruction_prefix, self.settings.system
        rendered: list[Message | dict[str, str]] = [
            {"role": "user", "content": prefix + message["content"]}
            if message["role"] == "user"
            else self._with_reasoning_apart(message)
            for message in messages
        ]
        if system and rendered[0]["role"] != "system":
            rendered.insert(0, {"role": "system", "content": system})
        return rendered

    def _apply(self, messages: Sequence[Any], **options: Any) -> Any:
        """Render with the tokenizer.

        Raises:
            LoratuneError: the template itself refuses the messages, as some do with a system prompt.
        """
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                enable_thinking=self.settings.thinking,
                adds_bos=self.adds_bos,
                **options,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise LoratuneError(
                f"the tokenizer's chat template refuses the messages {roles}: {error}", Exit.MODEL
            ) from error

    def _find_end_id(self) -> int:
        """The token that the template sets after an answer; the tokenizer's own end token if it sets none."""
        mark = "loratune-answer"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        text: str = self._apply(turns, tokenize=False)
        after = self.tokenizer(text.rpartition(mark)[2], add_special_tokens=False).input_ids
        added = self.tokenizer.added_tokens_decoder
        if after and after[0] in added and added[after[0]].special:
            return int(after[0])
        if self.tokenizer.eos_token_id is None:
            raise LoratuneError("the tokenizer has no end token; answers would never stop", Exit.MODEL)
        return int(self.tokenizer.eos_token_id)
