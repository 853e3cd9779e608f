"""One export: its options, file names, and the commands that follow it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune.choices import ExportFormat, GgufType
from loratune.commands import Command, free_place, loratune
from loratune.runs.opening import AdapterSource

OLLAMA_NAME_LENGTH, HUB_NAME_LENGTH = 80, 90


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how."""

    format: ExportFormat
    quantization: GgufType = "f16"
    """Of a GGUF file."""
    num_ctx: int | None = None
    """Ollama's context length in tokens; None for Ollama's default."""
    model: str | None = None
    """A merged model instead of an adapter; with an adapter, the location of its base."""
    force: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Export:
    """An export in progress."""

    source: AdapterSource | None
    output: Path
    """The final folder."""
    folder: Path
    """The temporary folder that it is built in."""
    options: ExportOptions

    @property
    def name(self) -> str:
        """Base name of its files: that of the run or the merged model."""
        path = Path(self.options.model or "") if self.source is None else self.source.run or self.source.adapter
        return re.sub(r"[^\w.-]+", "-", path.absolute().name).strip("-.") or "model"

    @property
    def ollama_name(self) -> str:
        return re.sub(r"[^a-z0-9._-]+", "-", self.name.lower()).strip("-.")[:OLLAMA_NAME_LENGTH] or "model"

    @property
    def hub_name(self) -> str:
        plain = re.sub(r"[^A-Za-z0-9_.]+", "-", self.name)
        return re.sub(r"\.{2,}", ".", plain).removesuffix(".git").strip("-.")[:HUB_NAME_LENGTH].rstrip("-.") or "model"

    @property
    def gguf_name(self) -> str:
        return f"{self.name}-{self.options.quantization}.gguf"

    def command(self, purpose: str, output: Path, **others: Any) -> Command:
        """Return the command of this export with other options.

        Args:
            purpose: see `Command`.
            output: output folder of the other export.
            others: fields of ExportOptions, and `push`.
        """
        push = others.pop("push", None)
        options = replace(self.options, **{"overwrite": False, "num_ctx": None, **others})
        is_gguf = options.format in ("gguf", "ollama")
        flags = {
            "--adapter": self.source.place if self.source else None,
            "--base-model" if self.source else "--model": options.model,
            "--format": options.format,
            "--quantization": options.quantization if is_gguf and options.quantization != "f16" else None,
            "--num-ctx": options.num_ctx if options.format == "ollama" else None,
            "--push": push,
            "--overwrite": options.overwrite,
            "--force": options.force,
            "--output": output,
        }
        return loratune(purpose, "export", flags, {"ORG": "your name on the hub"} if push else None)

    def place_beside(self, ending: str) -> Path:
        """Return a free folder name for an export suggested instead of this one."""
        return free_place(self.output, f"-{ending}")
