"""A tokenizer's chat template: which one renders, and what small renderings show that it does.

Nothing is told from a template's text. It is rendered with and without what is in question, and the results compared.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any, NamedTuple

from loratune.data.template.answer_ends import ANSWER, MARK, QUESTION, Render, Tools, frame_answer
from loratune.data.template.own import OWN_TEMPLATES
from loratune.errors import Exit, LoratuneError
from loratune.protocols import Tokenizer

REASONING_MARK = "loratune-reasoning"
SYSTEM = {"role": "system", "content": "!"}
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "probe", "description": "Probes.", "parameters": {"type": "object", "properties": {}}},
}
# Two moments that no directive of strftime writes alike.
MOMENTS = datetime(2001, 2, 3, 4, 5, 6), datetime(2029, 11, 28, 19, 47, 38)
LONGEST_TEMPLATE = 100_000
"""Characters; the longest that models come with have some 30,000."""
REPETITIONS = 8
"""Of a rendering, after which a random choice has shown itself."""
OPENING, CLOSING = "<think>", "</think>"
USUAL_CLOSING = "\n</think>\n\n"
CLOCK = """\
{{%- macro strftime_now(format) -%}}{{%- set now = namespace(text=format) -%}}\
{{%- for sign, value in {written} -%}}{{%- set now.text = now.text|replace(sign, value) -%}}{{%- endfor -%}}\
{{{{ now.text }}}}{{%- endmacro %}}
"""
DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZf"
PADDED = "dHIjmMSUVWy"
"""Directives with a form without zeros in front: %-d."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text and what it does."""

    text: str
    """With a generation prompt, also where the tokenizer's own has none."""
    generation_prompt: str = ""
    """What was added for that."""
    begun_reasoning: str = ""
    """What of a reasoning block the prompt itself already holds, as with models that always think."""
    answer_start: str = ""
    """What the template writes between its generation prompt and an answer that has no reasoning."""
    behind_answers: str = ""
    """What it writes after an answer that stands last."""
    end_token: str = ""
    """The special token that ends an answer; empty where the template sets none."""
    end_remark: str = ""
    """What the user should know of how it writes answers; {end} stands for what the tokenizer ends them with."""
    is_dated: bool = False
    """Whether it writes the date or the time."""
    remark: str = ""
    """What the user should know of it."""


class TemplateTexts(NamedTuple):
    """The texts that render conversations; mostly the same."""

    plain: str
    with_tools: str


def find_templates(tokenizer: Tokenizer, name: str) -> TemplateTexts:
    """The texts that render conversations without tools and with them.

    Args:
        tokenizer: a transformers tokenizer; of several named templates the choice is transformers' own.
        name: the recipe's prompt.template.

    Raises:
        LoratuneError: there is no template, or several and none is the default, or one is too long.
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
    """What a template does with one tokenizer and one thinking mode.

    Args:
        render: renders messages with any template's text.
        text: the template's.
        tools: what its conversations offer; none for one that is used without.
        thinking: whether prompts ask for reasoning.
        special: finds the tokenizer's special tokens.
        completes: whether prompts are completed and answers begun as the template itself does it.

    Raises:
        LoratuneError: it refuses a question with an answer, does not write the answer as it is, changes by chance, or
            writes no generation prompt and does not show one either.
    """
    is_dated = _is_dated(render, text, tools)
    if is_dated:  # the clock must not tick between two renderings
        text, original = fixed_moment(text, MOMENTS[0]), text
    else:
        original = text
    frame = frame_answer(render, text, tools, special)
    before, added = frame.before, ""
    if completes and not _writes_a_prompt(render, text, tools):
        added = _missing_prompt(render(text, [QUESTION], tools), before, thinking, special)
    text, original = _completed(text, added), _completed(original, added)
    prompt = render(text, [QUESTION], tools, add_generation_prompt=True)
    begun = _begun_reasoning(prompt)
    start = _answer_start(render, text, tools, thinking, (prompt, before, begun)) if completes else ""
    remark = _remark(added, prompt, before, begun)
    return ChatTemplate(original, added, begun, start, frame.behind, frame.end_token, frame.remark, is_dated, remark)


def fixed_day(text: str, day: str) -> str:
    """A template that takes a day, as 2026-11-26, for today."""
    return fixed_moment(text, datetime.combine(date.fromisoformat(day), time()))


@lru_cache(maxsize=64)
def fixed_moment(text: str, moment: datetime) -> str:
    """A template that takes a moment for now: its `strftime_now` is a macro that knows this moment alone."""
    written = json.dumps([("%%", "\0"), *_directives(moment), ("\0", "%")])
    # The last line's end belongs to its block: transformers trims it, so that the template begins at a line's start.
    return CLOCK.format(written=written) + text


def _directives(moment: datetime) -> list[tuple[str, str]]:
    """Each directive of strftime that this system knows, and what it writes at a moment."""
    known = []
    for letter in DIRECTIVES:
        try:
            known.append((f"%{letter}", moment.strftime(f"%{letter}")))
        except ValueError:
            continue
    bare = [(f"%-{sign[1]}", value.lstrip("0") or "0") for sign, value in known if sign[1] in PADDED]
    return [(sign, value) for sign, value in (*bare, *known) if sign != value]


def _is_dated(render: Render, text: str, tools: Tools) -> bool:
    """Whether a template draws on the clock.

    Raises:
        LoratuneError: it draws on chance.
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
    """Prompts of several kinds; empty for those that the template refuses."""
    conversations = [([QUESTION], tools), ([SYSTEM, QUESTION], tools), ([QUESTION, ANSWER, QUESTION], tools)]
    views = []
    for messages, offered in [*conversations, ([QUESTION], [PROBE_TOOL])]:
        try:
            views.append(render(text, messages, offered, add_generation_prompt=True))
        except Exception:  # a template may fail at what it was not made for in any way
            views.append("")
    return views


