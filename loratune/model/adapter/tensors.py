"""Reads an adapter's tensors: matrices of LoRA layers, and replacements of the base's parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.adapter.files import WEIGHTS_FILE, read_config_values
from loratune.model.adapter.patterns import settle_patterns, targeted, targeted_stacks, unmatched_stacks
from loratune.model.adapter.stacks import stack_places
from loratune.model.adapter.values import check_weights
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.weights.tensor_files import TensorFiles

PREFIX = "base_model.model."
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)")
RANK_AXES = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}
# PEFT's wrappers between a module's name and its parameter.
WRAPPER = re.compile(r"\.(token_adapter|base_layer|modules_to_save(\.default)?)(?=\.)")
TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class AdapterTensors:
    """An adapter's tensors by use."""

    lora: dict[str, torch.Tensor]
    """Name in the file → matrix, bias or DoRA magnitude of a LoRA layer."""
    whole: dict[str, torch.Tensor]
    """Parameter name of the base → its replacement: trained biases, modules_to_save, saved embeddings."""
    rows: dict[str, tuple[list[int], torch.Tensor]]
    """Matrix name of the base → numbers of the replaced rows, and their values."""
    stacks: dict[str, str]
    """Name before `.lora_A` → parameter with experts' matrices; see `stack_places`."""

    def adapted(self, match: re.Match[str]) -> str:
        """Return the base's name of what a LoRA tensor adapts: a module, or a parameter with experts' matrices."""
        return self.stacks.get(match["module"], _module(match))

    def parameter_of(self, name: str) -> str | None:
        """Return the parameter with experts' matrices that a LoRA tensor adapts; None if it adapts a module."""
        match = PART.fullmatch(name.removeprefix(PREFIX))
        return self.stacks.get(match["module"]) if match else None


def read_tensors(
    folder: Path, values: dict[str, Any], base: Mapping[str, Sequence[int]], is_tied: bool, problems: list[str]
) -> AdapterTensors:
    """Read an adapter's tensors, memory-mapped.

    Args:
        folder: PEFT folder.
        values: result of `settle_patterns`.
        base: parameter name → shape, of the base.
        is_tied: whether embedding and head of the base are tied.
        problems: receives mismatches with base or config; of LoRA matrices, only ranks are checked.

    Raises:
        LoratuneError: the file is missing, damaged or contains NaN.
    """
    found = _by_use(folder, values, base, is_tied, problems)
    problems += unmatched_stacks(values, base)
    problems += [*_vocabulary_problems(found, base), *_place_problems(found, base), *_missing(found, values, base)]
    problems += [*_rank_problems(found, values, base), *_target_problems(found, values, base)]
    return found


def _by_use(
    folder: Path, values: dict[str, Any], base: Mapping[str, Sequence[int]], is_tied: bool, problems: list[str]
) -> AdapterTensors:
    check_weights(folder)
    vocabulary = embedding, head = vocabulary_of(base)
    files = TensorFiles([folder / WEIGHTS_FILE])
    given = {name.removeprefix(PREFIX): info.shape for name, info in files.infos.items()}
    found = AdapterTensors({}, {}, {}, stack_places(values, base, given))
    for name in sorted(files.infos):
        tensor, place = files.tensor(name), name.removeprefix(PREFIX)
        target = WRAPPER.sub("", place)
        if PART.fullmatch(place):
            found.lora[name] = tensor
        elif place.endswith(TOKENS):
            module = place.removesuffix(TOKENS)
            found.rows[f"{module}.weight"] = _token_indices(values, module, len(tensor), problems), tensor
        elif ".original_module." in place:
            continue  # the base's values, which PEFT saves too
        elif target in found.whole and not torch.equal(found.whole[target], tensor):
            problems.append(f"{name}: {target} is replaced twice, by different values")
        else:
            found.whole[target] = tensor
            if is_tied and ".base_layer." in place and target in vocabulary:  # the tied matrix
                found.whole.setdefault(next(other for other in vocabulary if other != target), tensor)
    if is_tied and embedding in found.whole and values.get("ensure_weight_tying"):
        found.whole.setdefault(head, found.whole[embedding])
    if is_tied and embedding in found.rows:
        found.rows.setdefault(head, found.rows[embedding])
    return found


