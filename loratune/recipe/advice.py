"""Warns about settings that are allowed but usually give a poor model, each with the reason."""

from __future__ import annotations

import math

from loratune.choices import ServerName
from loratune.recipe.method_sections import LoraSettings, Method, adapts_experts
from loratune.recipe.sections import Recipe, TrainingSettings
from loratune.recipe.servers import INSTEAD, SERVERS, Part, max_lora_rank, unserved

VLLM = SERVERS["vllm"]
HIGHEST_OWN_RATE = 5e-5
SLOWEST, FASTEST = 2e-3, 0.08
"""Bounds of `first_steps`; docs/defaults.md has the measurements."""


def advise(recipe: Recipe) -> list[str]:
    """Return one sentence of advice for each risky setting."""
    of_method = _advise_own_weights if recipe.trains_base else _advise_adapter
    return [*of_method(recipe), *_advise_training(recipe)]


def _advise_own_weights(recipe: Recipe) -> list[str]:
    method, rate = recipe.method, recipe.training.learning_rate
    advice = [
        f"method {method}: the run folder holds the trained weights in float32, not a whole model. infer, serve and "
        "export take them with the base; loratune merge writes the model folder that other programs need"
    ]
    if rate > HIGHEST_OWN_RATE:
        advice.append(
            f"training.learning_rate {rate:g} is above {HIGHEST_OWN_RATE:g}: weights of the base usually need 1e-5 to "
            "2e-5, a tenth of an adapter's rate, and forget at higher ones"
        )
    return advice


def _advise_adapter(recipe: Recipe) -> list[str]:
    return [*_advise_lora(recipe), *_advise_experts(recipe), *_advise_serving(recipe)]


def _advise_experts(recipe: Recipe) -> list[str]:
    if not adapts_experts(recipe.lora) or recipe.training.gradient_checkpointing is not None:
        return []
    return [
        "lora.target_modules experts: gradient checkpointing is on, because the changed matrices of all experts would "
        "be kept for the backward pass otherwise"
    ]


def first_steps(lora: LoraSettings, learning_rate: float) -> float:
    """Return how fast the update grows at first: alpha × learning rate, times √rank with rank-stabilised scaling.

    B starts at zero and Adam moves its entries by about its learning rate, so B·A grows with rank × learning rate, and
    is multiplied by alpha / rank.
    """
    scale = math.sqrt(lora.rank) if lora.use_rslora else 1
    return lora.alpha * learning_rate * lora.b_learning_rate_ratio * scale


def _advise_lora(recipe: Recipe) -> list[str]:
    lora = recipe.lora
    if lora.starts_from_base:
        return [
            f"lora.init {lora.init}: the adapter is saved as plain LoRA of rank {2 * lora.rank}, which holds its start "
            "too; it has twice the trained values in memory and files"
        ]
    growth = first_steps(lora, recipe.training.learning_rate)
    if SLOWEST <= growth <= FASTEST:
        return []
    factors = ["lora.alpha", "training.learning_rate"]
    factors += ["lora.b_learning_rate_ratio"] * (lora.b_learning_rate_ratio != 1) + ["√lora.rank"] * lora.use_rslora
    bound = f"below {SLOWEST:g}: the adapter learns slowly"
    if growth > FASTEST:
        bound = f"above {FASTEST:g}: training often diverges there"
    return [f"{' × '.join(factors)} is {growth:.2g}, {bound}; 1e-2 is usual"]


def _advise_serving(recipe: Recipe) -> list[str]:
    lora, advice = recipe.lora, []
    rank = lora.saved_rank
    told = f"lora.rank {rank}" if rank == lora.rank else f"the adapter's highest rank, {rank},"
    if rank > VLLM.ranks[-1]:
        advice.append(
            f"{told} is above {VLLM.ranks[-1]}, the most that vLLM can serve as an adapter: it has to be merged"
        )
    elif VLLM.default_rank and rank > VLLM.default_rank:
        advice.append(
            f"{told} is above vLLM's default limit: serve it there with --max-lora-rank {max_lora_rank(rank)}"
        )
    for setting, part in chosen_parts(lora).items():
        if servers := unserved(part):
            advice.append(f"{setting}: {' and '.join(servers)} cannot serve such an adapter; {INSTEAD}")
    return advice


def chosen_parts(lora: LoraSettings) -> dict[str, Part]:
    """Return setting → part, of the parts that a recipe gives an adapter beside LoRA on projections."""
    chosen = {
        "lora.use_dora": (Part.DORA, lora.use_dora),
        "lora.use_rslora": (Part.RSLORA, lora.use_rslora),
        f"lora.bias {lora.bias}": (Part.BASE_BIASES, lora.bias != "none"),
        "lora.target_modules experts": (Part.STACKS, adapts_experts(lora)),
        "lora.modules_to_save": (Part.WHOLE_MODULES, bool(lora.modules_to_save)),
        "lora.rank_pattern, lora.alpha_pattern": (Part.PATTERNS, _has_several_scales(lora)),
    }
    return {setting: part for setting, (part, is_chosen) in chosen.items() if is_chosen}


def _has_several_scales(lora: LoraSettings) -> bool:
    """Return whether the patterns give modules other scales than the rest, as far as they name the same modules."""
    patterns = {*lora.rank_pattern, *lora.alpha_pattern}
    given = [(lora.rank_pattern.get(name, lora.rank), lora.alpha_pattern.get(name, lora.alpha)) for name in patterns]
    power = 0.5 if lora.use_rslora else 1
    return any(abs(alpha / rank**power - lora.alpha / lora.rank**power) > 1e-9 for rank, alpha in given)


def is_served(method: Method, lora: LoraSettings, server: ServerName) -> bool:
    """Return whether a server serves the adapter of a recipe, as far as the recipe tells."""
    answers = SERVERS[server].answers
    return (
        method == "lora"
        and max_lora_rank(lora.saved_rank, server) is not None
        and all(answers[part].is_served for part in chosen_parts(lora).values())
    )


def _advise_training(recipe: Recipe) -> list[str]:
    training, data, advice = recipe.training, recipe.data, []
    if training.max_steps and training.epochs != TrainingSettings.model_fields["epochs"].default:
        advice.append(
            f"training.max_steps {training.max_steps} takes precedence over training.epochs {training.epochs:g}; "
            "give one"
        )
    if not data.validation:
        advice.append(
            "no validation rows (data.validation): overfitting stays unnoticed, and the last step counts as the best; "
            "0.1 is usual"
        )
    if training.epochs > 5 and training.max_steps is None and not data.validation:
        advice.append(f"training.epochs {training.epochs:g} without validation: the model may memorise the rows")
    return advice
