"""Selects a tokenizer's chat template, and determines its behaviour from small renderings.

The template's source is never searched. It is rendered with and without the feature in question, and the results are
compared.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any, NamedTuple

from loratune.data.formats.conversation import CLOSING, OPENING
from loratune.data.template.answer_ends import ANSWER, MARK, QUESTION, Render, Tools, frame_answer
from loratune.data.template.own import OWN_TEMPLATES
from loratune.data.template.reasoning_form import REASONED, REASONING_MARK, ReasoningForm, find_reasoning_form
from loratune.errors import Exit, LoratuneError
from loratune.protocols import Tokenizer

SYSTEM = {"role": "system", "content": "!"}
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "probe", "description": "Probes.", "parameters": {"type": "object", "properties": {}}},
}
# Two times that every strftime directive writes differently.
MOMENTS = datetime(2001, 2, 3, 4, 5, 6), datetime(2029, 11, 28, 19, 47, 38)
LONGEST_TEMPLATE = 100_000
"""In characters; the longest templates of published models have about 30,000."""
REPETITIONS = 8
"""Number of renderings after which random output has shown itself."""
USUAL_CLOSING = "\n</think>\n\n"
CLOCK = """\
{{%- macro strftime_now(format) -%}}{{%- set now = namespace(text=format) -%}}\
{{%- for sign, value in {written} -%}}{{%- set now.text = now.text|replace(sign, value) -%}}{{%- endfor -%}}\
{{{{ now.text }}}}{{%- endmacro %}}
"""
DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZf"
PADDED = "dHIjmMSUVWy"
"""Directives that have a variant without leading zeros, such as %-d."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text and behaviour."""

    text: str
    """Includes a generation prompt, even if the tokenizer's own template has none."""
    generation_prompt: str = ""
    """The generation prompt that was added to the text."""
    begun_reasoning: str = ""
    """The start of a reasoning block that the prompt itself contains, for models that always reason."""
    closed_reasoning: str = ""
    """The empty reasoning block that ends the prompt, for answers without reasoning."""
    answer_start: str = ""
    """Text between the generation prompt and an answer without reasoning."""
    form: ReasoningForm = field(default_factory=ReasoningForm)
    """How it writes reasoning."""
    behind_answers: str = ""
    """Text after an answer that is the last message."""
    end_token: str = ""
    """The special token that ends an answer; empty if the template writes none."""
    end_remark: str = ""
    """Warning about how it writes answers; {end} stands for the tokenizer's end token."""
    is_dated: bool = False
    """Whether it writes the current date or time."""
    remark: str = ""
    """Other warnings about the template."""


class TemplateTexts(NamedTuple):
    """The texts that render conversations; mostly the same."""

    plain: str
    with_tools: str


def find_templates(tokenizer: Tokenizer, name: str) -> TemplateTexts:
    """The texts that render conversations without tools and with them.

    Args:
        tokenizer: a transformers tokenizer; transformers chooses among several named templates.
        name: the recipe's prompt.template.

    Raises:
        LoratuneError: there is no template, there are several without a default, or one is too long.
    """
    if name in OWN_TEMPLATES:
        return TemplateTexts(OWN_TEMPLATES[name], OWN_TEMPLATES[name])
    known = tokenizer.chat_template
    if known is None:
        raise LoratuneError(
            "the tokenizer has no chat template (a base model?); set prompt.template to plain or alpaca", Exit.MODEL
        )
    try:
        texts = TemplateTexts(tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[PROBE_TOOL]))
    except ValueError as error:
        raise LoratuneError(
            f"the tokenizer has several chat templates ({', '.join(sorted(known))}) and none is called default; call "
            "the one that is meant default, or set prompt.template to plain or alpaca",
            Exit.MODEL,
        ) from error
    longest = max(map(len, texts))
    if longest > LONGEST_TEMPLATE:
        raise LoratuneError(
            f"the tokenizer's chat template has {longest:,} characters, and at most {LONGEST_TEMPLATE:,} are taken; "
            "fetch the model's files again, correct the template, or set prompt.template to plain or alpaca",
            Exit.MODEL,
        )
    return texts


