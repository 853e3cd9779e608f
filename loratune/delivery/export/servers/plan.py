"""Checks whether a server can serve an adapter unmerged, and builds the command; the server need not be installed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.choices import ServerName
from loratune.commands import Command
from loratune.delivery.advice import SERVE, instead_of_serving
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.adapter.completeness import tensor_shapes
from loratune.model.adapter.files import CONFIG_FILE, read_config_values
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.patterns import settle_patterns
from loratune.model.adapter.stacks import WRAPPED
from loratune.model.adapter.values import check_weights
from loratune.model.architecture.served_class import ServedClass
from loratune.model.architecture.vocabulary import Projection, projection_of
from loratune.recipe.servers import SERVERS, Part, max_lora_rank
from loratune.runs.opening import AdapterSource

SETTINGS = {
    "use_dora": Part.DORA,
    "lora_bias": Part.LORA_BIAS,
    "trainable_token_indices": Part.TOKENS,
    "use_rslora": Part.RSLORA,
}
"""Settings of adapter_config.json that are parts; any value that is not false."""
WITH_TENSORS = {Part.DORA, Part.LORA_BIAS, Part.TOKENS, Part.BASE_BIASES, Part.WHOLE_MODULES}
"""Parts with tensors other than LoRA's matrices."""
SHOWN = 4
"""Modules that a message names."""
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<matrix>[AB])(?:\.weight)?")
PARTS = {
    Projection.USUAL: Part.USUAL,
    Projection.RECURRENT: Part.RECURRENT,
    Projection.DECAY: Part.DECAY,
    Projection.STACK: Part.STACKS,
    Projection.ROUTER: Part.ROUTER,
    Projection.EMBEDDING: Part.EMBEDDING,
}


@dataclass(frozen=True)
class ServerAdvice:
    """What a server supports of an adapter."""

    server: ServerName
    max_lora_rank: int
    """Smallest sufficient --max-lora-rank."""
    problems: list[str]
    """Why the server would reject it, or give other answers than PEFT."""
    warnings: list[str]
    """What depends on the model or the version."""


def check_for(server: ServerName, adapter: Path) -> ServerAdvice:
    """Check an adapter by its config and its tensors.

    Raises:
        LoratuneError: config or weights are missing, unreadable, or invalid.
    """
    config = read_config_values(adapter)
    if not all(isinstance(config.get(key), (int, float)) for key in ("r", "lora_alpha")):
        raise LoratuneError(f"{adapter / CONFIG_FILE}: r and lora_alpha must both be given", Exit.MODEL)
    check_weights(adapter)
    shapes = tensor_shapes(adapter)
    matrices: dict[str, dict[str, list[int]]] = {}  # shapes of A and B of each adapted module
    others: list[str] = []  # other tensors; reported unless the config already explains them
    for name, shape in shapes.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            matrices.setdefault(match["module"], {})[match["matrix"]] = shape
    kinds = {module: _kind(module, found) for module, found in matrices.items()}
    ranks = {module: _rank(found) for module, found in matrices.items() if kinds[module] is not Projection.STACK}
    config = settle_patterns(config, {f"{module}.weight": () for module in ranks}, adapter)
    parts = _config_parts(config) | _module_parts(kinds)
    if differing := _differing(config, ranks):
        parts[Part.PATTERNS] = f"{len(differing)} {Part.PATTERNS.value}, first {differing[0]}"
    answers = SERVERS[server].answers
    problems = [_told(told, answers[part].told) for part, told in parts.items() if not answers[part].is_served]
    if others and not parts.keys() & WITH_TENSORS:
        problems.append(f"{counted(len(others), 'tensor')} not of LoRA, first {others[0]}")
    rank = max([config["r"], *ranks.values(), *config["rank_pattern"].values()])
    problems += [*_rank_problems(server, rank, matrices, ranks), *_stack_problems(kinds)]
    allowed = max_lora_rank(rank, server) or SERVERS[server].ranks[-1]
    return ServerAdvice(server, allowed, problems, _warnings(server, parts, kinds))


def require_servable(
    server: ServerName,
    source: AdapterSource,
    output: Path,
    model: str | None = None,
    force: bool = False,
    served: ServedClass | None = None,
) -> ServerAdvice:
    """Return the advice for an adapter that a server can serve.

    Args:
        server: the server.
        source: the adapter.
        output: output folder of its export.
        model: location of its base, if given.
        force: accept a different base, or a changed adapter.
        served: what is known of its base, if that is on this machine.

    Raises:
        LoratuneError: the server cannot serve it; lists the reasons and commands for an alternative.
    """
    files = in_peft_layout(source.adapter, served.trained_shapes) if served else source.adapter
    advice = check_for(server, files)
    if not advice.problems:
        return advice
    told, commands = instead_of_serving(source, output, model, force, server)
    raise LoratuneError(
        f"{source.adapter}: {SERVERS[server].title} cannot serve this adapter as it is:\n"
        f"{bullet_list(advice.problems)}\n{told}",
        Exit.MODEL,
        commands,
    )


