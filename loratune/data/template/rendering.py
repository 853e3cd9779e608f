"""Renders conversations as text or ids, with a tokenizer's chat templates and one set of prompt settings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateError

from loratune.data.template.answer_ends import ANSWER, QUESTION
from loratune.data.template.answer_parts import Part, continued
from loratune.data.template.chat_template import (
    MOMENTS,
    PROBE_TOOL,
    SYSTEM,
    ChatTemplate,
    find_templates,
    fixed_day,
    fixed_moment,
    study_template,
)
from loratune.data.template.own import OWN_TEMPLATES
from loratune.data.template.reasoning_form import REASONED, ReasoningForm, StreamedForm
from loratune.data.template.text_marks import with_marks_kept
from loratune.data.template.thinking import Reasoning, describe_reasoning, reads_argument
from loratune.data.template.trial import try_template
from loratune.errors import Exit, LoratuneError
from loratune.protocols import Tokenizer
from loratune.recipe.sections import PromptSettings

FIRST_MARK = 0xF0100
"""First private-use character of the placeholders for special tokens in the text of answers."""
FAILURES = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError,
    AssertionError, NotImplementedError,
)  # fmt: skip
"""What a template raises when it rejects messages or fails on them."""
TRIALS: list[tuple[list[dict[str, str]], list[dict[str, Any]]]] = [
    ([QUESTION], []),
    ([SYSTEM, *[QUESTION, ANSWER] * 8, QUESTION], []),
    ([QUESTION, REASONED, QUESTION], []),
    ([QUESTION], [PROBE_TOOL]),
]
"""Messages and tools of a template's trial renderings."""