def _writes_a_prompt(render: Render, text: str, tools: Tools) -> bool:
    """Whether add_generation_prompt makes a difference."""
    return render(text, [QUESTION], tools) != render(text, [QUESTION], tools, add_generation_prompt=True)


def _missing_prompt(asked: str, before: str, thinking: bool, control: re.Pattern[str]) -> str:
    """What a template that ignores add_generation_prompt would have to write: what it sets before its own answers.

    Args:
        asked: what it makes of a question.
        before: what it writes before the answer to it.
        thinking: whether prompts ask for reasoning.
        control: finds special tokens.

    Raises:
        LoratuneError: it ends the text after a question.
    """
    shared = len(os.path.commonprefix([asked, before]))  # noqa: RUF071 - of texts
    shared = min([shared, *(one.start() for one in control.finditer(asked) if one.start() < shared < one.end())])
    ending, header = asked[shared:], before[shared:]
    if ending and control.sub("", ending).strip():
        return ""  # it always asks for an answer, in words of its own
    if ending:
        raise LoratuneError(
            f"the tokenizer's chat template ignores add_generation_prompt, and cannot be completed: it ends a question "
            f"with {_end(asked)!r} where it begins an answer with {_end(before)!r}. Correct the template, or take it "
            "as it is with prompt.generation_prompt: template",
            Exit.MODEL,
        )
    if thinking:
        header = header.partition(OPENING)[0]
    header = header.rstrip(" ")  # tokenizers make one token of a space and the word behind it
    # Blanks and an empty block alone are no header: those of [INST] and the like are part of the question.
    return header if re.sub(rf"{OPENING}|{CLOSING}|\s", "", header) else ""


def _completed(text: str, generation_prompt: str) -> str:
    if not generation_prompt:
        return text
    # Jinja drops one line's end at the end of a template, and {{ '' }} keeps a block's from being trimmed.
    addition = (
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(generation_prompt, ensure_ascii=False)} }}}}{{% endif %}}"
    )
    return text.removesuffix("\n") + "{{ '' }}" + addition


def _begun_reasoning(prompt: str) -> str:
    _, opening, rest = prompt.rpartition(OPENING)
    return opening + rest if opening and not rest.strip() else ""


def _answer_start(render: Render, text: str, tools: Tools, thinking: bool, seen: tuple[str, str, str]) -> str:
    """What stands before an answer without reasoning once the prompt is written.

    Args:
        render, text, tools, thinking: as `study_template`.
        seen: a prompt, what the template writes before an answer, and the reasoning that the prompt begins.
    """
    prompt, before, begun = seen
    start = before[len(prompt) :] if before.startswith(prompt) else ""
    if not begun or CLOSING in start:
        return start
    # As the template closes a block that must be empty, or else one that is not.
    other = render(text, [QUESTION], tools, add_generation_prompt=True, enable_thinking=not thinking)
    if other.startswith(prompt) and CLOSING in other[len(prompt) :]:
        return other[len(prompt) :]
    reasoned = {**ANSWER, "reasoning_content": REASONING_MARK}
    shown = render(text, [QUESTION, reasoned], tools).rpartition(REASONING_MARK)[2].partition(MARK)[0]
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
    """What stands after the question."""
    return text.rpartition(str(QUESTION["content"]))[2] or text[-40:]
