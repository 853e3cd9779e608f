"""Writes an Ollama Modelfile: the chat template as a Go template (Ollama cannot read Jinja), stop tokens, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import console
from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import Message
from loratune.delivery.export.ollama.go_template import Render, derive_parts
from loratune.delivery.export.ollama.go_tools import derive_tools
from loratune.errors import Exit, LoratuneError
from loratune.model.files import GENERATION_CONFIG
from loratune.model.tokenizer import load_tokenizer
from loratune.plain_files import read_json_object
from loratune.recipe.sections import PromptSettings
from loratune.writing import write_text

# Name in generation_config.json → Ollama's name.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Modelfile:
    """A written Modelfile."""

    text: str
    lost_tools: str = ""
    """Why it does not support the tools of the model's own template; empty if it does."""


def write_modelfile(
    model: Path, gguf_name: str, folder: Path, num_ctx: int | None = None, settings: PromptSettings | None = None
) -> Modelfile:
    """Write `Modelfile` into a folder.

    Args:
        model: merged folder with the tokenizer and optionally generation_config.json.
        gguf_name: name of the GGUF file in the same folder as the Modelfile.
        folder: the folder to write into.
        num_ctx: context length in tokens; None for Ollama's default.
        settings: prompt settings of the training; the default is the tokenizer's template without thinking.

    Raises:
        LoratuneError: no Go template reproduces the tokenizer's template, or a text cannot be quoted in a Modelfile.
    """
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer, settings or PromptSettings()).at_a_day()
    if encoder.is_dated:
        console.warn(
            f"the chat template writes the date into prompts: Ollama's names {encoder.settings.date}, whatever the day"
        )
    parts = derive_parts(_renderer(encoder), tokenizer.decode([encoder.end_id]))
    lost, tools = "", None
    if encoder.offers_tools:
        try:
            tools = derive_tools(_renderer(encoder), parts, tokenizer.decode([encoder.end_id])).actions()
        except LoratuneError as error:
            lost = error.message
    generation = _read_generation_config(model)
    lines = [f"FROM ./{_plain(gguf_name)}", f"TEMPLATE {_quoted(parts.go_template(tools))}"]
    if parts.default_system:
        lines.append(f"SYSTEM {_quoted(parts.default_system)}")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _end_texts(encoder, generation)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(generation).items()]
    if num_ctx is not None:
        lines.append(f"PARAMETER num_ctx {num_ctx}")
    text = "\n".join(lines) + "\n"
    write_text(folder / "Modelfile", text)
    return Modelfile(text, lost)


def _renderer(encoder: Encoder) -> Render:
    """Return a function that renders prompts without BOS, which Ollama adds itself (`add_bos_token`)."""
    tokenizer = encoder.tokenizer

    def render(messages: list[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        ids = encoder.prompt_ids(messages, tools)
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
            del ids[0]
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    return render


def _quoted(text: str) -> str:
    """Quote a value for a Modelfile, which has no escapes.

    Raises:
        LoratuneError: the text contains the closing quotes.
    """
    if '"""' in text:
        raise LoratuneError(
            'a Modelfile cannot hold a text with """ in it; take it out of the system prompt', Exit.MODEL
        )
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _plain(name: str) -> str:
    """Return a file name unchanged, if a Modelfile accepts it unquoted."""
    if not name or any(character in name for character in '"\r\n/'):
        raise LoratuneError(f"{name!r} is no file name that a Modelfile can hold", Exit.USAGE)
    return name


def _read_generation_config(model: Path) -> dict[str, Any]:
    path = model / GENERATION_CONFIG
    return read_json_object(path) if path.exists() else {}


def _end_texts(encoder: Encoder, generation: dict[str, Any]) -> list[str]:
    """Return the texts of the tokens that end an answer, without duplicates."""
    others = generation.get("eos_token_id")
    ids = [encoder.end_id, *(others if isinstance(others, list) else [others])]
    tokens = encoder.tokenizer.convert_ids_to_tokens([place for place in ids if isinstance(place, int)])
    return list(dict.fromkeys(token for token in tokens if token))


def _sampling(generation: dict[str, Any]) -> dict[str, float]:
    """Return Ollama's parameters; greedy decoding is a temperature of 0."""
    # Ollama's default penalty used to be 1.1, which garbles memorised answers; other programs use none.
    given = {"repetition_penalty": 1.0, **generation}
    if given.get("do_sample") is False:
        given["temperature"] = 0.0
    values = {theirs: given.get(ours) for ours, theirs in SAMPLING.items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
