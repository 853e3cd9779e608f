"""The request to answer a file of rows, and all inputs that determine the answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from loratune.data.encoding.encoder import Encoder
from loratune.data.template.facts import template_facts
from loratune.engine.sampling import Sampling
from loratune.generation.batch.answer_header import About
from loratune.generation.batch.questions import AskedRow, QuestionFile
from loratune.model.files import GENERATION_CONFIG, find_base, weight_files
from loratune.recipe.sections import TEMPLATE_ARGUMENTS, ModelSettings, PromptSettings
from loratune.runs.fingerprint import fingerprint_base
from loratune.runs.folder import file_sha256
from loratune.runs.lineage import DIGESTED, adapter_digest
from loratune.runs.opening import AdapterSource, base_settings, merged_prompt
from loratune.runs.tokenizer_files import CHAT_TEMPLATE, NAMED_TEMPLATES, TOKENIZER_CONFIG, tokenizer_sha256

SETTINGS_FILES = (TOKENIZER_CONFIG, CHAT_TEMPLATE, GENERATION_CONFIG)
"""Files of a base that its fingerprint does not cover; they determine prompts and sampling."""


@dataclass(frozen=True)
class RowsRequest:
    """A file of rows, the model to answer them, and the settings."""

    input: str
    output: Path
    adapter: tuple[str, Path] | None
    model: str | None
    no_adapter: bool
    """Use the base without the adapter; with metrics: compare the two."""
    metrics: bool
    system: str | None
    sampling: Sampling
    overwrite: bool
    force: bool

    @property
    def compares(self) -> bool:
        """Whether both the adapter and the base answer."""
        return self.no_adapter and self.metrics

    def is_answered_by(self, report: dict[str, Any]) -> bool:
        """Return whether a complete file has everything that this request asks for.

        Args:
            report: the report stored with its answers.
        """
        return bool(report.get("metrics") or not self.metrics) and bool(report.get("compares") or not self.compares)


def everything_asked(request: RowsRequest, source: AdapterSource | None, file: QuestionFile) -> About:
    """Everything that the answers depend on."""
    settings, folder, tokenizer, prompt = _asked(request, source)
    facts = template_facts(prompt, tokenizer_sha256(tokenizer), lambda: encoder_of(request, source))
    about = {
        "rows": file.sha256,
        "questions": _hash_of_questions(file.rows),
        "model": _model_hash(settings, folder),
        "adapter": _adapter_hash(source.adapter) if source else None,
        "adapter left off": request.no_adapter and not request.compares,
        "prompt": prompt.model_dump(exclude={"date", "generation_prompt", *TEMPLATE_ARGUMENTS})
        | prompt.template_arguments,
        **({"date": date.today().isoformat()} if facts.is_dated else {}),
        "system": request.system,
        **request.sampling.model_dump(),
    }
    as_written: About = json.loads(json.dumps(about))
    return as_written


class _Asked(NamedTuple):
    """A base: how and from where it is loaded, and how prompts are rendered."""

    settings: ModelSettings
    folder: Path
    tokenizer: Path
    """Its folder."""
    prompt: PromptSettings


def _asked(request: RowsRequest, source: AdapterSource | None) -> _Asked:
    settings = base_settings(source, request.model) if source else ModelSettings(base=request.model or "")
    folder = find_base(settings)
    prompt = source.prompt if source else merged_prompt(folder)
    return _Asked(settings, folder, source.tokenizer_folder(folder) if source else folder, prompt)


def encoder_of(request: RowsRequest, source: AdapterSource | None) -> Encoder:
    """Return the encoder for the rows' prompts."""
    from loratune.model.tokenizer import load_tokenizer

    asked = _asked(request, source)
    return Encoder(load_tokenizer(asked.tokenizer), asked.prompt)


def _hash_of_questions(rows: list[AskedRow]) -> str:
    """Hash the prompts, which also depend on the adapter's recipe."""
    asked = json.dumps([[row.messages, row.tools] if row.tools else row.messages for row in rows], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()


def _model_hash(settings: ModelSettings, folder: Path) -> str:
    known: dict[str, Any] = fingerprint_base(folder, weight_files(folder)) | {"settings": settings.quantization}
    for name in SETTINGS_FILES:
        known[name] = (folder / name).read_text("utf-8") if (folder / name).is_file() else None
    for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja")):
        known[f"{NAMED_TEMPLATES}/{path.name}"] = path.read_text("utf-8")
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _adapter_hash(folder: Path) -> str:
    paths = (path for path in folder.rglob("*") if path.suffix in DIGESTED and path.is_file())
    return adapter_digest({path.relative_to(folder).as_posix(): file_sha256(path) for path in paths})