def serve_command(
    base: str,
    name: str,
    folder: Path,
    advice: ServerAdvice,
    chat_template: Path | None = None,
    flags: Sequence[str] = (),
) -> Command:
    """Return the command that serves an adapter.

    Args:
        base: hub id or folder of the base.
        name: model name in requests for the adapter.
        folder: the adapter's folder.
        advice: result of `check_for`.
        chat_template: template file, if the adapter's differs from the base's, which servers use by default.
        flags: parser flags for the template.
    """
    has_signs = "=" in f"{name}{folder}" or "," in f"{name}{folder}"
    if advice.server == "vllm":
        as_json = {"name": name, "path": str(folder)}
        flag = "--lora-modules"
    else:
        as_json = {"lora_name": name, "lora_path": str(folder)}
        flag = "--lora-paths"
    words = [*SERVE[advice.server], base, "--enable-lora", flag]
    words += [json.dumps(as_json, ensure_ascii=False) if has_signs else f"{name}={folder}"]
    words += ["--max-lora-rank", str(advice.max_lora_rank)]
    if chat_template is not None:
        words += ["--chat-template", str(chat_template)]
    return Command("serve it", (*words, *flags))


def _kind(module: str, matrices: Mapping[str, Sequence[int]]) -> Projection:
    shape = matrices.get("B", ())
    if len(shape) == 2 and shape[0] == 1:  # a gate with one output, whatever its name
        return Projection.ROUTER
    return projection_of(module.removesuffix(WRAPPED))


def _rank(matrices: Mapping[str, Sequence[int]]) -> int:
    """Return a module's rank, from its A matrix; 0 if it has none."""
    shape = matrices.get("A", ())
    return shape[0] if len(shape) == 2 else 0


def _config_parts(config: dict[str, Any]) -> dict[Part, str]:
    """Return the parts that the config states, each as messages call it."""
    parts = {part: part.value for key, part in SETTINGS.items() if config.get(key)}
    if saved := config.get("modules_to_save"):
        named = [saved] if isinstance(saved, str) else saved
        more = f", … {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        parts[Part.WHOLE_MODULES] = f"modules trained in full (modules_to_save: {', '.join(named[:SHOWN])}{more})"
    if config.get("bias", "none") != "none":
        parts[Part.BASE_BIASES] = f"trained biases of the base (bias: {config['bias']})"
    return parts


def _module_parts(kinds: Mapping[str, Projection]) -> dict[Part, str]:
    """Return the parts that the modules are, each as messages call it."""
    names: dict[Part, list[str]] = {}
    for module, kind in kinds.items():
        if kind in PARTS:
            names.setdefault(PARTS[kind], []).append(_last(module.removesuffix(WRAPPED)))
    return {part: f"LoRA on {' and '.join(sorted(set(found)))}" for part, found in names.items()}


def _differing(config: dict[str, Any], ranks: dict[str, int]) -> list[str]:
    """Return the modules with another scale than the config's common one."""
    if min(ranks.values(), default=1) < 1:
        return []
    alphas = config["alpha_pattern"]
    common = _scale(config, config["lora_alpha"], config["r"])
    return [
        module
        for module, module_rank in ranks.items()
        if abs(_scale(config, alphas.get(module, config["lora_alpha"]), module_rank) - common) > 1e-9 * abs(common)
    ]


def _scale(config: dict[str, Any], alpha: float, rank: int) -> float:
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _rank_problems(server: ServerName, rank: int, matrices: Mapping[str, Any], ranks: Mapping[str, int]) -> list[str]:
    if not matrices or min(ranks.values(), default=1) < 1:
        return ["no LoRA matrices, or some of rank 0"]
    allowed = SERVERS[server].ranks
    return [f"rank {rank}, where {allowed[-1]} is the most"] if allowed and rank > allowed[-1] else []


def _stack_problems(kinds: Mapping[str, Projection]) -> list[str]:
    """Return stacks of which only one parameter is adapted."""
    found = {module.removesuffix(WRAPPED) for module, kind in kinds.items() if kind is Projection.STACK}
    half = sorted(stack for stack in found if (stack in kinds) != (f"{stack}{WRAPPED}" in kinds))
    return [f"LoRA on a part of the matrices of {half[0]}: all or none have to be adapted"] if half else []


def _warnings(server: ServerName, parts: Mapping[Part, str], kinds: Mapping[str, Projection]) -> list[str]:
    known, title = SERVERS[server].answers, SERVERS[server].title
    found = [
        _told(f"{told}: served by {title} {known[part].since} and newer", known[part].told)
        for part, told in parts.items()
        if known[part].is_served and known[part].since
    ]
    strange = sorted({_last(module) for module, kind in kinds.items() if kind is Projection.OTHER})
    return [*found, *([f"whether {title} adapts {', '.join(strange)} depends on the model"] if strange else [])]


def _told(what: str, remark: str) -> str:
    return f"{what}: {remark}" if remark else what


def _last(module: str) -> str:
    return module.rpartition(".")[2]
