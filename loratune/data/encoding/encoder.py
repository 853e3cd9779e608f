"""Renders conversations as token ids and labels, identically in training and inference.

A training example is prompt ids + answer ids + end token, so labels are known by construction and never searched for.
User text never becomes a control token: `<|im_end|>` in a row is encoded as plain characters.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby, pairwise
from typing import Any

from loratune.data.encoding.tokens import Ids, all_ids
from loratune.data.formats.conversation import CLOSING, OPENING, Conversation, Message, reasoning_apart, texts_in
from loratune.data.template.answer_parts import Part, split_parts
from loratune.data.tools.tool_rendering import ToolRenderer
from loratune.errors import Exit, LoratuneError

IGNORED = -100
"""Label of positions without loss; torch's cross-entropy ignores it."""


LATER_BLOCK = re.compile(rf"^[ \t]*{OPENING}.*?{CLOSING}", re.DOTALL | re.MULTILINE)
"""Matches reasoning after the beginning of an answer, where a line begins with it."""


@dataclass(frozen=True)
class Example:
    """A training sequence: `labels[i]` is `input_ids[i]` where the model learns, and IGNORED elsewhere."""

    input_ids: Ids
    labels: Ids

    @property
    def trained_tokens(self) -> int:
        """Number of labelled positions."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass
class _Turn:
    """An answer to train on, and its prompt."""

    row: int
    prompt: list[dict[str, Any]]
    """Messages in the form that the template takes."""
    tools: tuple[dict[str, Any], ...]
    parts: list[Part]
    """The answer."""
    is_harmless: bool
    """True if no text of the prompt contains a control token."""

    @property
    def answer(self) -> str:
        """The answer's whole text."""
        return "".join(text for text, _ in self.parts)


