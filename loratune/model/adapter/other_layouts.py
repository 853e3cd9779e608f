"""Reads adapters of other programs: translates their files to PEFT's layout, with the names of the base's modules.

Read are adapters with another beginning of module names, as for a model with parts for images; names without PEFT's
prefix or with an adapter's name in them; adapters of each matrix in a stack by itself, or of all in one tensor, where
one side may be shared; separate adapters of parts of a matrix; and stacks as PEFT wrote them before 0.19, with their
sides exchanged. Tinker, NeMo Automodel and Megatron Bridge write these layouts according to their sources; no file of
theirs was at hand.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loratune import console
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.adapter.completeness import tensor_shapes
from loratune.model.adapter.files import CONFIG_FILE, WEIGHTS_FILE, read_config_values
from loratune.model.adapter.foreign_file import ForeignFile, peft_name
from loratune.model.adapter.foreign_names import renamed_prefix, replaced
from loratune.model.adapter.joined_pairs import Pair, exchanged
from loratune.model.adapter.patterns import settle_patterns, targeted_stacks
from loratune.model.adapter.renaming import BY_PLACE
from loratune.model.adapter.shares import Share, Whole, whole_of
from loratune.model.adapter.tensors import PREFIX, rank_and_alpha
from loratune.model.adapter.values import check_weights, scaling
from loratune.writing import write_json

PATTERNS = ("rank_pattern", "alpha_pattern")
_translated: dict[tuple[object, ...], Path] = {}
"""Translations of this process, which go away with it."""


def in_peft_layout(folder: Path, base: Mapping[str, Sequence[int]]) -> Path:
    """Return a folder with an adapter in PEFT's layout: the given one, or a temporary translation of it.

    Args:
        folder: the adapter's folder. One that PEFT has written for this base is returned, and so is a damaged one.
        base: parameter name → shape, of the base.

    Raises:
        LoratuneError: the layout is none that loratune reads, or its tensors do not fit together.
    """
    try:
        shapes = tensor_shapes(folder)
    except LoratuneError:
        return folder
    file = ForeignFile.of(folder, shapes, base)
    if file.is_peft_s or not (folder / CONFIG_FILE).is_file():
        return folder
    stats = [place.stat() for place in (folder / WEIGHTS_FILE, folder / CONFIG_FILE)]
    key = (folder.absolute(), *((stat.st_mtime_ns, stat.st_size) for stat in stats), hash(frozenset(base)))
    if key not in _translated:
        prefix = renamed_prefix(file.sizes, file.places, folder)
        if prefix is None and file.has_peft_s_names:
            return folder  # which does not fit this base; whoever asked tells why
        check_weights(folder)
        place = Path(tempfile.mkdtemp(prefix="loratune-"))
        atexit.register(_remove, place, os.getpid())
        _translate(file, prefix, place)
        _translated[key] = place
        console.warn(
            f"{folder}: its tensors are named otherwise than PEFT names them for this base; they are translated"
        )
    return _translated[key]


def _remove(place: Path, process: int) -> None:
    if os.getpid() == process:  # not at the end of a process that was forked from it
        shutil.rmtree(place, ignore_errors=True)


def _translate(file: ForeignFile, prefix: tuple[str, str] | None, place: Path) -> None:
    """Write an adapter in PEFT's layout.

    Args:
        file: the adapter.
        prefix: result of `renamed_prefix`.
        place: an empty folder.

    Raises:
        LoratuneError: see `in_peft_layout`.
    """
    if prefix is None:
        raise _unknown(file, [name for name, one in file.lora.items() if one.matrix.target not in file.places])
    values, tensors = read_config_values(file.folder), load_file(file.folder / WEIGHTS_FILE)
    targets = {name: _placed(one.matrix.target, file, prefix) for name, one in file.lora.items()}
    written, wholes = _others(file, tensors, prefix), _wholes(file, values, tensors, targets)
    for name, one in file.lora.items():
        if not one.matrix.is_share:
            written[peft_name(targets[name], one.side, one.inner)] = tensors[name]
    named = replace(file, lora={name: replace(one, module=targets[name]) for name, one in file.lora.items()})
    if named.has_exchanged_sides:
        _exchange(named, written)
    for target, whole in wholes.items():
        module, inner = _wrapped(target, list(wholes), file)
        written |= {peft_name(module, "A", inner): whole.pair.down, peft_name(module, "B", inner): whole.pair.up}
    save_file({name: values.contiguous() for name, values in written.items()}, place / WEIGHTS_FILE, {"format": "pt"})
    write_json(place / CONFIG_FILE, _config(file, values, prefix, targets, wholes))


def _placed(target: str, file: ForeignFile, prefix: tuple[str, str]) -> str:
    return target if target in file.places else str(replaced(target, prefix))


def _others(file: ForeignFile, tensors: Mapping[str, torch.Tensor], prefix: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors that are not LoRA's matrices, such as modules trained in full."""
    names = [name for name in tensors if name not in file.lora]
    if strange := [name for name in names if not name.startswith(PREFIX)]:
        raise _unknown(file, strange)
    renamed = {name: replaced(name.removeprefix(PREFIX), prefix) for name in names}
    return {f"{PREFIX}{new}" if new else name: tensors[name] for name, new in renamed.items()}


