"""Recognises the tool of a config by the names in it."""

from __future__ import annotations

from loratune.errors import Exit, LoratuneError
from loratune.migration.config_file import Config
from loratune.migration.tool import Tool
from loratune.migration.tools.axolotl import AXOLOTL
from loratune.migration.tools.llamafactory import LLAMA_FACTORY
from loratune.migration.tools.swift import SWIFT
from loratune.migration.tools.trl import TRL
from loratune.migration.tools.unsloth import UNSLOTH

TOOLS = {"llama-factory": LLAMA_FACTORY, "ms-swift": SWIFT, "axolotl": AXOLOTL, "unsloth": UNSLOTH, "trl": TRL}
"""Name for --tool → tool."""


def recognised(config: Config) -> Tool:
    """Return the tool whose own names a config has most of.

    Raises:
        LoratuneError: it has none of them, or is a recipe of loratune.
    """
    if config.program:
        return next(tool for tool in TOOLS.values() if config.program in tool.programs)
    if all(isinstance(config.values.get(section), dict) for section in ("model", "data")) and (
        "base" in config.values["model"]
    ):
        raise LoratuneError(f"{config.path}: a recipe of loratune already; train it with sft --config", Exit.USAGE)
    own = {name: tool.marks & config.values.keys() for name, tool in TOOLS.items()}
    best = max(own, key=lambda name: len(own[name]))
    if not own[best]:
        raise LoratuneError(
            f"{config.path}: its names are those of none of these tools: {', '.join(TOOLS)}; if it is of one "
            f"of them, give --tool ({', '.join(sorted(config.values)[:8])}, …)",
            Exit.USAGE,
        )
    return TOOLS[best]
