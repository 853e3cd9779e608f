"""Resolves lora.target_modules to the matrices of a model, and compares them with those that PEFT has attached."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.architecture.roles import ADAPTED_BY_DEFAULT, Role, expert_stacks, module_roles
from loratune.model.architecture.structure import causal_model, layer_count
from loratune.protocols import AdaptedModel, CausalModel
from loratune.recipe.method_sections import EXPERTS, LAYERS, LoraSettings

GROUPS: Mapping[str, tuple[Role, ...]] = {
    "all-linear": ADAPTED_BY_DEFAULT,
    "attention": (Role.ATTENTION,),
    "mlp": (Role.MLP,),
    "shared-experts": (Role.SHARED_EXPERT,),
    "experts": (Role.EXPERTS,),
}
"""Names in lora.target_modules that mean the same for every architecture; other names are those of modules."""
NEVER = (Role.HEAD, Role.EMBEDDING, Role.ROUTER, Role.EXPERTS)
"""Roles that a module's own name does not select."""
PATTERN = re.compile(r"[^\w.]")
"""A target with such a character is a regular expression."""


@dataclass(frozen=True)
class Targets:
    """The matrices that an adapter changes."""

    roles: Mapping[str, Role]
    """Name of a linear module, or of a parameter with the matrices of experts → role."""
    left_out: tuple[str, ...] = ()
    """What is not adapted although it is linear, each with the reason."""
    is_transposed: bool = False
    """Whether the modules hold their matrices as [inputs, outputs]."""

    @property
    def modules(self) -> list[str]:
        return [name for name, role in self.roles.items() if role is not Role.EXPERTS]

    @property
    def parameters(self) -> list[str]:
        """Parameters with the matrices of experts."""
        return [name for name, role in self.roles.items() if role is Role.EXPERTS]


def resolve_targets(model: CausalModel, settings: LoraSettings) -> Targets:
    """Find the matrices that a recipe's lora section names.

    Args:
        model: a causal language model without an adapter.
        settings: the recipe's lora section.

    Raises:
        LoratuneError: lists the targets that match nothing, or that PEFT would replace by others; or DoRA's norms would
            be those of transposed matrices, which no merge has.
    """
    roles = module_roles(model)
    modules: dict[str, Any] = dict(model.named_modules())
    # A parameter in place of its module, which may have several.
    roles = {name: role for name, role in roles.items() if role is not Role.EXPERTS}
    roles |= dict.fromkeys(expert_stacks(model), Role.EXPERTS)
    replaced = _replaced_by_peft(model, roles)
    wanted, problems = dict[str, Role](), list[str]()
    for target in _as_list(settings.target_modules):
        found = _matches(target, roles)
        if not found:
            problems.append(_what_there_is(target, roles))
        elif target not in GROUPS and (lost := sorted({_last(name) for name in found} & replaced)):
            problems.append(f"{target}: {_replacement(model, lost)}")
        wanted |= {name: roles[name] for name in found if _last(name) not in replaced or roles[name] is Role.EXPERTS}
    if problems:
        raise LoratuneError(f"lora.target_modules:\n{bullet_list(problems)}", Exit.USAGE)
    kept = _in_layers(wanted, settings.layers, layer_count(model.config))
    if not kept:
        raise LoratuneError(
            f"lora.layers {settings.layers!r}: none of these layers has lora.target_modules "
            f"{', '.join(_as_list(settings.target_modules))}",
            Exit.USAGE,
        )
    in_order = {name: roles[name] for name in roles if name in kept}
    transposed = any(isinstance(modules.get(name), Conv1D) for name in in_order)
    if transposed and settings.use_dora:
        raise LoratuneError(
            f"lora.use_dora: {model.config.model_type} holds its matrices as [inputs, outputs], where DoRA cannot be "
            "merged; leave it out",
            Exit.USAGE,
        )
    return Targets(in_order, tuple(_left_out(settings, roles, replaced)), transposed)


def peft_targets(model: CausalModel, targets: Targets, layers: str | None) -> dict[str, Any]:
    """Return the arguments of LoraConfig: module names that are as short as PEFT's matching allows.

    Args:
        model: the model that the targets were resolved for.
        targets: its targets.
        layers: lora.layers of the recipe.
    """
    names = [name for name, _ in model.named_modules()]
    last = list(dict.fromkeys(map(_last, targets.modules)))
    chosen = None if layers is None else list(layer_range(layers, layer_count(model.config)))
    alike = [name for name in names if _last(name) in last]
    if set(_in_layers(alike, layers, layer_count(model.config))) != set(targets.modules):
        last, chosen = targets.modules, None  # the same name in another part of the model, or in another role
    stacks = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in targets.parameters))
    if {name for name in expert_stacks(model) if name.endswith(tuple(stacks))} != set(targets.parameters):
        stacks = targets.parameters
    return {
        "target_modules": last,
        "target_parameters": stacks or None,
        "layers_to_transform": chosen,
        "fan_in_fan_out": targets.is_transposed,
    }


