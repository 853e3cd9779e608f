"""An Ollama Modelfile for a model folder: the chat template in Go's language, where Ollama stops, how it samples.

Ollama reads no Jinja. The template is found by rendering marked texts with the model's own tokenizer and taking what
stands between the marks; then conversations of several shapes are put together from these parts and compared with what
the tokenizer makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import console
from loratune.data.conversation import Message
from loratune.data.encoding import Encoder
from loratune.errors import Exit, LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.sections import PromptSettings
from loratune.writing import write_text

# generation_config.json's name → Ollama's.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
Render = Callable[[list[Message]], str]


@dataclass(frozen=True)
class ChatParts:
    """The texts of a chat template around what is said.

    A prompt is `before_system` system `after_system`, or `no_system` where there is no system prompt; then
    `before_user` user `before_answer` answer `after_answer` for each earlier turn; then `before_user` user
    `generation_prompt`.
    """

    before_system: str
    after_system: str
    no_system: str
    before_user: str
    before_answer: str
    after_answer: str
    generation_prompt: str

    @property
    def default_system(self) -> str:
        """The system prompt that the template sets by itself; empty if it sets none."""
        text = self.no_system
        around = len(self.before_system) + len(self.after_system)
        is_framed = text.startswith(self.before_system) and text.endswith(self.after_system) and len(text) > around
        return text[len(self.before_system) : len(text) - len(self.after_system)] if is_framed else ""

    def compose(self, messages: list[Message]) -> str:
        """A prompt put together from the parts, as Ollama does it; a user message stands last."""
        text = self.no_system
        for place, message in enumerate(messages):
            is_last = place == len(messages) - 1
            if message["role"] == "system":
                text = self.before_system + message["content"] + self.after_system
            elif message["role"] == "user":
                text += self.before_user + message["content"]
                text += self.generation_prompt if is_last else self.before_answer
            else:
                text += message["content"] + self.after_answer
        return text

    def go_template(self) -> str:
        """The template in Go's language; a conversation that ends with an answer is left open, to be continued.

        Every part is a literal of Go's, so nothing in it is read as an action and no space is trimmed.
        """
        part = {name: "{{ " + _go_literal(text) + " }}" if text else "" for name, text in vars(self).items()}
        after_user = part["before_answer"]
        if self.generation_prompt != self.before_answer:
            after_user = f"{{{{ if $last }}}}{part['generation_prompt']}{{{{ else }}}}{after_user}{{{{ end }}}}"
        after_answer = f"{{{{ if not $last }}}}{part['after_answer']}{{{{ end }}}}"
        return (
            f"{{{{- if .System }}}}{part['before_system']}{{{{ .System }}}}{part['after_system']}\n"
            f"{{{{- else }}}}{part['no_system']}\n"
            "{{- end }}\n"
            "{{- range $i, $_ := .Messages }}\n"
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
            f'{{{{- if eq .Role "user" }}}}{part["before_user"]}{{{{ .Content }}}}{after_user}\n'
            f'{{{{- else if eq .Role "assistant" }}}}{{{{ .Content }}}}{after_answer}\n'
            "{{- end }}\n"
            "{{- end }}"
        )


def write_modelfile(
    model: Path, gguf_name: str, folder: Path, num_ctx: int | None = None, settings: PromptSettings | None = None
) -> str:
    """Write `Modelfile` into a folder and return its text.

    Args:
        model: merged folder with the tokenizer and, perhaps, generation_config.json.
        gguf_name: name of the GGUF file beside the Modelfile.
        folder: where it is written.
        num_ctx: context length in tokens; Ollama's own if None.
        settings: how prompts were made in training; by default as the tokenizer's template has it, without thinking.

    Raises:
        LoratuneError: no Go template can be had that gives what the tokenizer's template gives, or a text cannot stand
            in a Modelfile.
    """
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer, settings or PromptSettings()).at_a_day()
    if encoder.is_dated:
        console.warn(
            f"the chat template writes the date into prompts: Ollama's names {encoder.settings.date}, whatever the day"
        )
    parts = derive_parts(_renderer(encoder), tokenizer.decode([encoder.end_id]))
    generation = _read_generation_config(model)
    lines = [f"FROM ./{_plain(gguf_name)}", f"TEMPLATE {_quoted(parts.go_template())}"]
    if parts.default_system:
        lines.append(f"SYSTEM {_quoted(parts.default_system)}")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _end_texts(encoder, generation)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(generation).items()]
    if num_ctx is not None:
        lines.append(f"PARAMETER num_ctx {num_ctx}")
    text = "\n".join(lines) + "\n"
    write_text(folder / "Modelfile", text)
    return text


def _renderer(encoder: Encoder) -> Render:
    """Prompts as the model sees them, less the beginning token, which Ollama sets by itself (`add_bos_token`)."""
    tokenizer = encoder.tokenizer

    def render(messages: list[Message]) -> str:
        ids = encoder.prompt_ids(messages)
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
            del ids[0]
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    return render


def derive_parts(render: Render, end_text: str) -> ChatParts:
    """Find a template's parts and make sure that they give what it gives.

    Args:
        render: gives the prompt for messages, a user message last.
        end_text: the token that ends an answer.

    Raises:
        LoratuneError: they do not, or the template refuses a conversation.
    """
    try:
        parts = _split_parts(render, end_text)
        for messages in _trial_conversations():
            if parts.compose(messages) != render(messages):
                roles = ", ".join(message["role"] for message in messages)
                raise LoratuneError(f"it renders {roles} in a way of its own", Exit.MODEL)
    except LoratuneError as error:
        raise LoratuneError(
            f"the chat template cannot be written for Ollama: {error}; "
            "use the GGUF file with a program that reads its chat template, such as llama.cpp's server",
            Exit.MODEL,
        ) from error
    return parts


def _split_parts(render: Render, end_text: str) -> ChatParts:
    marks = ["Mark-of-the-system", "Mark-of-the-first-question", "Mark-of-the-answer", "Mark-of-the-second-question"]
    turns = _conversation(*marks[1:])
    before_system, to_first, before_answer, to_second, generation_prompt = _split(
        render([{"role": "system", "content": marks[0]}, *turns]), marks
    )
    no_system, _ = _split(render(turns[:1]), marks[1:2])
    before_user = _common_end(to_first, to_second, no_system)
    # Any split does for the whole; people read it most easily if a turn's end token is the turn's.
    own_text = to_second.removeprefix(end_text).lstrip("\n")
    if before_user.endswith(own_text):
        before_user = own_text
    return ChatParts(
        before_system=before_system,
        after_system=to_first.removesuffix(before_user),
        no_system=no_system.removesuffix(before_user),
        before_user=before_user,
        before_answer=before_answer,
        after_answer=to_second.removesuffix(before_user),
        generation_prompt=generation_prompt,
    )


def _split(text: str, marks: list[str]) -> list[str]:
    """The texts before, between and after the marks."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise LoratuneError("it leaves out or changes what is said", Exit.MODEL)
        parts.append(before)
    return [*parts, text]


