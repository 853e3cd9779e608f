"""Checks whether vLLM can serve an adapter unmerged, and builds the command; vLLM need not be installed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.commands import Command
from loratune.delivery.advice import instead_of_serving
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.completeness import tensor_shapes
from loratune.model.adapter.files import CONFIG_FILE, read_config_values
from loratune.model.adapter.patterns import settle_patterns
from loratune.model.adapter.values import check_weights
from loratune.model.architecture.vocabulary import EMBEDDING_MODULE, HEAD_MODULE, USUAL_PROJECTIONS
from loratune.recipe.advice import MAX_LORA_RANKS, max_lora_rank
from loratune.runs.opening import AdapterSource

# Kinds of LoRA that do not compute W + scale·B·A.
FOREIGN_KINDS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in the adapter",
    "trainable_token_indices": "separately trained tokens",
}
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<matrix>[AB])(?:\.weight)?")


@dataclass(frozen=True)
class VllmAdvice:
    """What vLLM supports of an adapter."""

    max_lora_rank: int
    """Smallest sufficient --max-lora-rank."""
    problems: list[str]
    """Why vLLM would reject it, or give other answers than PEFT."""
    warnings: list[str]
    """What depends on the model or the version."""


def check_for_vllm(adapter: Path) -> VllmAdvice:
    """Check an adapter by its config and its tensors.

    Raises:
        LoratuneError: config or weights are missing, unreadable, or invalid.
    """
    config = read_config_values(adapter)
    if not all(isinstance(config.get(key), (int, float)) for key in ("r", "lora_alpha")):
        raise LoratuneError(f"{adapter / CONFIG_FILE}: r and lora_alpha must both be given", Exit.MODEL)
    check_weights(adapter)
    shapes = tensor_shapes(adapter)
    ranks: dict[str, int] = {}  # rank of each adapted module, from its A matrix
    others: list[str] = []  # other tensors; reported unless the config already explains them
    for name, shape in shapes.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            others.append(name)
        elif match["matrix"] == "A":
            ranks[match["module"]] = shape[0] if len(shape) == 2 else 0
    config = settle_patterns(config, {f"{module}.weight": () for module in ranks}, adapter)
    rank = max([config["r"], *ranks.values()])
    problems = _config_problems(config)
    if others and not problems:
        problems.append(f"{len(others)} tensors that are not LoRA, first {others[0]}")
    problems += [*_rank_problems(config, rank, ranks), *_module_problems(ranks)]
    strange = sorted({_last(module) for module in ranks} - {*USUAL_PROJECTIONS, EMBEDDING_MODULE, HEAD_MODULE})
    warnings = [f"whether vLLM adapts {', '.join(strange)} depends on the model"] if strange else []
    return VllmAdvice(max_lora_rank(rank) or MAX_LORA_RANKS[-1], problems, warnings)


def require_servable(source: AdapterSource, output: Path, model: str | None = None, force: bool = False) -> VllmAdvice:
    """Return the advice for an adapter that vLLM can serve.

    Args:
        source: the adapter.
        output: output folder of its export.
        model: location of its base, if given.
        force: accept a different base, or a changed adapter.

    Raises:
        LoratuneError: vLLM cannot serve it; lists the reasons and commands for an alternative.
    """
    advice = check_for_vllm(source.adapter)
    if not advice.problems:
        return advice
    told, commands = instead_of_serving(source, output, model, force)
    raise LoratuneError(
        f"{source.adapter}: vLLM cannot serve this adapter as it is:\n{bullet_list(advice.problems)}\n{told}",
        Exit.MODEL,
        commands,
    )


def serve_command(
    base: str,
    name: str,
    folder: Path,
    advice: VllmAdvice,
    chat_template: Path | None = None,
    flags: Sequence[str] = (),
) -> Command:
    """Return the command that serves an adapter.

    Args:
        base: hub id or folder of the base.
        name: model name in requests for the adapter.
        folder: the adapter's folder.
        advice: result of `check_for_vllm`.
        chat_template: template file, if the adapter's differs from the base's, which vLLM uses by default.
        flags: parser flags for the template.
    """
    module = f"{name}={folder}"
    if "=" in f"{name}{folder}" or "," in module:
        module = json.dumps({"name": name, "path": str(folder)}, ensure_ascii=False)
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", module]
    words += ["--max-lora-rank", str(advice.max_lora_rank)]
    if chat_template is not None:
        words += ["--chat-template", str(chat_template)]
    return Command("serve it", (*words, *flags))


def _config_problems(config: dict[str, Any]) -> list[str]:
    problems = [f"{kind} ({key})" for key, kind in FOREIGN_KINDS.items() if config.get(key)]
    if config.get("modules_to_save"):
        problems.append(f"modules trained in full (modules_to_save: {', '.join(config['modules_to_save'])})")
    if config.get("bias", "none") != "none":
        problems.append(f"trained biases of the base (bias: {config['bias']})")
    return problems


def _rank_problems(config: dict[str, Any], rank: int, ranks: dict[str, int]) -> list[str]:
    if min(ranks.values(), default=0) < 1:
        return ["no LoRA matrices, or some of rank 0"]
    problems = []
    if rank > MAX_LORA_RANKS[-1]:
        problems.append(f"rank {rank}, where {MAX_LORA_RANKS[-1]} is the most")
    # vLLM (up to 0.30 at least) ignores patterns: ranks come from the matrices, and one scale is used for all.
    alphas = config["alpha_pattern"]
    common = _scale(config, config["lora_alpha"], config["r"])
    differing = [
        module
        for module, module_rank in ranks.items()
        if abs(_scale(config, alphas.get(module, config["lora_alpha"]), module_rank) - common) > 1e-9 * abs(common)
    ]
    if differing:
        problems.append(
            f"{len(differing)} modules with another alpha / rank than the rest, which would be scaled like the rest "
            f"(rank_pattern, alpha_pattern), first {differing[0]}"
        )
    return problems


def _scale(config: dict[str, Any], alpha: float, rank: int) -> float:
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _module_problems(ranks: dict[str, int]) -> list[str]:
    found = sorted({_last(module) for module in ranks} & {EMBEDDING_MODULE, HEAD_MODULE})
    if not found:
        return []
    return [
        f"LoRA on {' and '.join(found)}: many versions of vLLM refuse it for Qwen models, and where embeddings and "
        "head share one matrix, the adapter would reach both"
    ]


def _last(module: str) -> str:
    return module.rpartition(".")[2]