def attached_layers(model: AdaptedModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield PEFT's layers, each with the name of the module or, of experts, of the parameter that it adapts."""
    for name, module in causal_model(model).named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", None)
            # The layers of two parameters of a module are nested.
            yield f"{name.replace('.base_layer', '')}.{parameter}" if parameter else name, module


def computes_stacks(model: AdaptedModel) -> bool:
    """Return whether an adapter changes parameters with the matrices of experts.

    PEFT computes their updated values in each pass, as copies of the same size.
    """
    return any(config.target_parameters for config in model.peft_config.values())


def check_attached(model: AdaptedModel, targets: Targets) -> None:
    """Compare the matrices that PEFT has put layers on with those that were asked for.

    Raises:
        LoratuneError: lists those that differ.
    """
    found = {name for name, _ in attached_layers(model)}
    asked = {*targets.roles}
    problems = [f"{name} was not asked for" for name in sorted(found - asked)]
    problems += [f"{name} has no adapter" for name in sorted(asked - found)]
    if problems:
        raise LoratuneError(
            f"{type(causal_model(model)).__name__}: the modules that PEFT adapts are not lora.target_modules:\n"
            f"{bullet_list(problems, limit=5)}\nname other ones, such as attention",
            Exit.MODEL,
        )


def _matches(target: str, roles: Mapping[str, Role]) -> list[str]:
    """Names of the modules, or of the experts' parameters, that a target names."""
    if target in GROUPS:
        return [name for name, role in roles.items() if role in GROUPS[target]]
    named = [name for name, role in roles.items() if role not in NEVER]
    return names_of(target, named)


def names_of(given: str, names: Iterable[str]) -> list[str]:
    """Return the names that end with a name, or that match a regular expression; none if it is not a valid one."""
    if not PATTERN.search(given):
        return [name for name in names if name == given or name.endswith(f".{given}")]
    return [] if expression_problem(given) else [name for name in names if re.fullmatch(given, name)]


def expression_problem(given: str) -> str | None:
    """Return why a text is not a regular expression; None if it is one, or needs not be."""
    try:
        re.compile(given if PATTERN.search(given) else "")
    except re.error as error:
        return f"{given!r} is not a regular expression: {error}"
    return None


def _what_there_is(target: str, roles: Mapping[str, Role]) -> str:
    if problem := expression_problem(target):
        return problem
    groups = ", ".join(group for group in GROUPS if _matches(group, roles))
    names = ", ".join(dict.fromkeys(_last(name) for name, role in roles.items() if role not in NEVER))
    if target in GROUPS:
        return f"the model has no {target}, or its class does not declare them; it has {groups}, with {names}"
    return f"no module is called {target}; the model has {names}, and the groups {groups}"


def _replaced_by_peft(model: CausalModel, roles: Mapping[str, Role]) -> set[str]:
    """Last names of modules that PEFT takes for those of experts, which were modules before transformers 5.

    An adapter on a shared expert or a dense MLP of that name would become one on all experts of every layer.
    """
    names = {_last(name) for name, role in roles.items() if role not in NEVER}
    conversions = get_model_conversion_mapping(model)
    return {name for name in names if _is_replaced(name, model, conversions)}


def _is_replaced(name: str, model: CausalModel, conversions: Any) -> bool:
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=conversions)
    except ValueError:  # the matrix is fused with another, which is no target here
        return True
    return name not in (config.target_modules or ())


def _replacement(model: CausalModel, names: Iterable[str]) -> str:
    return (
        f"with {type(model).__name__}, PEFT takes {', '.join(names)} for the matrices of all experts; use experts for "
        "these, or leave it out"
    )


def _left_out(settings: LoraSettings, roles: Mapping[str, Role], replaced: set[str]) -> Iterator[str]:
    """Yield what all-linear and the groups of MLPs leave out."""
    asked = _as_list(settings.target_modules)
    if {"all-linear", "mlp", "shared-experts"}.isdisjoint(asked):
        return
    lost = sorted({_last(n) for n, role in roles.items() if role in ADAPTED_BY_DEFAULT and _last(n) in replaced})
    if lost:
        yield f"{', '.join(lost)}, which PEFT takes for experts of this architecture"
    there = {*roles.values()}
    if Role.EXPERTS in there and EXPERTS not in asked:
        yield "routed experts (add experts to lora.target_modules)"
    if Role.ROUTER in there:
        yield "routers"
    if Role.GATE in there:
        yield "gates"


def _in_layers(names: Iterable[str], layers: str | None, count: int) -> list[str]:
    if layers is None:
        return list(names)
    chosen = layer_range(layers, count)
    return [name for name in names if (number := layer_of(name)) is not None and number in chosen]


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a module or parameter is in; None outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def layer_range(layers: str, count: int, setting: str = "lora.layers") -> range:
    """Return the layer numbers of `last 6`, `first 4` or `8-15`, counted from 0.

    Args:
        layers: value of the setting.
        count: number of the model's layers.
        setting: name of the setting, for the message.

    Raises:
        LoratuneError: the model has fewer layers.
    """
    match = LAYERS.fullmatch(layers)
    if match is None:
        raise RuntimeError(f"the recipe let layers {layers!r} through")
    if match["end"]:
        wanted = int(match["count"])
        chosen = range(count - wanted, count) if match["end"] == "last" else range(wanted)
    else:
        chosen = range(int(match["start"]), int(match["stop"]) + 1)
    if chosen.start < 0 or chosen.stop > count:
        there = f"{counted(count, 'layer')}, 0 to {count - 1}"
        raise LoratuneError(f"{setting} {layers!r}: the model has {there}", Exit.USAGE)
    return chosen


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
