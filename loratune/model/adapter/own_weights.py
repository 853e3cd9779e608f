"""Trains weights of the base itself, all (full) or some (freeze), and saves them as an adapter that replaces them.

The weights are trained in the base's own modules, without PEFT's layers. Their file is that of a PEFT adapter without
LoRA matrices, whose `modules_to_save` are the trained modules; so all that reads adapters reads them too.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.adapter.own_parameters import own_parameters
from loratune.model.adapter.patterns import NO_TARGETS
from loratune.model.adapter.targets import GROUPS, expression_problem, layer_of, layer_range, names_of
from loratune.model.adapter.tensors import PREFIX
from loratune.model.architecture.roles import is_within, module_roles
from loratune.model.architecture.structure import language_parts, layer_count
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.weights.tensor_files import TensorInfo, write_shards
from loratune.protocols import AdaptedModel, CausalModel
from loratune.recipe.sections import Recipe

REST = "norms and the rest"
SHOWN_NAMES = 40


@dataclass(frozen=True)
class OwnWeights:
    """Parameters of a base that are trained."""

    modules: tuple[str, ...]
    """Names of the outermost modules that are trained as a whole, which together have them."""
    groups: Mapping[str, tuple[str, ...]]
    """Role of modules, such as attention → names of their parameters."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the parameters."""
        return frozenset(name for names in self.groups.values() for name in names)


def resolve_weights(model: CausalModel, recipe: Recipe, held: Iterable[str]) -> OwnWeights:
    """Find the parameters that a recipe of method full or freeze trains.

    Args:
        model: a causal language model without an adapter.
        recipe: the recipe.
        held: names of the parameters that the base's files have values for.

    Raises:
        LoratuneError: lists modules that do not exist, and parameters that no file or adapter could hold.
    """
    inside = tuple(part.rstrip(".") for part in language_parts(model))
    named = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name in named if is_within(name, inside)]
    if recipe.method == "freeze":
        chosen = {id(named[name]) for name in _chosen(model, recipe, names)}
        names = [name for name in names if id(named[name]) in chosen]  # with those that are tied to them
    modules, problems = _whole_modules(names, named)
    shared = {id(named[name]) for name in held if name in named}
    problems += [f"{name}: the base's files have no values for it" for name in names if id(named[name]) not in shared]
    if problems:
        raise LoratuneError(
            f"method {recipe.method}: {counted(len(problems), 'weight')} cannot be trained and saved:\n"
            f"{bullet_list(problems, limit=5)}",
            Exit.USAGE,
        )
    roles, groups = module_roles(model), defaultdict[str, list[str]](list)
    for name in names:
        role = roles.get(name.rpartition(".")[0])
        groups[role.value if role else REST].append(name)
    return OwnWeights(modules, {role: tuple(found) for role, found in groups.items()})


def train_weights(model: CausalModel, weights: OwnWeights, base_name: str) -> AdaptedModel:
    """Make parameters of a base trainable, and keep a copy of their values for comparisons with the base.

    Args:
        model: the model that the weights were resolved for; all others of its parameters are frozen.
        weights: result of `resolve_weights`.
        base_name: the base's name for the adapter's config.
    """
    config = LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=NO_TARGETS)
    adapted: AdaptedModel = get_peft_model(model, config)
    config.base_model_name_or_path, config.modules_to_save = base_name, list(weights.modules)
    embedding, _ = vocabulary_of(weights.names)
    config.ensure_weight_tying = model.config.tie_word_embeddings and embedding in weights.names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights.names:
            parameter.requires_grad_(True)
    own_parameters(adapted).keep_trained("default")
    return adapted


def trains_weights(model: AdaptedModel) -> bool:
    """Return whether a model trains weights of its base, without LoRA matrices."""
    return all(config.target_modules == NO_TARGETS for config in model.peft_config.values())


def trained_weights(model: AdaptedModel) -> dict[str, Any]:
    """Return name → parameter of the base's weights that are trained without LoRA matrices; empty for an adapter."""
    return own_parameters(model).values("default") if trains_weights(model) else {}


@contextmanager
def in_base_dtype(model: AdaptedModel) -> Iterator[None]:
    """Round trained weights of the base to its dtype, as a merged model has them; float32 is restored afterwards."""
    base, kept = own_parameters(model).base_parameters(), list[tuple[Any, torch.Tensor]]()
    for name, weight in trained_weights(model).items():
        if weight.dtype != base[name].dtype:  # not of tied ones a second time
            kept.append((weight, weight.data))
            weight.data = weight.data.to(base[name].dtype)
    try:
        yield
    finally:
        for weight, values in kept:
            weight.data = values


def save_weights(model: AdaptedModel, folder: Path) -> None:
    """Write adapter_config.json and, tensor by tensor, adapter_model.safetensors."""
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    values = {f"{PREFIX}{name}": weight.detach() for name, weight in trained_weights(model).items()}
    infos = [TensorInfo(name, value.dtype, tuple(value.shape)) for name, value in sorted(values.items())]

    def piece(info: TensorInfo) -> Iterator[torch.Tensor]:
        yield values[info.name].contiguous().cpu()

    write_shards(folder, {WEIGHTS_FILE: infos}, piece)


def _chosen(model: CausalModel, recipe: Recipe, names: list[str]) -> list[str]:
    """Return the parameters of freeze.layers and freeze.modules.

    Raises:
        LoratuneError: a module does not exist, or not in these layers.
    """
    settings, count = recipe.freeze, layer_count(model.config)
    layers = None if settings.layers is None else layer_range(settings.layers, count, "freeze.layers")
    if not settings.modules:
        return [name for name in names if layers is not None and layer_of(name) in layers]

    def is_allowed(path: str) -> bool:
        return layers is None or layer_of(path) is None or layer_of(path) in layers

    allowed = list(filter(is_allowed, dict.fromkeys(path for name in names for path in _above(name))))
    roles, chosen, problems = module_roles(model), set[str](), list[str]()
    for given in settings.modules:
        # A module that holds layers is outside of them, but what is in it is not.
        is_group = given in GROUPS
        found = [path for path in allowed if roles.get(path) in GROUPS[given]] if is_group else names_of(given, allowed)
        chosen.update(found)
        if not found:
            there = list(dict.fromkeys(path.rpartition(".")[2] for path in allowed if not path[-1].isdigit()))
            unknown = f"{given}: no module is called so; there are {', '.join(there[:SHOWN_NAMES])}"
            problems.append(expression_problem(given) or unknown)
    if problems:
        where = f" in freeze.layers {settings.layers!r} or outside of layers" if settings.layers else ""
        raise LoratuneError(f"freeze.modules{where}:\n{bullet_list(problems)}", Exit.USAGE)
    return [name for name in names if is_allowed(name) and is_within(name, chosen)]


def _above(name: str) -> Iterator[str]:
    """Yield the paths of the modules that a parameter is in."""
    path = name.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def _whole_modules(names: list[str], named: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Return the outermost modules whose own parameters are among the names, and those that are trained in part."""
    trained, problems = set(names), list[str]()
    holders = sorted({name.rpartition(".")[0] for name in names}, key=lambda path: (path.count("."), path))
    whole: list[str] = []
    for path in holders:
        if is_within(path, whole):
            continue
        frozen = [name for name in named if name.startswith(f"{path}.") and name not in trained]
        problems += [f"{name} is not trained, but {path} around it is" for name in frozen]
        whole.append(path)
    return tuple(whole), problems