def _common_end(*texts: str) -> str:
    """The longest text that all end with."""
    return next(
        texts[0][place:] for place in range(len(texts[0]) + 1) if all(t.endswith(texts[0][place:]) for t in texts)
    )


def _trial_conversations() -> list[list[Message]]:
    texts = ("one", 'two "lines"\n\n{{ .Content }}', "三", "four `", "five", "<b>six</b>", "seven\\n")
    system: Message = {"role": "system", "content": 'Be "brief".\n\nBe kind.'}
    return [[*first, *_conversation(*texts[:count])] for count in (1, 3, 5, 7) for first in ([], [system])]


def _conversation(*texts: str) -> list[Message]:
    """Messages of user and assistant in turn."""
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


def _go_literal(text: str) -> str:
    """A string literal of Go's; JSON's escapes are among Go's."""
    return json.dumps(text, ensure_ascii=False)


def _quoted(text: str) -> str:
    """A value of a Modelfile, which knows no escapes: what is between the quotes, as it is.

    Raises:
        LoratuneError: the text would end its own quotes.
    """
    if '"""' in text:
        raise LoratuneError(
            'a Modelfile cannot hold a text with """ in it; take it out of the system prompt', Exit.MODEL
        )
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _plain(name: str) -> str:
    """A file name that a Modelfile takes as it is."""
    if not name or any(character in name for character in '"\r\n/'):
        raise LoratuneError(f"{name!r} is no file name that a Modelfile can hold", Exit.USAGE)
    return name


def _read_generation_config(model: Path) -> dict[str, Any]:
    path = model / "generation_config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LoratuneError(f"{path}: cannot be read: {error}", Exit.MODEL) from error
    return value if isinstance(value, dict) else {}


def _end_texts(encoder: Encoder, generation: dict[str, Any]) -> list[str]:
    """The tokens that end an answer, as text, each once."""
    others = generation.get("eos_token_id")
    ids = [encoder.end_id, *(others if isinstance(others, list) else [others])]
    tokens = encoder.tokenizer.convert_ids_to_tokens([place for place in ids if isinstance(place, int)])
    return list(dict.fromkeys(token for token in tokens if token))


def _sampling(generation: dict[str, Any]) -> dict[str, float]:
    """Ollama's parameters; greedy decoding is a temperature of 0."""
    # Ollama has had a penalty of 1.1 by default, which garbles answers learnt by heart; no penalty is everyone else's.
    given = {"repetition_penalty": 1.0, **generation}
    if given.get("do_sample") is False:
        given["temperature"] = 0.0
    values = {theirs: given.get(ours) for ours, theirs in SAMPLING.items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
