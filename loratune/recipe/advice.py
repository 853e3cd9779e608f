"""Warns about settings that are allowed but usually give a poor model, each with the reason."""

from __future__ import annotations

from loratune.recipe.sections import Recipe, TrainingSettings, adapts_experts

# Values that vLLM's --max-lora-rank accepts; newer versions also accept 1.
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_MAX_LORA_RANK = 16


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest valid --max-lora-rank of vLLM for a rank; None if the rank is too large."""
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= rank), None)


def advise(recipe: Recipe) -> list[str]:
    """Return one sentence of advice for each risky setting."""
    return [*_advise_lora(recipe), *_advise_experts(recipe), *_advise_training(recipe)]


def _advise_experts(recipe: Recipe) -> list[str]:
    if not adapts_experts(recipe.lora):
        return []
    advice = [
        "lora.target_modules experts: the adapter has no dropout, and most servers do not load it, so merge it",
    ]
    if recipe.training.gradient_checkpointing is None:
        advice.append(
            "lora.target_modules experts: gradient checkpointing is on, because the changed matrices of all experts "
            "would be kept for the backward pass otherwise"
        )
    return advice


def _advise_lora(recipe: Recipe) -> list[str]:
    lora, advice = recipe.lora, []
    if lora.alpha < lora.rank and not lora.use_rslora:
        advice.append(
            f"lora.alpha {lora.alpha:g} is below lora.rank {lora.rank}: the update is scaled by "
            f"{lora.alpha / lora.rank:g} and learns slowly; alpha = 2 × rank is the usual start"
        )
    if lora.rank > 64 and not lora.use_rslora:
        advice.append(
            f"lora.rank {lora.rank} is above 64: it costs memory and overfits small data, and alpha / rank shrinks "
            "the update; try 8 to 64, or lora.use_rslora true"
        )
    if lora.rank > MAX_LORA_RANKS[-1]:
        advice.append(
            f"lora.rank {lora.rank} is above {MAX_LORA_RANKS[-1]}, the most that vLLM can serve as an adapter: it has "
            "to be merged"
        )
    elif lora.rank > DEFAULT_MAX_LORA_RANK:
        advice.append(
            f"lora.rank {lora.rank} is above vLLM's default limit: serve it there with --max-lora-rank "
            f"{max_lora_rank(lora.rank)}"
        )
    return advice


def _advise_training(recipe: Recipe) -> list[str]:
    training, data, advice = recipe.training, recipe.data, []
    if training.max_steps and training.epochs != TrainingSettings.model_fields["epochs"].default:
        advice.append(
            f"training.max_steps {training.max_steps} takes precedence over training.epochs {training.epochs:g}; "
            "give one"
        )
    if training.learning_rate < 5e-5:
        advice.append(
            f"training.learning_rate {training.learning_rate:g} is below 5e-5: LoRA starts from zero and hardly moves "
            "at rates for full training; 1e-4 to 2e-4 is usual"
        )
    if training.learning_rate > 5e-3:
        advice.append(f"training.learning_rate {training.learning_rate:g} is above 5e-3: training often diverges there")
    if not data.validation:
        advice.append(
            "no validation rows (data.validation): overfitting stays unnoticed, and the last step counts as the best; "
            "0.1 is usual"
        )
    if training.epochs > 5 and training.max_steps is None and not data.validation:
        advice.append(f"training.epochs {training.epochs:g} without validation: the model may memorise the rows")
    return advice