class Encoder(ToolRenderer):
    """Renders conversations with one tokenizer and one set of prompt settings.

    Args:
        tokenizer: a transformers tokenizer.
        settings: template, system prompt, thinking mode, instruction prefix.

    Raises:
        LoratuneError: the tokenizer has no chat template, or no token to end an answer with.
    """

    def at_a_day(self) -> Encoder:
        """Return an encoder whose prompts do not change with time: they use the date of the settings, or today's."""
        if self.settings.date or not self.is_dated:
            return self
        day = date.today().isoformat()
        return Encoder(self.tokenizer, self.settings.model_copy(update={"date": day}))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the ids of the prompt, up to where the answer to the last message begins.

        Args:
            messages: optional system message, then alternating user and assistant messages; the last is of user or
                tool.
            tools: tools that the assistant may call.

        Raises:
            ToolError: the template does not support tools.
            LoratuneError: the template rejects the messages.
        """
        self.check_tools(messages, tools)
        return self._exact_ids(self._with_settings(messages), tools)

    def answer_ids(self, text: str, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the ids of an answer that continues the prompt, including its end token.

        Ordinary added tokens in the text, such as <think>, stay tokens; special ones are encoded as characters.
        """
        return [*self._part_ids(self._continued(text, tools)), self.end_id]

    def reply_ids(
        self, messages: Sequence[Message], answer: Message | str, tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Return the trained ids of an answer to a conversation, including tool calls and the end token.

        An answer given as a string has no tool calls.
        """
        if isinstance(answer, str):
            return self.answer_ids(answer, tools)
        if not answer.get("tool_calls"):
            return self.answer_ids(answer["content"], tools)
        (example,) = self.encode(Conversation((*messages, answer), tools=tuple(tools)), train_on="last")
        return [label for label in example.labels if label != IGNORED]

    def encode(self, conversation: Conversation, train_on: str = "all", train_thinking: bool = True) -> list[Example]:
        """Return the training sequences of a conversation.

        Every trained answer follows exactly the prompt that inference would give. Turns share a sequence if the
        template renders the longer conversation as a continuation of the shorter one. If it does not (Qwen3 drops the
        reasoning of earlier turns), each trained turn gets its own sequence.

        Args:
            conversation: the conversation to encode.
            train_on: `all` answers, or only the `last`.
            train_thinking: whether the reasoning block of an answer is trained too.

        Raises:
            LoratuneError: the template rejects the messages, or does not support their tools.
        """
        return self.encode_all([conversation], train_on, train_thinking)[0]

    def encode_all(
        self, conversations: Sequence[Conversation], train_on: str = "all", train_thinking: bool = True
    ) -> list[list[Example]]:
        """Apply `encode` to many conversations at once, which is faster than one at a time."""
        turns = [turn for row, spoken in enumerate(conversations) for turn in self._turns_of(row, spoken, train_on)]
        answers = self._answers(turns)
        sequences: list[list[Example]] = [[] for _ in conversations]
        for turn, prompt, answer in zip(turns, self._prompts(turns), answers, strict=True):
            unlearnt = 0 if train_thinking else self._count_reasoning(turn, answer)
            examples, answer_ids = sequences[turn.row], answer + array("i", [self.end_id])
            labels = array("i", [IGNORED]) * len(prompt)
            if examples and prompt[: len(examples[-1].input_ids)] == examples[-1].input_ids:
                earlier = examples.pop().labels
                labels[: len(earlier)] = earlier
            labels += array("i", [IGNORED]) * unlearnt
            examples.append(Example(prompt + answer_ids, labels + answer_ids[unlearnt:]))
        return sequences

    def _turns_of(self, row: int, conversation: Conversation, train_on: str) -> list[_Turn]:
        self.check_tools(conversation.messages, conversation.tools)
        self._check_nothing_is_lost(conversation)
        self._check_reasoning(conversation)
        messages, tools = self._with_settings(conversation.messages), conversation.tools
        added = len(messages) - len(conversation.messages)
        is_harmless, seen = not self._is_forging(tools), 0
        turns = []
        for place in conversation.trained_answers(train_on):
            prompt = messages[: place + added]
            is_harmless = is_harmless and not self._is_forging(prompt[seen:])
            seen = len(prompt)
            if conversation.messages[place].get("tool_calls"):
                parts = self._parts_of_calls(prompt, messages[place + added], tools)
            else:
                parts = self._continued(conversation.messages[place]["content"], tools)
            turns.append(_Turn(row, prompt, tools, parts, is_harmless))
        return turns

    def _answers(self, turns: list[_Turn]) -> list[Ids]:
        """Return the ids of each answer."""
        parts = [part for turn in turns for part in turn.parts]
        known = {
            is_own: iter(all_ids(self.tokenizer, [text for text, own in parts if own is is_own], keep_special=is_own))
            for is_own in (False, True)
        }
        return [sum((next(known[is_own]) for _, is_own in turn.parts), array("i")) for turn in turns]

    def _part_ids(self, parts: Sequence[Part]) -> Ids:
        """Return the ids of an answer."""
        return sum((all_ids(self.tokenizer, [text], keep_special=own)[0] for text, own in parts), array("i"))

    def _is_forging(self, value: Any) -> bool:
        """Return whether a text within the value contains a control token."""
        return any(self._control.search(text) for text in texts_in(value))

    def _prompts(self, turns: list[_Turn]) -> list[Ids]:
        """Return `prompt_ids` of each turn."""
        texts: list[str] = []
        for tools, group in groupby((turn for turn in turns if turn.is_harmless), key=lambda turn: turn.tools):
            texts += self._apply([turn.prompt for turn in group], tools, tokenize=False, add_generation_prompt=True)
        ids = iter(all_ids(self.tokenizer, texts, keep_special=True))
        exact = (array("i", self._exact_ids(turn.prompt, turn.tools)) for turn in turns if not turn.is_harmless)
        return [next(ids if turn.is_harmless else exact) for turn in turns]

    def _check_nothing_is_lost(self, conversation: Conversation) -> None:
        """Raise if the template drops a message of an unusual turn order, as some drop a later system message."""
        roles = [message["role"] for message in conversation.messages]
        is_unusual = "system" in roles[1:] or any(one == other and one != "tool" for one, other in pairwise(roles))
        if not is_unusual:
            return
        messages = self._with_settings(conversation.messages)
        text = self._apply(messages, conversation.tools, tokenize=False)
        lost = next((message for message in messages if message["content"].strip() not in text), None)
        if lost:
            raise LoratuneError(
                f"the chat template does not render a message of {lost['role']} in a row whose messages are "
                f"{', '.join(roles)}; leave such rows out, or put it where the template takes it",
                Exit.DATA,
            )

    def _check_reasoning(self, conversation: Conversation) -> None:
        """Raise if an answer has reasoning that cannot be written in the template's form."""
        form = self._chat(conversation.tools).form
        if form.is_known and form.is_of_rows:
            return
        answers = (one["content"] for one in conversation.messages if one["role"] == "assistant")
        parts = [reasoning_apart(answer) for answer in answers]
        if not form.is_known and any(reasoning for reasoning, _ in parts):
            raise LoratuneError(
                "it has reasoning, and the form in which the chat template writes reasoning cannot be determined; use "
                "a newer template of the model, or leave the reasoning out",
                Exit.DATA,
            )
        if any(LATER_BLOCK.search(text) for _, text in parts):
            raise LoratuneError(
                "it has reasoning that does not begin an answer, and the chat template writes it at the beginning, "
                f"after {form.opening!r}; leave it out, or put it there",
                Exit.DATA,
            )

    def _count_reasoning(self, turn: _Turn, ids: Ids) -> int:
        """Return the number of answer tokens that cover the reasoning block and the line breaks after it."""
        text, chat = turn.answer, self._chat(turn.tools)
        opening = chat.form.opening
        behind_start = text.removeprefix(chat.answer_start.partition(opening)[0]).lstrip()
        is_begun = bool(chat.begun_reasoning) or behind_start.startswith(opening.lstrip())
        end = chat.form.end.search(text) if is_begun else None
        if not end:
            return 0
        block = array("i")
        for length in (end.end(1), end.start(1)):
            block, rest = (self._part_ids(parts) for parts in split_parts(turn.parts, length))
            if block + rest == ids:
                return len(block)
        # One token spans the end of the block and the start of the text after it.
        return 1 + next((n for n, (one, other) in enumerate(zip(block, ids, strict=False)) if one != other), len(block))

    def with_reasoning_apart(self, message: Message) -> dict[str, Any]:
        """Pass an earlier answer's reasoning apart from its text to templates that read it.

        Qwen3's template can also extract reasoning from the content, but not through the marks that protect control
        tokens in texts.
        """
        content, form = message["content"], self.reasoning_form
        is_split = message["role"] == "assistant" and CLOSING in content and self.reads_reasoning
        if not is_split:
            return dict(message)
        if not form.is_of_rows:
            thought, said = reasoning_apart(content)
            return {**message, "content": said, **({form.key: thought} if thought else {})}
        return {
            **message,
            "content": content.rpartition(CLOSING)[2].lstrip("\n"),
            form.key: content.partition(CLOSING)[0].rpartition(OPENING)[2].strip("\n"),
        }

    def _with_settings(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Add the system prompt if there is none, and the instruction prefix to each user message."""
        prefix, system = self.settings.instruction_prefix, self.settings.system
        rendered = [
            {"role": "user", "content": prefix + message["content"]}
            if message["role"] == "user"
            else self.with_reasoning_apart(message)
            for message in messages
        ]
        if system and rendered[0]["role"] != "system":
            rendered.insert(0, {"role": "system", "content": system})
        return self._with_ids(rendered)
