"""A recipe's model as it would be trained, without weights: adapter, kernels, attention and loss are the run's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.data.assembly.batches import collate_packed, collate_padded
from loratune.errors import Exit, LoratuneError, reason_of
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.adapter.own_weights import resolve_weights, train_weights
from loratune.model.adapter.summary import TRAINED_BYTES
from loratune.model.adapter.targets import resolve_targets
from loratune.model.architecture.head import head_by_identity
from loratune.model.architecture.structure import causal_model
from loratune.model.base import is_to_be_sharded
from loratune.model.config import load_config
from loratune.model.hardware import Hardware
from loratune.model.kernels.attention_choice import choose_attention
from loratune.model.kernels.linear_cross_entropy import add_labelled_loss
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.norm_mlp import use_fused_elementwise
from loratune.model.kernels.packed_rows import PackedRows
from loratune.model.kernels.recurrent_layers import call_modules_in_training
from loratune.model.outline import fill, outline
from loratune.model.shapes_only import ShapesOnly
from loratune.model.sharding.sharded_base import require_apart_from_vocabulary, require_shardable
from loratune.model.sharding.units import shares_of
from loratune.model.weights.held import bytes_by_group, converted_bytes, held_bytes
from loratune.protocols import AdaptedModel, CausalModel
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sections import Recipe
from loratune.training.arguments import autocast_type
from loratune.training.memory.trace import Batch, Setting, trace
from loratune.training.probes.passes import as_rows

TRIED = (9, 5)
"""Tokens of the rows with which packing is tried."""


@dataclass(frozen=True)
class PlannedModel:
    """A model without weights, and the bytes of what stays in memory with it."""

    model: AdaptedModel
    is_packed: bool
    is_masked: bool
    """Whether the attention of packed rows gets a mask of the whole row."""
    weights: dict[str, int]
    """Group of the base's weights → bytes in this process, largest first."""
    file_bytes: int
    """Of the base's files that are mapped while it loads, and are not the weights themselves then."""
    gathered_bytes: int
    """Of whole layers that a sharded base has at a time."""
    trained_values: int
    autocast: torch.dtype | None
    """See `Setting`."""
    on_gpu: bool

    @property
    def adapter_bytes(self) -> int:
        """Of what is trained, in float32."""
        return TRAINED_BYTES * self.trained_values

    def batch(self, lengths: list[int], trained: float) -> Batch:
        """Return a pass of rows of these lengths, of which a share of the tokens has labels."""
        rows = as_rows([[0] * length for length in lengths])
        for row in rows:
            start = round(len(row["labels"]) * (1 - trained))
            row["labels"][:start] = [-100] * start
        batch = collate_packed(rows) if self.is_packed else collate_padded(rows, 0)
        del batch["about"]
        return batch

    def setting(self, is_recomputed: bool, is_repeated: bool) -> Setting:
        """Return how its passes are computed."""
        return Setting(is_recomputed, self.autocast, is_repeated, self.on_gpu)


def planned_model(recipe: Recipe, folder: Path, hardware: Hardware) -> PlannedModel:
    """Make a recipe's model without weights.

    Args:
        recipe: the recipe.
        folder: with the base's config.json.
        hardware: that it is to be trained on; it need not be there.

    Raises:
        LoratuneError: as loading and attaching raise it.
    """
    is_sharded = is_to_be_sharded(recipe.model, hardware)
    if is_sharded:
        require_shardable(recipe.model, recipe.lora)
    base = outline(recipe.model, folder, hardware)
    dtype = base.dtype
    shares = shares_of(base, hardware.processes) if is_sharded else None
    weights = bytes_by_group(base, shares.own_bytes if shares else held_bytes)
    files = 0 if shares else converted_bytes(base, getattr(load_config(folder), "dtype", None) or torch.bfloat16)
    adapted = _made_trainable(base, recipe, is_sharded)
    copies = {id(value): value for value in own_parameters(adapted).values(BASE).values()}.values()
    if copies:
        weights["copy of what is trained"] = sum(map(held_bytes, copies))
        weights = _without_trained(weights, adapted)
    fill(causal_model(adapted))
    use_fused_lora(adapted)
    use_fused_elementwise(base)
    call_modules_in_training(base)
    with ShapesOnly():
        add_labelled_loss(base, head_by_identity)
    is_packed, is_masked = _packing(adapted, hardware, recipe)
    return PlannedModel(
        adapted,
        is_packed,
        is_masked,
        weights,
        files,
        shares.gathered_bytes if shares else 0,
        sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad),
        autocast_type(recipe, dtype, hardware),
        hardware.is_gpu,
    )


def _made_trainable(base: CausalModel, recipe: Recipe, is_sharded: bool) -> AdaptedModel:
    name = recipe.model.base
    if recipe.trains_base:
        held = dict(base.named_parameters(remove_duplicate=False))
        return train_weights(base, resolve_weights(base, recipe, held), name)
    targets = resolve_targets(base, recipe.lora)
    if is_sharded:
        require_apart_from_vocabulary(targets.roles)
    return attach_adapter(base, _of_any_start(recipe.lora), name, recipe.seed, targets)


def _of_any_start(lora: LoraSettings) -> LoraSettings:
    """Return settings whose matrices have the same shapes, and need no values of the base."""
    if not lora.starts_from_base:
        return lora
    ranks = {name: 2 * rank for name, rank in lora.rank_pattern.items()}
    return lora.model_copy(update={"init": "default", "rank": 2 * lora.rank, "rank_pattern": ranks})


def _without_trained(weights: dict[str, int], model: AdaptedModel) -> dict[str, int]:
    """Leave out what is trained itself, which counts with the adapter."""
    trained = sum(held_bytes(weight) for weight in model.parameters() if weight.requires_grad)
    left = dict(weights)
    for name in sorted(left, key=lambda name: -left[name]):
        if name != "copy of what is trained":
            taken = min(left[name], trained)
            left[name], trained = left[name] - taken, trained - taken
    return {name: size for name, size in left.items() if size}


def _packing(model: AdaptedModel, hardware: Hardware, recipe: Recipe) -> tuple[bool, bool]:
    """Have a model compute packed rows as it would be found to; return whether it does, and whether with a mask.

    Whether documents are apart is a matter of values, which are not there; whether they can be computed is not.
    """
    causal: Any = causal_model(model)
    own = str(causal.config._attn_implementation)
    asked = recipe.model.attn_implementation
    choose_attention(causal, hardware, asked, recipe.training.packing, is_tried=False)
    rows = as_rows([[0] * length for length in TRIED])
    for is_masked in (False, True) if recipe.training.packing else ():
        if is_masked:
            causal.set_attn_implementation(own)
        documents = PackedRows(causal, is_masked=is_masked)
        if not _failure(model, collate_packed(rows)):
            return True, is_masked
        documents.remove()
    if failure := _failure(model, collate_padded(rows, 0)):
        raise LoratuneError(
            f"{type(causal).__name__} cannot be run without values, so its memory cannot be predicted: "
            f"{type(failure).__name__}: {reason_of(failure)}",
            Exit.MODEL,
        )
    return False, False


def _failure(model: AdaptedModel, batch: Batch) -> Exception | None:
    del batch["about"]
    try:
        trace(model, batch, Setting())
    except Exception as error:  # an attention may raise anything that it cannot do
        return error
    return None
