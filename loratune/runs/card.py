"""Writes model cards of adapters and merged models, without local paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loratune import __version__
from loratune.plain_files import read_plain_text
from loratune.recipe.sections import PromptSettings
from loratune.runs.record import RunRecord

CARD = """\
---
library_name: peft
pipeline_tag: text-generation
tags:
{tag}- loratune
{base_line}---

# {name}

{kind} for **{base}**, {made} with loratune {version}.

| setting | value |
|---|---|
{rows}

Load it with `peft.PeftModel.from_pretrained(base_model, this_folder)`{advice}.
"""
MERGED_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- merge
- loratune
{base_line}---

# {name}

**{base}** with {change} by loratune {version}; `verification.json` says how the result
was compared with base + adapter. It loads as any model of its base's architecture does.
"""
CARD_NAME = "README.md"
LORA = "LoRA adapter"
TAG = "- loratune"
"""Line of every card."""
CARD_BYTES = 1_000_000
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def hub_id(base: str, folder: str | None = None) -> str | None:
    """Return a base's name on its hub; None for a local folder.

    Args:
        base: its name in a recipe or an adapter's config.
        folder: its folder in training: `models/qwen` was a local folder if this ends with it.
    """
    was_local = folder is not None and Path(folder).parts[-2:] == Path(base).parts
    return base if HUB_ID.fullmatch(base) and not was_local and not Path(base).exists() else None


def base_name(base: str, folder: str | None = None) -> str:
    """Return a public name of a base: its hub id, or the last part of its path."""
    return hub_id(base, folder) or re.split(r"[/\\]", base.rstrip("/\\"))[-1]


def has_card(folder: Path) -> bool:
    """Return whether a folder has a model card of loratune."""
    try:
        return TAG in read_plain_text(folder / CARD_NAME, CARD_BYTES).splitlines()
    except (OSError, ValueError):
        return False


def write_card(folder: Path, record: RunRecord, base_folder: str | None = None, model_class: str | None = None) -> None:
    """Write README.md with the metadata that model hubs read.

    Args:
        folder: the adapter's folder.
        record: record of its run.
        base_folder: folder of the base in training.
        model_class: transformers' class whose modules the adapter names, if the base has several.
    """
    is_lora, targets = record.method == "lora", record.lora.target_modules
    quantization = record.model.quantization
    prompt = record.prompt
    of_lora = {
        "rank, alpha, dropout": f"{record.lora.rank}, {record.lora.alpha:g}, {record.lora.dropout:g}",
        "targets": targets if isinstance(targets, str) else ", ".join(targets),
    }
    rows = {
        **(of_lora if is_lora else {}),
        "base weights in training": record.model.dtype if quantization == "none" else quantization,
        "prompt template": prompt.template + "".join(f", {name}={value}" for name, value in _arguments(prompt).items()),
        **record.training,
    }
    needed = ["the template above"]
    # The texts are private, but users of the adapter have to know that they exist.
    needed += ["the system prompt of the training"] if prompt.system else []
    needed += ["its instruction prefix"] if prompt.instruction_prefix else []
    advice = f"{_on(model_class)}; the prompt must be made with {' and '.join(needed)}"
    made = (LORA if is_lora else "Trained weights", "trained")
    _write(folder, record.name, (record.model.base, base_folder), made, rows, advice)


def _arguments(prompt: PromptSettings) -> dict[str, Any]:
    """Return the arguments of the tokenizer's own template; loratune's templates take none."""
    return prompt.template_arguments if prompt.template == "chat" else {}


def write_plain_card(folder: Path, name: str, config: dict[str, Any], model_class: str | None = None) -> None:
    """Write README.md for an adapter without a run.

    Args:
        folder: the adapter's folder.
        name: title of the card.
        config: its adapter_config.json.
        model_class: see `write_card`.
    """
    targets = config.get("target_modules") or []
    rows = {
        "rank, alpha": f"{config.get('r')}, {config.get('lora_alpha')}",
        "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
    }
    _write(
        folder,
        name,
        (str(config.get("base_model_name_or_path") or "an unnamed base"), None),
        (LORA, "exported"),
        rows,
        _on(model_class),
    )


def _on(model_class: str | None) -> str:
    return f", where `base_model` is a `{model_class}`" if model_class else ""


def write_merged_card(folder: Path, name: str, base: str, base_folder: str | None, is_lora: bool = True) -> None:
    """Write README.md for a merged model.

    Args:
        folder: the model's folder.
        name: title of the card.
        base: name of the base.
        base_folder: folder of the base.
        is_lora: whether a LoRA adapter was merged; otherwise weights were replaced.
    """
    base_id = hub_id(base, base_folder)
    text = MERGED_CARD.format(
        name=name,
        base=base_name(base, base_folder),
        change="a LoRA adapter merged into its weights" if is_lora else "trained weights put in place of its own",
        base_line=f"base_model: {base_id}\nbase_model_relation: finetune\n" if base_id else "",
        version=__version__,
    )
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def _write(
    folder: Path, name: str, base: tuple[str, str | None], made: tuple[str, str], rows: dict[str, str], advice: str
) -> None:
    kind, how = made
    base_id = hub_id(*base)
    text = CARD.format(
        name=name,
        tag="- lora\n" if kind == LORA else "",
        kind=kind,
        base=base_name(*base),
        base_line=f"base_model: {base_id}\n" if base_id else "",
        made=how,
        version=__version__,
        rows="\n".join(f"| {setting} | {value} |" for setting, value in rows.items()),
        advice=advice,
    )
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