def study_template(
    render: Render, text: str, tools: Tools, thinking: bool, special: re.Pattern[str], completes: bool = True
) -> ChatTemplate:
    """Determine what a template does with one tokenizer and one thinking mode.

    Args:
        render: renders messages with any template's text.
        text: the template's text.
        tools: tools of the probe conversations; empty for the template without tools.
        thinking: whether prompts ask for reasoning.
        special: matches the tokenizer's special tokens.
        completes: whether a missing generation prompt is added, and answers start as the template starts them.

    Raises:
        LoratuneError: the template rejects a question with an answer, changes the answer, has random output, or neither
            writes a generation prompt nor shows what it would be.
    """
    is_dated = _is_dated(render, text, tools)
    if is_dated:  # the clock must not advance between two renderings
        text, original = fixed_moment(text, MOMENTS[0]), text
    else:
        original = text
    frame = frame_answer(render, text, tools, special)
    before, added = frame.before, ""
    if completes and not _writes_a_prompt(render, text, tools):
        added = _missing_prompt(render(text, [QUESTION], tools), before, thinking, special)
    text, original = _completed(text, added), _completed(original, added)
    prompt = render(text, [QUESTION], tools, add_generation_prompt=True)
    form = find_reasoning_form(render, text, tools, thinking)
    if frame.end_token and frame.end_token in form.closing:  # generation would stop within the answer
        form = ReasoningForm(is_known=False)
    block = form.block_at_end(prompt)
    begun, closed = ("", block) if form.is_closed_in(block) else (block, "")
    start = _answer_start(render, text, tools, thinking, form, (prompt, before, begun)) if completes else ""
    remark = _remark(added, prompt, before, begun)
    return ChatTemplate(
        original, added, begun, closed, start, form, frame.behind, frame.end_token, frame.remark, is_dated, remark
    )


def fixed_day(text: str, day: str) -> str:
    """Return a template that uses a fixed date, such as 2026-11-26, as today."""
    return fixed_moment(text, datetime.combine(date.fromisoformat(day), time()))


@lru_cache(maxsize=64)
def fixed_moment(text: str, moment: datetime) -> str:
    """Return a template that uses a fixed time as now: a macro `strftime_now` shadows the function."""
    written = json.dumps([("%%", "\0"), *_directives(moment), ("\0", "%")])
    # transformers trims the line break after a block, so the template still starts at the beginning of a line.
    return CLOCK.format(written=written) + text


def _directives(moment: datetime) -> list[tuple[str, str]]:
    """Return each strftime directive that this system supports, and its output at a time."""
    known = []
    for letter in DIRECTIVES:
        try:
            known.append((f"%{letter}", moment.strftime(f"%{letter}")))
        except ValueError:
            continue
    bare = [(f"%-{sign[1]}", value.lstrip("0") or "0") for sign, value in known if sign[1] in PADDED]
    return [(sign, value) for sign, value in (*bare, *known) if sign != value]


def _is_dated(render: Render, text: str, tools: Tools) -> bool:
    """Return whether a template's output depends on the clock.

    Raises:
        LoratuneError: its output is random.
    """
    now, then = (_views(render, fixed_moment(text, moment), tools) for moment in MOMENTS)
    if any(_views(render, fixed_moment(text, MOMENTS[0]), tools) != now for _ in range(REPETITIONS)):
        raise LoratuneError(
            "the tokenizer's chat template renders the same messages in another way each time; a model cannot be "
            "trained on its prompts. Correct the template, or set prompt.template to plain or alpaca",
            Exit.MODEL,
        )
    return now != then


def _views(render: Render, text: str, tools: Tools) -> list[str]:
    """Render several kinds of prompts; the result is empty for those that the template rejects."""
    conversations = [([QUESTION], tools), ([SYSTEM, QUESTION], tools), ([QUESTION, ANSWER, QUESTION], tools)]
    views = []
    for messages, offered in [*conversations, ([QUESTION], [PROBE_TOOL])]:
        try:
            views.append(render(text, messages, offered, add_generation_prompt=True))
        except Exception:  # templates raise anything on messages that they do not support
            views.append("")
    return views


