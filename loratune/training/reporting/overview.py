"""Prints the tables at the start of `loratune sft`."""

from __future__ import annotations

from pathlib import Path

from loratune import console
from loratune.data.preparation import PreparedData
from loratune.errors import counted
from loratune.model.adapter.summary import AdapterSummary
from loratune.model.architecture.roles import Role
from loratune.recipe.loading import shipped_rows
from loratune.recipe.sections import Recipe
from loratune.runs.model_check import summary as check_summary
from loratune.runs.report import QuantizationEffect
from loratune.training.activations import PassPlan
from loratune.training.probes.checked_model import CheckedModel
from loratune.training.quantization_effect import BaseWeights


def show_data(recipe: Recipe, data: PreparedData) -> None:
    """Print the rows of the run."""
    splits = [("training", data.train), ("validation", data.validation)]
    rows = [
        (
            name,
            f"{counted(len(split), 'row')}, {split.tokens} tokens ({split.trained_tokens / split.tokens:.0%} trained), "
            f"longest {split.longest}",
        )
        for name, split in splits
        if split is not None
    ]
    files = ", ".join(
        f"{shipped_rows(use.path) or Path(use.path).name} ({use.rows} {use.format}"
        f"{', shipped with loratune' if shipped_rows(use.path) else ''})"
        for use in data.files
    )
    console.table([("files", files), *rows, ("template", recipe.prompt.template)], title="data")


def show_model(
    recipe: Recipe, summary: AdapterSummary, dtype: str, checked: CheckedModel, passes: PassPlan, weights: BaseWeights
) -> None:
    """Print model, adapter, what was measured on them, and the memory of a step."""
    held = dtype if recipe.model.quantization == "none" else recipe.model.quantization
    groups = ", ".join(f"{name} {console.memory(size)}" for name, size in weights.groups.items())
    quantised = [("quantised", _effect_text(weights.effect))] if weights.effect else []
    part = f"{console.memory(weights.own_bytes)} in each of {weights.shares} processes"
    sharded = [("sharding", part)] if weights.shares > 1 else []
    share = summary.trainable_parameters / summary.total_parameters
    console.table(
        [
            ("base", f"{recipe.model.base}, {held}, {console.memory(summary.base_bytes)}"),
            ("weights", groups),
            *sharded,
            *quantised,
            _method(recipe, summary),
            ("trains", f"{summary.trainable_parameters:,} of {summary.total_parameters:,} parameters ({share:.2%})"),
            *_groups(summary),
            ("attention", str(checked.attention)),
            ("checked", check_summary(checked.checks)),
            ("a step", str(passes)),
        ],
        title="model",
    )


def _method(recipe: Recipe, summary: AdapterSummary) -> tuple[str, str]:
    size = console.memory(summary.adapter_bytes)
    if recipe.trains_base:
        return "method", f"{recipe.method}: weights of the base in float32, {size}, beside the base"
    return "adapter", f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, {size}"


def _effect_text(effect: QuantizationEffect) -> str:
    same = f"{effect.top1_agreement:.0%} of {counted(effect.tokens, 'likeliest token')} the same"
    return f"{effect.mean_kl:.2g} nats from 16 bits (mean KL), {same}"


def _groups(summary: AdapterSummary) -> list[tuple[str, str]]:
    """Return a row per group of adapted modules, and one of what is left out."""
    rows = []
    for name, group in summary.groups.items():
        share = group.parameters / summary.trainable_parameters
        kind = "stack" if name == Role.EXPERTS.value else "module"
        rows.append((f"on {name}", f"{counted(group.modules, kind)}, {group.parameters:,} parameters ({share:.0%})"))
    return [*rows, ("left out", "; ".join(summary.left_out))] if summary.left_out else rows
