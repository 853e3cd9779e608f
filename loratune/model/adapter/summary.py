"""Counts what an adapter has: parameters, modules and bytes, beside those of its base."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer

from loratune.model.adapter.targets import Targets, attached_layers
from loratune.model.weights.held import held_bytes, value_count
from loratune.protocols import AdaptedModel


@dataclass(frozen=True)
class GroupCounts:
    """What an adapter has on the modules of one role."""

    modules: int
    """Number of matrices, or of parameters with the matrices of all experts of a layer."""
    parameters: int


@dataclass(frozen=True)
class AdapterSummary:
    """Numbers of parameters and bytes of base and adapter."""

    trainable_parameters: int
    total_parameters: int
    """Of base and adapter; a quantised weight counts with its shape before quantisation."""
    modules: dict[str, int]
    """Target name → number of adapted modules with that name."""
    groups: dict[str, GroupCounts]
    """Role of modules → what the adapter has on them."""
    left_out: tuple[str, ...]
    """Linear modules that are not adapted, with the reason."""
    base_bytes: int
    adapter_bytes: int


def summarise_adapter(model: AdaptedModel, targets: Targets) -> AdapterSummary:
    """Count parameters, modules and bytes of base and adapter.

    Args:
        model: a PEFT model.
        targets: that its adapter was attached to.
    """
    trainable, _ = model.get_nb_trainable_parameters()
    total = sum(value_count(p) for p in model.parameters())
    adapter_bytes = sum(held_bytes(p) for p in model.parameters() if p.requires_grad)
    all_bytes = sum(held_bytes(p) for p in model.parameters())
    counts = {name: _own_parameters(layer) for name, layer in attached_layers(model)}
    modules = Counter(name.rpartition(".")[2] for name in counts)
    groups = {
        role.value: GroupCounts(len(names), sum(counts[name] for name in names))
        for role in dict.fromkeys(targets.roles.values())
        if (names := [name for name in counts if targets.roles.get(name) is role])
    }
    return AdapterSummary(
        trainable, total, dict(modules), groups, targets.left_out, all_bytes - adapter_bytes, adapter_bytes
    )


def _own_parameters(layer: LoraLayer) -> int:
    return sum(p.numel() for name in layer.adapter_layer_names for p in getattr(layer, name).parameters())