def _wholes(
    file: ForeignFile, values: dict[str, Any], tensors: Mapping[str, torch.Tensor], targets: Mapping[str, str]
) -> dict[str, Whole]:
    """Return the LoRA of each target that the file has in parts."""
    modules = {one.module: (one.matrix, targets[name]) for name, one in file.lora.items() if one.matrix.is_share}
    names = {(one.module, one.side): name for name, one in file.lora.items()}
    settled = settle_patterns(values, {f"{module}.weight": () for module in modules}, file.folder)
    shares = defaultdict[str, list[Share]](list)
    for module, (matrix, target) in modules.items():
        if lacking := [side for side in "AB" if (module, side) not in names]:
            raise _unknown(file, [f"{module} without lora_{lacking[0]}"])
        down, up = (tensors[names[module, side]] for side in "AB")
        given = rank_and_alpha(settled, module)
        shares[target].append(Share(matrix, down, up, scaling(given.alpha, given.rank, values)))
    return {target: whole_of(target, found, file.places[target], file.folder) for target, found in shares.items()}


def _wrapped(target: str, targets: list[str], file: ForeignFile) -> tuple[str, int]:
    """Return the module that PEFT wraps for LoRA on a target, and how often for those that come after it."""
    module = target.rpartition(".")[0]
    stacks = [stack for stack in file.stacks_of(module) if stack in targets]
    return (module, len(stacks) - 1 - stacks.index(target)) if target in stacks else (target, 0)


def _exchange(file: ForeignFile, written: dict[str, torch.Tensor]) -> None:
    """Exchange the sides of LoRA on stacks in the tensors to be written."""
    for module, inner in {(one.module, one.inner) for one in file.lora.values()}:
        if stack := file.stack_of(module, inner):
            down, up = (peft_name(module, side, inner) for side in "AB")
            written[down], written[up] = exchanged(Pair(written[down], written[up]), file.places[stack][0])


def _config(
    file: ForeignFile,
    values: dict[str, Any],
    prefix: tuple[str, str],
    targets: Mapping[str, str],
    wholes: Mapping[str, Whole],
) -> dict[str, Any]:
    """Return the config with the names and ranks of what is written."""
    own = {one.module: targets[name] for name, one in file.lora.items() if not one.matrix.is_share}
    # As the file would name them, since its config does.
    stacks = {replaced(name, prefix[::-1]) or name: name for name, shape in file.places.items() if len(shape) == 3}
    shapes = {name: file.places[stack] for name, stack in stacks.items()}
    adapted = {name: stacks[name] for name in targeted_stacks(values, shapes)}
    named = {name: target for name, target in (own | adapted).items() if file.places[target]}
    settled = settle_patterns(values, {f"{name}.weight": () for name in named}, file.folder)
    ranks, alphas = ({named[name]: number for name, number in settled[key].items()} for key in PATTERNS)
    for target, whole in wholes.items():
        factor = whole.rank**0.5 if values.get("use_rslora") else whole.rank
        ranks[target], alphas[target] = whole.rank, whole.scaling * factor
    both = {*named.values(), *wholes}
    modules, parameters = (sorted(name for name in both if len(file.places[name]) == sides) for sides in (2, 3))
    config = {key: value for key, value in values.items() if key not in BY_PLACE}
    config |= {"target_modules": modules, "rank_pattern": ranks, "alpha_pattern": alphas}
    config |= {"target_parameters": parameters} if parameters else {}
    if file.has_peft_s_names and isinstance(targeted := values.get("target_modules"), list):
        # They stay, so that a tensor that is missing is noticed.
        placed = ((name, replaced(name, prefix)) for name in targeted)
        config |= {key: values[key] for key in BY_PLACE if key in values}
        config["target_modules"] = [new if new in file.places else name for name, new in placed]
    return config


def _unknown(file: ForeignFile, names: list[str]) -> LoratuneError:
    return LoratuneError(
        f"{file.folder}: {counted(len(names), 'tensor')} with names of no layout that loratune reads, or of no module "
        f"of the base:\n{bullet_list(sorted(names), limit=5)}\n"
        "convert the adapter to PEFT's layout with the program that wrote it",
        Exit.MODEL,
    )