def _writes_a_prompt(render: Render, text: str, tools: Tools) -> bool:
    """Return whether add_generation_prompt changes the output."""
    return render(text, [QUESTION], tools) != render(text, [QUESTION], tools, add_generation_prompt=True)


def _missing_prompt(asked: str, before: str, thinking: bool, control: re.Pattern[str]) -> str:
    """Return the missing generation prompt of a template that ignores the flag: the text that it writes before answers.

    Args:
        asked: rendering of a question.
        before: rendering of the same question up to the answer.
        thinking: whether prompts ask for reasoning.
        control: matches special tokens.

    Raises:
        LoratuneError: the template writes an end after a question that it does not write before an answer.
    """
    shared = len(os.path.commonprefix([asked, before]))  # noqa: RUF071 - of texts
    shared = min([shared, *(one.start() for one in control.finditer(asked) if one.start() < shared < one.end())])
    ending, header = asked[shared:], before[shared:]
    if ending and control.sub("", ending).strip():
        return ""  # it always writes a generation prompt, as plain text
    if ending:
        raise LoratuneError(
            f"the tokenizer's chat template ignores add_generation_prompt, and cannot be completed: it ends a question "
            f"with {_end(asked)!r} where it begins an answer with {_end(before)!r}. Correct the template, or take it "
            "as it is with prompt.generation_prompt: template",
            Exit.MODEL,
        )
    if thinking:
        header = header.partition(OPENING)[0]
    header = header.rstrip(" ")  # tokenizers merge a space with the following word
    # Whitespace and an empty block alone are no header: with [INST] and the like they belong to the question.
    return header if re.sub(rf"{OPENING}|{CLOSING}|\s", "", header) else ""


def _completed(text: str, generation_prompt: str) -> str:
    if not generation_prompt:
        return text
    # Jinja drops one line break at the end of a template, and {{ '' }} keeps a block's from being trimmed.
    addition = (
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(generation_prompt, ensure_ascii=False)} }}}}{{% endif %}}"
    )
    return text.removesuffix("\n") + "{{ '' }}" + addition


def _answer_start(
    render: Render, text: str, tools: Tools, thinking: bool, form: ReasoningForm, seen: tuple[str, str, str]
) -> str:
    """Return the text between the prompt and an answer without reasoning.

    Args:
        render, text, tools, thinking: see `study_template`.
        form: how it writes reasoning.
        seen: a prompt, the text before an answer, and the start of reasoning within the prompt.
    """
    prompt, before, begun = seen
    start = before[len(prompt) :] if before.startswith(prompt) else ""
    if not begun or form.is_closed_in(start):
        return start
    if not form.is_of_rows:
        return form.closing + form.answer_start
    # Close the block as the template closes an empty one, or else as it closes one with content.
    other = render(text, [QUESTION], tools, add_generation_prompt=True, enable_thinking=not thinking)
    if other.startswith(prompt) and CLOSING in other[len(prompt) :]:
        return other[len(prompt) :]
    shown = render(text, [QUESTION, REASONED], tools).rpartition(REASONING_MARK)[2].partition(MARK)[0]
    return shown if CLOSING in shown and not shown.replace(CLOSING, "").strip() else USUAL_CLOSING


def _remark(added: str, prompt: str, before: str, begun: str) -> str:
    if added:
        return (
            "the tokenizer's chat template ignores add_generation_prompt: prompts are completed with what it writes "
            f"before its own answers, {added!r}; prompt.generation_prompt: template takes it as it is"
        )
    is_continued = begun or before.startswith(prompt) or prompt.startswith(before)
    if not is_continued:
        return (
            f"the tokenizer's chat template asks for an answer with {_end(prompt)!r} and writes earlier answers after "
            f"{_end(before)!r}; answers are trained after the former, as other programs ask"
        )
    return ""


def _end(text: str) -> str:
    """Return the text after the question."""
    return text.rpartition(str(QUESTION["content"]))[2] or text[-40:]
