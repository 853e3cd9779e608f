"""Combines several adapters of one base into one, with PEFT's add_weighted_adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loratune.choices import Combination
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.attach import load_adapter
from loratune.model.adapter.files import read_config_values
from loratune.model.adapter.own_parameters import own_parameters
from loratune.model.weights.mapped import load_mapped
from loratune.printable import shortened

# What PEFT calls linear adds up the A and the B matrices, whose product then has terms of one adapter's A with the
# other's B. The weighted sum of the updates is what it calls cat: the matrices side by side.
PEFT_NAMES: dict[Combination, str] = {"linear": "cat", "svd": "svd", "ties": "ties", "dare_ties": "dare_ties"}
COMBINED = "combined"


def combine_adapters(
    base: Path, adapters: Mapping[str, Path], weights: list[float], method: Combination, density: float, folder: Path
) -> Path:
    """Write the combination of several adapters as a PEFT folder.

    Args:
        base: folder of their base.
        adapters: name → PEFT folder.
        weights: of each.
        method: how several become one.
        density: share of the values that ties (https://arxiv.org/abs/2306.01708) and dare_ties
            (https://arxiv.org/abs/2311.03099) keep.
        folder: existing folder to write into.

    Returns:
        The folder of the combined adapter.

    Raises:
        LoratuneError: an adapter has more than low-rank matrices, or PEFT rejects the combination.
    """
    _check_plain(adapters)
    if "ties" in method:
        _check_same_rank(adapters, method)
    model: Any = load_mapped(base)  # PEFT's wrapper of it from the first adapter on
    names = [f"adapter_{number}" for number in range(len(adapters))]  # PEFT takes no dots, which the user's may have
    for inner, (name, adapter) in zip(names, adapters.items(), strict=True):
        model = load_adapter(model, adapter, inner)
        own = own_parameters(model).names(inner)
        if own:  # PEFT would silently drop it
            raise LoratuneError(
                f"only plain LoRA adapters can be combined: {shortened(name)} ({adapter}) brings {', '.join(own[:3])}; "
                "merge one, and train on the merged model",
                Exit.MODEL,
            )
    torch.manual_seed(0)  # dare_ties drops values at random
    try:
        model.add_weighted_adapter(
            names,
            weights,
            COMBINED,
            combination_type=PEFT_NAMES[method],
            density=density if "ties" in method else None,
            svd_full_matrices=False,  # columns beyond the rank are not needed
        )
    except ValueError as error:
        raise LoratuneError(f"--combine {method}: {error}", Exit.MODEL) from error
    # The result's matrices include the scale; the flag, copied from the first adapter, would apply it twice.
    model.peft_config[COMBINED].use_rslora = False
    model.save_pretrained(folder, selected_adapters=[COMBINED], save_embedding_layers=False)
    return folder / COMBINED


def _check_same_rank(adapters: Mapping[str, Path], method: Combination) -> None:
    """Refuse different ranks as PEFT does, whose message would say the same of linear, a method of its own."""
    ranks = {name: read_config_values(adapter).get("r") for name, adapter in adapters.items()}
    if len(set(ranks.values())) > 1:
        told = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise LoratuneError(
            f"--combine {method}: the adapters must have the same rank, and have {told}; linear and svd take any",
            Exit.MODEL,
        )


def _check_plain(adapters: Mapping[str, Path]) -> None:
    problems = []
    layers = {}
    for name, adapter in adapters.items():
        config = read_config_values(adapter)
        layers[name] = config.get("layers_to_transform")
        extras = {
            "DoRA": config.get("use_dora"),
            "modules_to_save": config.get("modules_to_save"),
            "trained tokens": config.get("trainable_token_indices"),
            "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
            "experts among its targets": config.get("target_parameters"),
            "a rank or alpha pattern": config.get("rank_pattern") or config.get("alpha_pattern"),
        }
        problems += [f"{name} ({adapter}) has {extra}" for extra, has in extras.items() if has]
    if len({str(numbers) for numbers in layers.values()}) > 1:  # PEFT would drop layers that the first adapter lacks
        problems.append(", ".join(f"{name} is on layers {numbers or 'all'}" for name, numbers in layers.items()))
    if problems:
        raise LoratuneError(
            f"only plain LoRA adapters can be combined:\n{bullet_list(problems)}\nmerge one, and train on the "
            "merged model",
            Exit.MODEL,
        )