class RankAndAlpha(NamedTuple):
    """Of one module's adapter."""

    rank: int
    alpha: float


def rank_and_alpha(values: dict[str, Any], module: str) -> RankAndAlpha:
    """What a config gives a module.

    Args:
        values: result of `settle_patterns`.
        module: the module's name in the base, or that of a parameter with experts' matrices.
    """
    rank, alpha = values["rank_pattern"].get(module, values["r"]), values["alpha_pattern"].get(module)
    return RankAndAlpha(rank, values["lora_alpha"] if alpha is None else alpha)


def _rank_problems(tensors: AdapterTensors, values: dict[str, Any], base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return matrices whose rank differs from the config's; PEFT would allocate the config's rank first."""
    problems = []
    for name, tensor in tensors.lora.items():
        match = PART.fullmatch(name.removeprefix(PREFIX))
        axis = RANK_AXES.get(match["part"]) if match else None
        if match is None or axis is None:
            continue
        target = tensors.adapted(match)
        rank = rank_and_alpha(values, target).rank
        if tensor.ndim != 2:
            problems.append(f"{name}: of shape {list(tensor.shape)}, not a matrix")
            continue
        is_stack = match["module"] in tensors.stacks
        found = tensor.shape[axis] // base[target][0] if is_stack else tensor.shape[axis]
        if found != rank:
            problems.append(f"{name}: rank {found} where the adapter's config says {rank}")
    return problems


def _target_problems(tensors: AdapterTensors, values: dict[str, Any], base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a problem if the modules of LoRA's matrices differ from the config's targets."""
    matches = (PART.fullmatch(name.removeprefix(PREFIX)) for name in tensors.lora)
    found = {tensors.adapted(match) for match in matches if match}
    named = {*targeted(values, base), *targeted_stacks(values, base)}
    embedding, head = vocabulary_of(base).modules
    if values.get("ensure_weight_tying") and embedding in named:
        # PEFT copies what it learnt for the embedding to a tied head.
        found, named = (names - {head} for names in (found, named))
    if found == named:
        return []
    first = min(found ^ named)
    return [
        f"its config and its tensors do not match: {counted(len(found - named), 'module')} too many, "
        f"{len(named - found)} too few, first {first}"
    ]


def _module(match: re.Match[str]) -> str:
    """Return the base's module name of a LoRA tensor."""
    return WRAPPER.sub("", match["module"] + ".").rstrip(".")


def is_of_stack(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a tensor's module holds parameters that a config adapts, by their names alone.

    Args:
        name: in the adapter's file.
        values: the adapter's config.
    """
    match = PART.fullmatch(name.removeprefix(PREFIX))
    given = values.get("target_parameters") or []
    holders = {f".{one}".rpartition(".")[0] for one in ([given] if isinstance(given, str) else given)}
    return match is not None and any(f".{_module(match)}".endswith(holder) for holder in holders if holder)


def check_alone(folder: Path, modules: Mapping[str, Sequence[int]]) -> None:
    """Raise if an adapter's tensors do not match its own config, whatever the base.

    Args:
        folder: PEFT folder.
        modules: result of `own_modules`.

    Raises:
        LoratuneError: lists the problems.
    """
    problems: list[str] = []
    values = settle_patterns(read_config_values(folder), modules, folder)
    tensors = _by_use(folder, values, modules, False, problems)
    for name in list(tensors.lora):  # of which the base has to say how many there are
        if is_of_stack(name, values):
            del tensors.lora[name]
    problems += [*_missing(tensors, values, modules), *_rank_problems(tensors, values, modules)]
    problems += _target_problems(tensors, values, modules)
    if problems:
        raise LoratuneError(f"{folder} is not a complete adapter:\n{bullet_list(problems, limit=5)}", Exit.MODEL)


def _place_problems(tensors: AdapterTensors, base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return replacements without a matching parameter in the base."""
    problems, vocabulary = [], vocabulary_of(base)
    shapes = [(name, tensor.shape) for name, tensor in tensors.whole.items()]
    shapes += [(name, rows.shape) for name, (_, rows) in tensors.rows.items()]
    for name, shape in shapes:
        free = 1 if name in vocabulary else 0  # the number of rows, which was compared with the vocabulary
        if name not in base:
            problems.append(f"{name}: the base has no such parameter")
        elif len(shape) != len(base[name]) or tuple(shape[free:]) != tuple(base[name][free:]):
            problems.append(f"{name}: of shape {list(shape)} for a base of {list(base[name])}")
    return problems


def _vocabulary_problems(tensors: AdapterTensors, base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a problem if training resized the vocabulary and the adapter lacks rows of embedding or head."""
    vocabulary = vocabulary_of(base)
    counts = {name: {(tensors.whole[name].shape if name in tensors.whole else base[name])[0]} for name in vocabulary}
    for name, tensor in tensors.lora.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if f"{module}.weight" in counts and tensor.ndim == 2 and part in ("embedding_A", "B.weight"):
            counts[f"{module}.weight"].add(tensor.shape[1 if part == "embedding_A" else 0])
    for name, (numbers, _) in tensors.rows.items():
        if name in counts:
            counts[name] |= {number + 1 for number in numbers if number >= max(counts[name])}
    sizes = sorted(set().union(*counts.values()))
    if len(sizes) == 1:
        return []
    lacking = [name for name in counts if name not in tensors.whole] or list(counts)
    return [
        f"trained with a resized vocabulary ({' or '.join(map(str, sizes))} rows; the base has "
        f"{base[vocabulary.embedding][0]}), and the rows of {' and '.join(lacking)} are not in the file. Save it again "
        "where it was trained, with PEFT's save_pretrained(…, save_embedding_layers=True)"
    ]


def _missing(tensors: AdapterTensors, values: dict[str, Any], base: Mapping[str, Sequence[int]]) -> list[str]:
    """Return what the config lists as trained and the file lacks."""
    wanted = values.get("modules_to_save") or []
    tokens = values.get("trainable_token_indices") or []
    embedding, _ = vocabulary_of(base).modules
    modules = [wanted] if isinstance(wanted, str) else list(wanted)
    modules += list(tokens) if isinstance(tokens, dict) else [embedding.rpartition(".")[2]] if tokens else []
    held, problems = {*tensors.whole, *tensors.rows}, []
    for module in modules:
        parts = {name for name in {*base} | held if f".{module}." in f".{name}"}
        lost = sorted(parts - held) if parts & held else [module]
        problems += [f"{name} was trained and is not in the file" for name in lost]
    adapted_names = {name.rpartition(".lora_")[0] for name in tensors.lora if name.endswith(".lora_B.weight")}
    if values.get("use_dora"):
        lengths = {name.rpartition(".lora_")[0] for name in tensors.lora if "lora_magnitude_vector" in name}
        problems += [
            f"{name.removeprefix(PREFIX)} was trained with DoRA, and its lora_magnitude_vector is not in the file"
            for name in sorted(adapted_names - lengths)
        ]
    if values.get("bias", "none") != "none":
        adapted = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors.lora}
        biases = [name for name in base if name.endswith(".bias")]
        trained = [name for name in biases if values["bias"] == "all" or name.removesuffix(".bias") in adapted]
        problems += [f"{name} was trained and is not in the file" for name in trained if name not in tensors.whole]
    return problems


def _token_indices(values: dict[str, Any], module: str, count: int, problems: list[str]) -> list[int]:
    """Return the ids of the tokens whose rows an adapter trains."""
    given = values.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(given, list) or len(given) != count:
        problems.append(f"{module}: trainable_token_indices does not say which {counted(count, 'trained row')} it has")
        return []
    return given
