"""Counts what an adapter has: parameters, modules and bytes, beside those of its base."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer

from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.adapter.own_weights import OwnWeights
from loratune.model.adapter.targets import Targets, attached_layers
from loratune.model.architecture.structure import causal_model
from loratune.model.weights.held import held_bytes, value_count
from loratune.protocols import AdaptedModel

TRAINED_BYTES = 4
"""Of a trained value, which is float32 from the first step on."""


@dataclass(frozen=True)
class GroupCounts:
    """What is trained on the modules of one role."""

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
    """Target name → number of adapted or trained modules with that name."""
    groups: dict[str, GroupCounts]
    """Role of modules → what the adapter has on them."""
    left_out: tuple[str, ...]
    """Linear modules that are not adapted, with the reason."""
    base_bytes: int
    adapter_bytes: int


def summarise_adapter(model: AdaptedModel, trained: Targets | OwnWeights) -> AdapterSummary:
    """Count parameters, modules and bytes of base and adapter.

    Args:
        model: a PEFT model.
        trained: what its adapter was attached to, or the weights of the base that it trains.
    """
    trainable, _ = model.get_nb_trainable_parameters()
    counts, groups = _in_place(model, trained) if isinstance(trained, OwnWeights) else _attached(model, trained)
    weights = [weight for weight in model.parameters() if not weight.requires_grad]
    # Copies of the base's own values stand for those that are trained in their place.
    weights += {id(value): value for value in own_parameters(model).values(BASE).values()}.values()
    return AdapterSummary(
        trainable_parameters=trainable,
        total_parameters=sum(value_count(p) for p in model.parameters()),
        modules=dict(Counter(name.rpartition(".")[2] for name in counts)),
        groups=groups,
        left_out=() if isinstance(trained, OwnWeights) else trained.left_out,
        base_bytes=sum(map(held_bytes, weights)),
        adapter_bytes=sum(TRAINED_BYTES * weight.numel() for weight in model.parameters() if weight.requires_grad),
    )


def _attached(model: AdaptedModel, targets: Targets) -> tuple[dict[str, int], dict[str, GroupCounts]]:
    """Return module → number of its adapter's values, and role → counts."""
    counts = {name: _own_parameters(layer) for name, layer in attached_layers(model)}
    return counts, {
        role.value: GroupCounts(len(names), sum(counts[name] for name in names))
        for role in dict.fromkeys(targets.roles.values())
        if (names := [name for name in counts if targets.roles.get(name) is role])
    }


def _in_place(model: AdaptedModel, weights: OwnWeights) -> tuple[dict[str, int], dict[str, GroupCounts]]:
    """Return the same for trained weights of the base; tied ones count once."""
    named = dict(causal_model(model).named_parameters())
    counts = defaultdict[str, int](int)
    for name in weights.names & named.keys():
        counts[name.rpartition(".")[0]] += named[name].numel()
    modules = {
        role: [module for module in dict.fromkeys(name.rpartition(".")[0] for name in names) if module in counts]
        for role, names in weights.groups.items()
    }
    groups = {
        role: GroupCounts(len(found), sum(counts[module] for module in found))
        for role, found in modules.items()
        if found
    }
    return dict(counts), groups


def _own_parameters(layer: LoraLayer) -> int:
    return sum(p.numel() for name in layer.adapter_layer_names for p in getattr(layer, name).parameters())
