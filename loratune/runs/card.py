"""The adapter's model card: what it was trained from and with, without local paths."""

from __future__ import annotations

from pathlib import Path

from loratune import __version__
from loratune.recipe.sections import Recipe

CARD = """\
---
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- loratune
{base_line}---

# {name}

LoRA adapter for **{base}**, trained with loratune {version}.

| setting | value |
|---|---|
| rank, alpha, dropout | {recipe.lora.rank}, {recipe.lora.alpha:g}, {recipe.lora.dropout:g} |
| targets | {targets} |
| base weights in training | {held} |
| prompt template | {recipe.prompt.template}{thinking} |
| learning rate, schedule | {recipe.training.learning_rate:g}, {recipe.training.scheduler} |
| rows per device and step | {recipe.training.batch_size} × {recipe.training.gradient_accumulation} |
| longest row | {recipe.training.max_length} tokens |
| data | {data} |

Load it with `peft.PeftModel.from_pretrained(base_model, this_folder)`; the prompt must be made with the template above.
"""


def write_card(folder: Path, recipe: Recipe) -> None:
    """Write README.md with metadata that the model hubs read."""
    is_local = Path(recipe.model.base).expanduser().exists() or "/" not in recipe.model.base
    base = Path(recipe.model.base).name if is_local else recipe.model.base
    targets = recipe.lora.targets
    quantization = recipe.model.quantization
    text = CARD.format(
        recipe=recipe,
        name=Path(recipe.output).name,
        base=base,
        base_line="" if is_local else f"base_model: {base}\n",
        version=__version__,
        targets=targets if isinstance(targets, str) else ", ".join(targets),
        held=recipe.model.dtype if quantization == "none" else quantization,
        thinking=", thinking" if recipe.prompt.thinking else "",
        data=", ".join(Path(name).name for name in recipe.data.train),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
