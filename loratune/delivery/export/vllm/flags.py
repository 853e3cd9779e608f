"""Determines vLLM's flags for an adapter's chat template: parsers of tool calls and of reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune import console
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.export.vllm.reasoning import vllm_reasoning_parser
from loratune.delivery.export.vllm.tool_calls import vllm_tool_parser
from loratune.errors import LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.runs.opening import AdapterSource


@dataclass(frozen=True)
class Parsers:
    """vLLM's parser names; None if the template needs none, or none is known."""

    tools: str | None = None
    reasoning: str | None = None

    @property
    def flags(self) -> list[str]:
        tools = ["--enable-auto-tool-choice", "--tool-call-parser", self.tools] if self.tools else []
        return tools + (["--reasoning-parser", self.reasoning] if self.reasoning else [])


def find_parsers(folder: Path, base: str, source: AdapterSource) -> Parsers:
    """Determine the parsers for the served template; warn if one cannot be determined.

    Args:
        folder: the exported adapter.
        base: hub id or folder of the base, whose template is served if the adapter has none.
        source: the adapter.
    """
    place = next((place for place in (folder, Path(base)) if (place / "tokenizer_config.json").is_file()), None)
    if place is None:
        console.warn(
            f"the adapter has no chat template of its own, and {base} is not a folder here: whether vLLM's line needs "
            "--tool-call-parser or --reasoning-parser is not known; --base-model with the base's folder tells"
        )
        return Parsers()
    try:
        encoder = Encoder(load_tokenizer(place), source.prompt)
    except LoratuneError:
        if place == folder:
            raise
        return Parsers()  # a base without a chat template only completes text
    tools = vllm_tool_parser(encoder.call_form)
    if tools is None and encoder.offers_tools:
        console.warn(
            "the chat template offers tools, but the form of its calls is not recognised: to serve tool calls, add "
            "--enable-auto-tool-choice and the --tool-call-parser of this form to vLLM's line"
        )
    return Parsers(tools, vllm_reasoning_parser(encoder.tokenizer, encoder.template))
