"""Determines a server's flags for an adapter's chat template: parsers of tool calls and of reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune import console
from loratune.choices import ServerName
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.export.servers.reasoning import vllm_reasoning_parser
from loratune.delivery.export.servers.tool_calls import vllm_tool_parser
from loratune.errors import LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.servers import SERVERS
from loratune.runs.opening import AdapterSource

SGLANG = {
    "hermes": "qwen25", "llama3_json": "llama3", "deepseek_r1": "deepseek-r1", "openai_gptoss": "gpt-oss",
}  # fmt: skip
"""SGLang's names of vLLM's parsers, where they differ."""
OFFERS = {"vllm": ["--enable-auto-tool-choice"], "sglang": list[str]()}
"""What switches tools on, beside a parser."""


@dataclass(frozen=True)
class Parsers:
    """A server's parser names; None if the template needs none, or none is known."""

    tools: str | None = None
    reasoning: str | None = None
    server: ServerName = "vllm"

    @property
    def flags(self) -> list[str]:
        tools = [*OFFERS[self.server], "--tool-call-parser", self.tools] if self.tools else []
        return tools + (["--reasoning-parser", self.reasoning] if self.reasoning else [])


def find_parsers(folder: Path, base: str, source: AdapterSource, server: ServerName = "vllm") -> Parsers:
    """Determine the parsers for the served template; warn if one cannot be determined.

    Args:
        folder: the exported adapter.
        base: hub id or folder of the base, whose template is served if the adapter has none.
        source: the adapter.
        server: whose names of parsers.
    """
    title = SERVERS[server].title
    place = next((place for place in (folder, Path(base)) if (place / "tokenizer_config.json").is_file()), None)
    if place is None:
        console.warn(
            f"the adapter has no chat template of its own, and {base} is not a folder here: whether {title}'s line "
            "needs --tool-call-parser or --reasoning-parser is not known; --base-model with the base's folder tells"
        )
        return Parsers(server=server)
    try:
        encoder = Encoder(load_tokenizer(place), source.prompt)
    except LoratuneError:
        if place == folder:
            raise
        return Parsers(server=server)  # a base without a chat template only completes text
    tools = vllm_tool_parser(encoder.call_form)
    if tools is None and encoder.offers_tools:
        console.warn(
            "the chat template offers tools, but the form of its calls is not recognised: to serve tool calls, add "
            f"{' and '.join([*OFFERS[server], 'the --tool-call-parser of this form'])} to {title}'s line"
        )
    reasoning = vllm_reasoning_parser(encoder.tokenizer, encoder.template, encoder.reasoning_form)
    if reasoning is None and not encoder.reasoning_form.is_of_rows:
        console.warn(
            f"the chat template writes reasoning after {encoder.reasoning_form.opening!r}, and no parser of that form "
            f"is known: to serve reasoning apart from answers, add a --reasoning-parser to {title}'s line"
        )
    if server == "sglang":
        tools, reasoning = (SGLANG.get(name, name) if name else None for name in (tools, reasoning))
    return Parsers(tools, reasoning, server)
