"""How other tools turn a conversation into ids and labels: TRL by its package, others by what they document."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from loratune.data.encoding.encoder import IGNORED
from loratune.data.formats.conversation import CLOSING, OPENING, Conversation
from loratune.errors import first_line_of
from loratune.migration.sheet import is_off

EMPTY_THOUGHT = f"{OPENING}\n\n{CLOSING}\n\n"
THOUGHT = re.compile(rf"{OPENING}\n.*?\n{CLOSING}\n\n", re.DOTALL)
TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
Pieces = list[tuple[str, bool]]
"""Texts that are encoded one by one, each with whether it is trained."""
PeerForm = Callable[[Any, dict[str, Any], Conversation], tuple[list[int], list[int]]]
"""(tokenizer, row, conversation) → ids, and labels that are ids or -100."""


class NotComparableError(ValueError):
    """A row is not rendered, with the reason."""


@dataclass(frozen=True)
class TurnForm:
    """A template that writes each turn alike. `{}` is the text of the turn; `{bos}` and `{eos}` are control tokens."""

    user: str
    end: str
    """What ends an answer, trained with it."""
    system: str = "{}"
    begins: str = ""
    default_system: str = ""
    thought: str = ""
    """What an answer without reasoning begins with."""
    is_thought_trained: bool = True
    """Whether the thought is trained; where it is not, the reasoning of answers is left out."""
    is_end_apart: bool = False
    """Whether the end is encoded apart from the answer."""

    def __call__(self, tokenizer: Any, row: dict[str, Any], spoken: Conversation) -> tuple[list[int], list[int]]:
        """Return ids and labels."""
        pieces: Pieces = [(self.begins, False)]
        messages = list(enumerate(spoken.messages))
        system = messages.pop(0)[1]["content"] if messages[0][1]["role"] == "system" else self.default_system
        if system:
            pieces.append((self.system.replace("{}", system), False))
        for turn, (place, message) in enumerate(messages):
            if message["role"] != ("assistant" if turn % 2 else "user") or message.get("tool_calls"):
                raise NotComparableError("it has tools, or turns in an unusual order")
            text, is_trained = message["content"], place not in spoken.untrained
            if message["role"] == "user":
                pieces.append((self.user.replace("{}", text), False))
                continue
            if self.thought and not self.is_thought_trained:
                text = THOUGHT.sub("", text).lstrip("\n")
            if self.thought and OPENING not in text:
                pieces.append((self.thought, is_trained and self.is_thought_trained))
            pieces += [(part, is_trained) for part in ((text, self.end) if self.is_end_apart else (text + self.end,))]
        return encoded(tokenizer, pieces)


def encoded(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[int]]:
    """Return the ids of pieces, and their labels."""
    ids, labels = list[int](), list[int]()
    for text, is_trained in pieces:
        filled = text.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token or "")
        found = list(tokenizer(filled, add_special_tokens=False).input_ids) if filled else []
        ids += found
        labels += found if is_trained else [IGNORED] * len(found)
    return ids, labels


@dataclass(frozen=True)
class WholeTemplate:
    """The tokenizer's own template over the whole conversation; spans of it are trained."""

    trained: str
    """`answers` with the token that ends them, answers with the `line` that ends them, or `everything`."""

    def __call__(self, tokenizer: Any, row: dict[str, Any], spoken: Conversation) -> tuple[list[int], list[int]]:
        """Return ids and labels."""
        messages = list(spoken.messages)
        if spoken.tools or any(message["role"] == "tool" for message in messages):
            raise NotComparableError("it has tools")

        def written(count: int, asks: bool = False) -> str:
            try:
                text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asks)
            except Exception as error:  # a template raises what it likes
                raise NotComparableError(f"the template refuses it: {first_line_of(error)}") from error
            return str(text)

        whole = written(len(messages))
        spans = [] if self.trained != "everything" else [(0, len(whole))]
        for place, message in enumerate(messages if not spans else ()):
            if message["role"] == "assistant" and place not in spoken.untrained:
                before, until = written(place, asks=True), written(place + 1)
                if not whole.startswith(before) or not whole.startswith(until):
                    raise NotComparableError(
                        "the template writes an earlier answer in another way once another follows"
                    )
                end = until if self.trained == "line" else until.rstrip("\n")
                spans.append((len(before), len(end)))
        found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(found.input_ids)
        starts = [start for start, _ in found.offset_mapping]
        labels = [
            token if any(first <= start < end for first, end in spans) else IGNORED
            for token, start in zip(ids, starts, strict=True)
        ]
        return ids, labels


@dataclass(frozen=True)
class TrlForm:
    """TRL's form, with the template that the installed TRL itself would train with."""

    trains_answers: bool
    """Whether only what that template marks as generated is trained."""
    trains_completions: bool | None
    """Whether the prompt of a prompt and completion is not trained; None if the config leaves it to TRL."""

    def __call__(self, tokenizer: Any, row: dict[str, Any], spoken: Conversation) -> tuple[list[int], list[int]]:
        """Return ids and labels."""
        messages, completion = list(spoken.messages), row.get("completion")
        if spoken.tools or any(message["role"] == "tool" for message in messages):
            raise NotComparableError("it has tools")
        if isinstance(completion, str):
            raise NotComparableError("there, a prompt and completion of text get no template")
        try:
            options = {"chat_template": _training_template(tokenizer) if self.trains_answers else None}
            whole = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=self.trains_answers, **options
            )
            ids, begin = list(whole["input_ids"]), 0
            if completion and self.trains_completions is not False:
                asked = messages[: len(messages) - len(completion)]
                prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, **options)
                same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt["input_ids"], ids, strict=False))
                begin = len(list(same))
        except Exception as error:  # a template raises what it likes
            raise NotComparableError(f"TRL refuses it: {first_line_of(error)}") from error
        marks = whole.get("assistant_masks", [1] * len(ids))
        return ids, [
            token if mark and place >= begin else IGNORED
            for place, (token, mark) in enumerate(zip(ids, marks, strict=True))
        ]


