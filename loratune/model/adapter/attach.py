"""Attaches a LoRA adapter to a base through PEFT; checks, saves and loads it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from loratune.errors import Exit, LoratuneError, counted, refusal, together
from loratune.model.adapter.completeness import Shapes, require_complete, tensor_shapes
from loratune.model.adapter.files import WEIGHTS_FILE, read_config_values
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.own_parameters import own_parameters
from loratune.model.adapter.own_weights import save_weights, trained_weights, trains_weights
from loratune.model.adapter.patterns import settle_patterns, unmatched_stacks
from loratune.model.adapter.placing import put_adapter
from loratune.model.adapter.reading import AdapterReader, first_lines, peft_config, unfit
from loratune.model.adapter.starts import start_from_base
from loratune.model.adapter.targets import Targets, check_attached, expression_problem, peft_targets, resolve_targets
from loratune.model.adapter.tensors import PREFIX
from loratune.model.adapter.values import check_weights
from loratune.model.weights.unpacked import keep_unpacked
from loratune.protocols import AdaptedModel, CausalModel
from loratune.recipe.method_sections import LoraSettings


def attach_adapter(
    model: CausalModel, settings: LoraSettings, base_name: str, seed: int, targets: Targets | None = None
) -> AdaptedModel:
    """Put a fresh adapter on a frozen base.

    Args:
        model: a causal language model.
        settings: the recipe's lora section.
        base_name: the base's name for the adapter's config.
        seed: seeds the adapter's initialisation.
        targets: of the settings in the model, if they have been resolved already.

    Raises:
        LoratuneError: the model does not have the targets, layers or modules_to_save, or PEFT refuses a target.
    """
    targets = check_names(model, settings, targets)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        **_ranks_and_alphas(settings),
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        bias=settings.bias,
        **peft_targets(model, targets, settings.layers),
        modules_to_save=settings.modules_to_save or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        # With tied embeddings, a fully trained embedding must stay the head's matrix too.
        ensure_weight_tying=bool(settings.modules_to_save) and model.config.tie_word_embeddings,
    )
    keep_unpacked(model)
    try:
        adapted: AdaptedModel = get_peft_model(model, config)
    except ValueError as error:  # of a module that PEFT refuses in some architectures
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in targets.roles))
        raise LoratuneError(
            f"lora.target_modules: PEFT refuses one of {names}; name the others instead: {first_lines(str(error))}",
            Exit.USAGE,
        ) from error
    config.base_model_name_or_path = base_name  # PEFT puts the folder it was loaded from there
    check_attached(adapted, targets)
    check_frozen(adapted, settings)
    if settings.starts_from_base:
        start_from_base(adapted, settings)
    own_parameters(adapted).keep_trained("default")
    return adapted


def check_names(model: CausalModel, settings: LoraSettings, targets: Targets | None = None) -> Targets:
    """Compare the names in a recipe's lora section with the modules of a model, which needs no weights for that.

    Args:
        model: a causal language model without an adapter.
        settings: the recipe's lora section.
        targets: of the settings in the model, if they have been resolved already.

    Returns:
        The targets.

    Raises:
        LoratuneError: the model does not have the targets, layers or modules_to_save, or a pattern matches no target.
    """
    errors = list[LoratuneError]()
    try:
        targets = targets or resolve_targets(model, settings)
        _check_patterns(targets, settings)
    except LoratuneError as error:
        errors.append(error)
    if unsaved := refusal(lambda: _check_modules_to_save(model, settings.modules_to_save)):
        errors.append(unsaved)
    if errors or targets is None:
        raise together(errors)
    return targets


def _ranks_and_alphas(settings: LoraSettings) -> dict[str, Any]:
    """Return PEFT's settings of ranks and alphas; with twice the rank, layers still have the recipe's scale."""
    times = 2 if settings.starts_from_base else 1
    alphas = math.sqrt(times) if settings.use_rslora else times

    def alpha(value: float) -> float:
        value *= alphas
        return int(value) if value == int(value) else value

    return {
        "r": times * settings.rank,
        "lora_alpha": alpha(settings.alpha),
        "rank_pattern": {name: times * rank for name, rank in settings.rank_pattern.items()},
        "alpha_pattern": {name: alpha(value) for name, value in settings.alpha_pattern.items()},
    }


def is_adapter_weight(name: str) -> bool:
    """Return whether a parameter of a PEFT model is its adapter's own, and none of the base's."""
    return "lora_" in name or ".modules_to_save." in name


def train_in_float32(model: Any) -> None:
    """Keep trained weights in float32, whatever the base is in.

    TRL casts the adapter of a quantised base to bfloat16. AdamW would lose steps below 2⁻⁸ of a weight then, and the
    scaler of float16 training has no kernel for such gradients.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if getattr(model, "is_loaded_in_4bit", False):
        from loratune.model.weights.trained_bias import keep_biases  # takes bitsandbytes

        keep_biases(model)


