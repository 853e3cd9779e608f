"""An adapter as changes to the base's tensors: every tensor of the adapter belongs to one, or nothing is merged.

A linear layer becomes W + s·B·A with s = alpha/r (LoRA, https://arxiv.org/abs/2106.09685) or alpha/√r (rsLoRA,
https://arxiv.org/abs/2312.03732); DoRA (https://arxiv.org/abs/2402.09353) gives each row of it a trained length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter_files import WEIGHTS_FILE, by_pattern, check_weights, read_config_values
from loratune.model.tensor_files import TensorFiles, TensorInfo

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "base_model.model."
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)")
# PEFT's wrappers, which stand between a module's name and its parameter.
WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)")
# Starts that subtract something from the base; PEFT can convert such adapters to plain LoRA.
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Settings that matter in training only, or are handled below. Any other one that is set is a reason to stop.
KNOWN_SETTINGS = {
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@dataclass
class TensorUpdate:
    """What an adapter does to one tensor of the base."""

    replacement: torch.Tensor | None = None
    """Takes the place of the base's values: modules_to_save, trained biases."""
    up: torch.Tensor | None = None
    """B (rows, rank)."""
    down: torch.Tensor | None = None
    """A (rank, columns)."""
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None
    """DoRA's length of each row (rows,)."""
    shift: torch.Tensor | None = None
    """Added to a bias (rows,), unscaled."""

    def apply(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """The updated rows from `start` on.

        Args:
            base: (n, columns) or (n,) rows of the base in the type to compute in, float32 or float64; not changed.
            start: number of the first row.

        Returns:
            The same shape and type; the base itself where nothing changes it.
        """
        rows, dtype = slice(start, start + len(base)), base.dtype
        updated = base if self.replacement is None else self.replacement[rows].to(dtype)
        if self.up is not None and self.down is not None:
            updated = torch.addmm(updated, self.up[rows].to(dtype), self.down.to(dtype), alpha=self.scaling)
        if self.magnitude is not None:
            lengths = torch.linalg.vector_norm(updated, dim=1)
            updated = updated * (self.magnitude[rows].to(dtype) / lengths).unsqueeze(1)
        if self.shift is not None:
            updated = updated + self.scaling * self.shift[rows].to(dtype)
        return updated

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """The shape of the updated tensor as each part implies it; 0 stands for any length."""
        for whole in (self.replacement, self.shift):
            if whole is not None:
                yield tuple(whole.shape)
        if self.up is not None and self.down is not None:
            yield self.up.shape[0], self.down.shape[1]
        if self.magnitude is not None:
            yield self.magnitude.shape[0], 0

    def equals(self, other: TensorUpdate) -> bool:
        """Whether both make the same of the same values."""
        mine, theirs = (
            [update.replacement, update.up, update.down, update.magnitude, update.shift] for update in (self, other)
        )
        return self.scaling == other.scaling and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(mine, theirs, strict=True)
        )


def read_updates(adapter: Path, base: dict[str, TensorInfo], is_tied: bool) -> dict[str, TensorUpdate]:
    """Read an adapter as updates of the base's tensors.

    Args:
        adapter: PEFT folder.
        base: the base's tensors.
        is_tied: whether the base has one matrix for embedding and head.

    Returns:
        Name of a tensor → its update. A tied head that is trained has an entry of its own.

    Raises:
        LoratuneError: a tensor of the adapter has no place in the base or another shape, or its config says something
            that a merged matrix cannot hold.
    """
    config = read_config_values(adapter)
    _check_settings(adapter, config)
    check_weights(adapter)
    files = TensorFiles([adapter / WEIGHTS_FILE])
    updates: dict[str, TensorUpdate] = {}
    problems: list[str] = []
    for name in sorted(files.infos):
        target = _take(updates, name.removeprefix(PREFIX), files.tensor(name), config, problems)
        if target and target not in base and not (is_tied and target == HEAD):
            problems.append(f"{name}: the base has no {target}")
    for target, update in updates.items():
        info = base.get(target) or (base.get(EMBEDDING) if target == HEAD else None)
        if info:
            problems += _shape_problems(target, update, info)
    if problems:
        raise LoratuneError(
            f"{adapter}: {len(problems)} tensors of the adapter do not fit the base, so nothing is merged:\n"
            f"{bullet_list(problems, limit=5)}",
            Exit.MODEL,
        )
    return updates


def _check_settings(adapter: Path, config: dict[str, Any]) -> None:
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGED_BASE):
        raise LoratuneError(
            f"{adapter}: trained with init_lora_weights {start}, which changes the base; convert it to plain LoRA with "
            "PEFT first (save_pretrained with path_initial_model_for_weight_conversion)",
            Exit.MODEL,
        )
    unknown = sorted(key for key, value in config.items() if value and key not in KNOWN_SETTINGS)
    if unknown:
        raise LoratuneError(f"{adapter}: an adapter with {', '.join(unknown)} cannot be merged", Exit.MODEL)


def _take(
    updates: dict[str, TensorUpdate], name: str, tensor: torch.Tensor, config: dict[str, Any], problems: list[str]
) -> str:
    """Put one tensor of the adapter where it belongs; returns the name of the base's tensor, or nothing."""
    match = PART.fullmatch(name)
    if match is None:
        target = WRAPPER.sub("", name)
        update = updates.setdefault(target, TensorUpdate())
        if update.replacement is not None:
            problems.append(f"{name}: {target} is replaced twice")
        update.replacement = tensor
        return target
    module, part = WRAPPER.sub("", match["module"] + ".").rstrip("."), match["part"]
    if part == "lora_magnitude_vector" and f"{module}.weight" == EMBEDDING:
        problems.append(f"{name}: DoRA on an embedding cannot be merged")
        return ""
    target = f"{module}.bias" if part == "lora_B.bias" else f"{module}.weight"
    update = updates.setdefault(target, TensorUpdate())
    rank = by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and math.isfinite(alpha)):
        problems.append(f"{name}: the adapter's config gives it rank {rank!r} and alpha {alpha!r}")
        return target
    length = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}.get(part)
    if length is not None and tensor.ndim != 2:
        problems.append(f"{name}: of shape {list(tensor.shape)}, so no matrix")
        return target
    update.scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if part in ("lora_A.weight", "lora_embedding_B"):
        update.down = tensor.T if "embedding" in part else tensor
    elif part in ("lora_B.weight", "lora_embedding_A"):
        update.up = tensor.T if "embedding" in part else tensor
    elif part == "lora_B.bias":
        update.shift = tensor
    else:
        update.magnitude = tensor.reshape(-1)
    if length is not None and tensor.shape[length] != rank:
        problems.append(f"{name}: rank {tensor.shape[length]} where the adapter's config says {rank}")
    return target


def _shape_problems(name: str, update: TensorUpdate, info: TensorInfo) -> list[str]:
    problems = []
    if (update.up is None) != (update.down is None):
        problems.append(f"{name}: only one of the two matrices is there")
    for shape in update.shapes():
        fits = [implied in (0, length) for implied, length in zip(shape, info.shape, strict=False)]
        if len(shape) != len(info.shape) or not all(fits):
            problems.append(f"{name}: an update of shape {list(shape)} for a base of {list(info.shape)}")
    return problems