def _training_template(tokenizer: Any) -> str | None:
    """Return the template by which TRL finds answers; None for the tokenizer's own, if that marks them.

    Raises:
        ValueError: TRL has none for this tokenizer, and would not train.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)


CHATML = TurnForm(
    user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>\n",
    system="<|im_start|>system\n{}<|im_end|>\n",
)
QWEN = replace(CHATML, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = replace(CHATML, thought=EMPTY_THOUGHT)
HEAD = "<|start_header_id|>{role}<|end_header_id|>\n\n"
LLAMA3 = TurnForm(
    user=f"{HEAD.replace('{role}', 'user')}{{}}<|eot_id|>{HEAD.replace('{role}', 'assistant')}",
    end="<|eot_id|>",
    system=f"{HEAD.replace('{role}', 'system')}{{}}<|eot_id|>",
    begins="{bos}",
)
LLAMA_FACTORY_FORMS = {
    "qwen": QWEN,
    "qwen3": QWEN3,
    "qwen3_nothink": CHATML,
    "qwen3_5": QWEN3,
    "qwen3_5_nothink": CHATML,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "alpaca": TurnForm("### Instruction:\n{}\n\n### Response:\n", "{eos}\n\n", default_system=f"{TASK}. {REQUEST}\n\n"),
    "default": TurnForm("Human: {}{eos}\nAssistant:", "{eos}\n", system="System: {}{eos}\n"),
}
SWIFT_FORMS = {
    "chatml": CHATML,
    "qwen": replace(CHATML, default_system="You are a helpful assistant."),
    "qwen2_5": QWEN,
    "qwen3": QWEN3,
    "qwen3_nothinking": CHATML,
}


def axolotl_alpaca(tokenizer: Any, row: dict[str, Any], spoken: Conversation) -> tuple[list[int], list[int]]:
    """axolotl's alpaca: the input of a row has a heading and another first sentence."""
    asked, given, answer = (str(row.get(name) or "") for name in ("instruction", "input", "output"))
    if len(spoken.messages) > 2 or not asked:
        raise NotComparableError("it is no row of alpaca with one question")
    middle = f"### Input:\n{given}\n\n" if given else ""
    context = ", paired with an input that provides further context" if given else ""
    prompt = f"{TASK}{context}. {REQUEST}\n\n### Instruction:\n{asked}\n\n{middle}### Response:\n"
    begins = "{bos}" if tokenizer("").input_ids == [tokenizer.bos_token_id] else ""
    return encoded(tokenizer, [(begins, False), (prompt, False), (answer, True), ("{eos}", True)])


def form_of(tool: str, known: dict[str, Any], tokenizer: Any) -> PeerForm | None:
    """Return how a tool renders the rows of a config; None if its form is not known here.

    Args:
        tool: its name.
        known: name → value of the config, with the tool's defaults.
        tokenizer: the base's tokenizer.
    """
    system = str(known.get("system") or known.get("default_system") or known.get("default_system_message") or "")
    named = str(known.get("template") or known.get("template_type") or "")
    found: TurnForm | None
    match tool:
        case "LLaMA-Factory":
            found = LLAMA_FACTORY_FORMS.get(named)
            thinks = not is_off(known.get("enable_thinking", True))
            found = replace(found, is_thought_trained=thinks) if found else None
        case "ms-swift":
            found = SWIFT_FORMS.get(named) if named else _chatml_of(tokenizer)
            found = replace(found, is_end_apart=True) if found else None
        case "axolotl":
            kinds = {str(entry.get("type", "chat_template")) for entry in _entries(known.get("datasets"))}
            template = str(known.get("chat_template", "tokenizer_default"))
            if kinds == {"alpaca"}:
                return axolotl_alpaca
            return WholeTemplate("answers") if kinds == {"chat_template"} and template == "tokenizer_default" else None
        case "TRL" if known.get("chat_template_path"):
            return None
        case "TRL":
            completions = known.get("completion_only_loss")
            return TrlForm(
                not is_off(known.get("assistant_only_loss", False)),
                None if completions is None else not is_off(completions),
            )
        case _:
            return WholeTemplate("line" if not is_off(known.get("train_on_completions", False)) else "everything")
    return replace(found, default_system=system) if found and system else found


def _entries(value: Any) -> Sequence[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _chatml_of(tokenizer: Any) -> TurnForm | None:
    """Return ChatML with what the tokenizer's own template adds to it, as ms-swift has one for each model."""
    if not tokenizer.chat_template:
        return None
    asked = [{"role": "user", "content": "A"}]
    texts = [
        str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options))
        for options in ({}, {"enable_thinking": False})
    ]
    opening, closing = "<|im_start|>system\n", "<|im_end|>\n"
    system, rest = "", texts[0]
    if rest.startswith(opening):
        system, _, rest = rest.removeprefix(opening).partition(closing)
    if not rest.startswith(CHATML.user.replace("{}", "A")):
        return None
    return replace(CHATML, default_system=system, thought=EMPTY_THOUGHT if texts[1].endswith(EMPTY_THOUGHT) else "")