def check_frozen(model: AdaptedModel, settings: LoraSettings) -> None:
    """Make sure, name by name, that just the adapter trains.

    Raises:
        RuntimeError: PEFT left a base weight trainable or an adapter weight frozen; this is a bug.
    """
    for name, parameter in model.named_parameters():
        is_adapter = is_adapter_weight(name)
        is_bias = name.endswith(".bias") and settings.bias != "none"
        if parameter.requires_grad and not (is_adapter or is_bias):
            raise RuntimeError(f"base weight {name} would be trained")
        if is_adapter and not parameter.requires_grad:
            raise RuntimeError(f"adapter weight {name} would not be trained")


def save_adapter(model: AdaptedModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    if trains_weights(model):
        save_weights(model, folder)
        return
    model.create_or_update_model_card = lambda _: None  # PEFT's model card contains local paths
    # By default PEFT asks the hub whether the vocabulary was resized; loratune never resizes it.
    model.save_pretrained(folder, save_embedding_layers=False)


def load_adapter(model: CausalModel, folder: Path, name: str = "default", keep_dtype: bool = False) -> AdaptedModel:
    """Put a saved adapter on its base, which stays as it is: what the adapter replaces in it becomes its own.

    Args:
        model: the base, or a model with other adapters.
        folder: PEFT folder.
        name: PEFT's name for the adapter.
        keep_dtype: see `OwnParameters.add`.

    Raises:
        LoratuneError: the adapter is damaged, not LoRA, contains NaN, or does not match the base's shapes.
    """
    return put_adapter(model, AdapterReader(model).read(folder), name, keep_dtype)


def check_adapter(folder: Path, base: Shapes) -> None:
    """Check that an adapter has all its tensors, as `load_adapter` does, but without a model.

    Args:
        folder: PEFT folder.
        base: parameter name → shape, of the base.

    Raises:
        LoratuneError: see `require_complete`; or the file is missing, damaged or contains NaN.
    """
    check_weights(folder)
    files = in_peft_layout(folder, base)
    values = settle_patterns(read_config_values(files), base, folder)
    if problems := unmatched_stacks(values, base):
        raise unfit(folder, problems)
    require_complete(folder, peft_config(values, folder), tensor_shapes(files), base)


def load_adapter_weights(model: AdaptedModel, folder: Path) -> None:
    """Put the weights of a saved adapter in the place of the model's own.

    Raises:
        LoratuneError: the file is damaged, or its tensors are not exactly those that the model trains.
    """
    check_weights(folder)
    weights = load_file(folder / WEIGHTS_FILE)
    whole = {f"{PREFIX}{name}": weight for name, weight in trained_weights(model).items()}
    own = whole or get_peft_model_state_dict(model, save_embedding_layers=False)
    strange = sorted(
        name
        for name in weights.keys() | own.keys()
        if name not in own or name not in weights or weights[name].shape != own[name].shape
    )
    if strange:
        raise LoratuneError(
            f"{folder / WEIGHTS_FILE}: {counted(len(strange), 'tensor')} that this run does not train, "
            f"first {strange[0]}",
            Exit.MODEL,
        )
    if not whole:
        set_peft_model_state_dict(model, weights)
        return
    with torch.no_grad():
        for name, weight in whole.items():
            weight.copy_(weights[name])


def _check_modules_to_save(model: CausalModel, wanted: list[str]) -> None:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unmatched = [name for name in wanted if name not in names]
    if unmatched:
        raise LoratuneError(f"lora.modules_to_save: no module is called {', '.join(unmatched)}", Exit.USAGE)


def _check_patterns(targets: Targets, settings: LoraSettings) -> None:
    """Refuse a pattern that no adapted module ends with, which PEFT would ignore."""
    problems = []
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, setting):
            if problem := expression_problem(pattern):
                problems.append(f"lora.{setting} {problem}")
                continue
            ending = re.compile(rf"(.*\.)?({pattern})")
            if not any(map(ending.fullmatch, targets.roles)):
                names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in targets.roles))
                problems.append(f"lora.{setting} {pattern!r}: no module of the adapter ends so; it has {names}")
    if problems:
        raise LoratuneError("\n".join(problems), Exit.USAGE)