class ChatRenderer:
    """Renders messages with the template for conversations with or without tools.

    Args:
        tokenizer: a transformers tokenizer.
        settings: template, thinking mode, generation prompt, date.

    Raises:
        LoratuneError: the tokenizer has no chat template, or no token to end an answer with, or the template does not
            read an argument that the settings have.
    """

    def __init__(self, tokenizer: Tokenizer, settings: PromptSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.adds_bos = tokenizer("").input_ids == [tokenizer.bos_token_id]
        added = tokenizer.added_tokens_decoder.values()
        self._control = re.compile("|".join(re.escape(token.content) for token in added) or "(?!)")
        self._special = re.compile("|".join(re.escape(token.content) for token in added if token.special) or "(?!)")
        texts = find_templates(tokenizer, settings.template)
        self._plain, has_one = self._studied(texts.plain, ()), texts.with_tools == texts.plain
        self._with_tools = self._plain if has_one else self._studied(texts.with_tools, [PROBE_TOOL])
        self.template = self._plain.text
        """Template for conversations without tools."""
        self.tool_template = self._with_tools.text
        """Template for conversations with tools; usually the same."""
        self.end_id = self._find_end(self._plain)
        self._check_arguments()

    @property
    def template_sha256(self) -> str:
        """Hash of the template's text, or of both texts if there is another one for tools."""
        texts = dict.fromkeys((self.template, self.tool_template))
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """The template's facts in the run's record, for comparison and for continuing the run."""
        return {
            "sha256": self.template_sha256,
            "end_token_id": self.end_id,
            "generation_prompt": self.settings.generation_prompt,
            "completion": self._plain.generation_prompt or self._with_tools.generation_prompt,
            "answer_start": self.answer_start,
            "date": self.settings.date if self.is_dated else None,
        }

    @property
    def is_dated(self) -> bool:
        """Whether the template writes the current date or time into prompts."""
        return self._plain.is_dated or self._with_tools.is_dated

    @property
    def answer_start(self) -> str:
        """Text between the generation prompt and an answer without reasoning."""
        return self._plain.answer_start

    def answer_start_for(self, tools: Sequence[dict[str, Any]]) -> str:
        """Return `answer_start` for conversations with these tools, which may use another template."""
        return self._chat(tools).answer_start

    @property
    def asks_for_reasoning(self) -> bool:
        """Whether the template expects reasoning before answers."""
        chats = (self._plain, self._with_tools)
        return any(one.begun_reasoning or one.form.is_closed_in(one.answer_start) for one in chats)

    @property
    def leaves_reasoning_open(self) -> bool:
        """Whether prompts open a reasoning block that is not closed before an answer without reasoning."""
        chats = (self._plain, self._with_tools)
        return any(one.begun_reasoning and not one.form.is_closed_in(one.answer_start) for one in chats)

    @property
    def takes_reasoning(self) -> bool:
        """Whether reasoning fits the prompts: they ask for it, or the template writes it and has one mode only."""
        return self.settings.enable_thinking or (self.reads_reasoning and not self.reads("enable_thinking"))

    @property
    def reasoning(self) -> Reasoning | None:
        """How prompts ask for reasoning; None for templates without a thinking mode."""
        text = fixed_moment(self.template, MOMENTS[0])
        arguments = self.settings.template_arguments
        return describe_reasoning(self._as_text, text, (), arguments, self.reasoning_form, self.answer_start)

    @property
    def reasoning_form(self) -> ReasoningForm:
        """How the template writes reasoning."""
        return self._plain.form

    @cached_property
    def streamed_form(self) -> StreamedForm:
        """How reasoning is written in the text of a streamed answer."""
        form, marks = self.reasoning_form, self._marks_of_specials
        if form.is_of_rows:
            return StreamedForm()
        texts = (form.opening.strip(), form.closing.strip(), form.answer_start)
        tokens = self._special.findall("".join([*texts, self.answer_start]))
        ids = {int(self.tokenizer.convert_tokens_to_ids(token)): marks[token] for token in tokens}
        opening, closing, start = (self._special.sub(lambda token: marks[token[0]], text) for text in texts)
        return StreamedForm(opening, closing, start, ids)

    @cached_property
    def _marks_of_specials(self) -> dict[str, str]:
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return {token: chr(FIRST_MARK + place) for place, token in enumerate(tokens)}

    def reads(self, argument: str, **others: Any) -> bool:
        """Return whether an argument, such as enable_thinking, changes prompts under the settings' other arguments.

        Args:
            argument: its name.
            others: values that replace those of the settings.
        """
        known = {**self.settings.template_arguments, **others}
        return any(
            reads_argument(self._as_text, fixed_moment(text, MOMENTS[0]), tools, argument, known)
            for text, tools in ((self.template, ()), (self.tool_template, [PROBE_TOOL]))
        )

    @property
    def replaced_end(self) -> int | None:
        """Id of the token with which the tokenizer's template ends answers, if the settings have another template."""
        if self.settings.template not in OWN_TEMPLATES or self.tokenizer.chat_template is None:
            return None
        try:
            own = ChatRenderer(self.tokenizer, self.settings.model_copy(update={"template": "chat"}))
        except LoratuneError:  # which may be why it is replaced
            return None
        return own.end_id if own._plain.end_token else None

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template renders the reasoning of a message."""
        return bool(self.reasoning_form.key)

    @property
    def remarks(self) -> list[str]:
        """Warnings about the template."""
        end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        stops = f"{end!r} is trained as the end of every answer, and generation stops on it"
        chats = (self._plain, self._with_tools)
        told = [text for chat in chats for text in (chat.end_remark.replace("{end}", stops), chat.remark)]
        return [text for text in dict.fromkeys(told) if text]

    def text_for(self, tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the template for a conversation, fixed to the date of the settings if it writes a date."""
        return self.at_its_day(self.tool_template if tools else self.template)

    def at_its_day(self, text: str) -> str:
        """Return a template fixed to the date of the settings; unchanged if no date is set or written."""
        return fixed_day(text, self.settings.date) if self.settings.date and self.is_dated else text

    def _exact_ids(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Return the ids of a prompt, with control tokens in texts encoded as characters."""
        tokenizer, (messages, tools) = with_marks_kept(self.tokenizer, [messages, tools])
        options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
        ids: list[int] = self._apply(messages, tools, tokenizer=tokenizer, **options)
        return ids

    def _apply(self, messages: Sequence[Any], tools: Sequence[dict[str, Any]] = (), **options: Any) -> Any:
        """Render one list of messages, or a list of such lists.

        Raises:
            LoratuneError: the template rejects the messages, as some reject a system prompt.
        """
        try:
            return self._render(self.text_for(tools), messages, tools, **options)
        except LoratuneError:
            if not isinstance(messages[0], list):
                raise
            return [self._apply(one, tools, **options) for one in messages]

    def _studied(self, text: str, tools: Sequence[dict[str, Any]]) -> ChatTemplate:
        """Determine what a template does with this tokenizer and these settings."""

        if self.settings.template not in OWN_TEMPLATES:
            try_template(text, [partial(self._as_text, text, *one, add_generation_prompt=True) for one in TRIALS])
        completes = self.settings.generation_prompt == "auto"
        return study_template(self._as_text, text, tools, self.settings.enable_thinking, self._special, completes)

    def _as_text(self, text: str, messages: Sequence[Any], tools: Sequence[dict[str, Any]] = (), **options: Any) -> str:
        return str(self._render(text, messages, tools, tokenize=False, **options))

    def _check_arguments(self) -> None:
        """Raise if the template does not read an argument that the settings have.

        The thinking mode has a default, so templates without one may ignore it.
        """
        settings, problems = self.settings, []
        for name in settings.template_arguments:
            if name == "enable_thinking" or self.reads(name):
                continue
            is_read_otherwise = self.reads(name, enable_thinking=not settings.enable_thinking)
            mode = f" while prompt.enable_thinking is {str(settings.enable_thinking).lower()}"
            problems.append(
                f"prompt.{name} is set, but the chat template ({settings.template}) does not read it"
                f"{mode if is_read_otherwise else ''}; leave it out"
            )
        if problems:
            raise LoratuneError("\n".join(problems), Exit.USAGE)

    def _render(self, text: str, messages: Sequence[Any], tools: Sequence[dict[str, Any]], **options: Any) -> Any:
        """Render messages with a template's text.

        Raises:
            LoratuneError: the template rejects the messages.
        """
        tokenizer = options.pop("tokenizer", self.tokenizer)
        arguments = options.pop("arguments", self.settings.template_arguments)
        try:
            return tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=text,
                adds_bos=self.adds_bos,
                **{**arguments, **options},
            )
        except FAILURES as error:
            listed = messages[0] if isinstance(messages[0], list) else messages
            roles = ", ".join(message["role"] for message in listed)
            effort = arguments.get("reasoning_effort")
            told = f" with prompt.reasoning_effort {effort!r}" if effort else ""
            raise LoratuneError(
                f"the tokenizer's chat template refuses the messages {roles}{told}: {error}", Exit.MODEL
            ) from error

    def _find_end(self, chat: ChatTemplate) -> int:
        """Return the id of the token that ends answers: the template's, or the tokenizer's EOS if it writes none."""
        if chat.end_token:
            return int(self.tokenizer.convert_tokens_to_ids(chat.end_token))
        if self.tokenizer.eos_token_id is None:
            raise LoratuneError("the tokenizer has no end token; answers would never stop", Exit.MODEL)
        return int(self.tokenizer.eos_token_id)

    def _chat(self, tools: Sequence[dict[str, Any]]) -> ChatTemplate:
        return self._with_tools if tools else self._plain

    def _continued(self, answer: str, tools: Sequence[dict[str, Any]]) -> list[Part]:
        """Return an answer as the continuation of its prompt, with its reasoning in the template's form."""
        return continued(answer, self._chat(tools), self._special)
