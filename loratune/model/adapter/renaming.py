"""Renames an adapter's modules: its tensors and everything in its config that names modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.adapter.patterns import settle_patterns, targeted, targeted_stacks
from loratune.model.adapter.tensors import PREFIX, WRAPPER
from loratune.model.architecture.served_class import longest_known

BY_PLACE = ("exclude_modules", "layers_pattern", "layers_to_transform")
"""Settings that narrow targets down, which full names do already."""


def renamed_tensors(names: Iterable[str], modules: Mapping[str, str], place: Path) -> dict[str, str]:
    """Return tensor name → its name with the modules' other names.

    Args:
        names: names of an adapter's tensors, in PEFT's form.
        modules: module name → other name.
        place: the adapter's folder, for messages.

    Raises:
        LoratuneError: tensors are of no known module.
    """
    found: dict[str, str] = {}
    strange = []
    for name in names:
        path = name.removeprefix(PREFIX)
        module = longest_known(WRAPPER.sub("", path), modules)
        if module is None or not path.startswith(module):
            strange.append(name)
        else:
            found[name] = f"{PREFIX}{modules[module]}{path.removeprefix(module)}"
    if strange:
        raise LoratuneError(
            f"{place}: {counted(len(strange), 'tensor')} of no module of the base, which no program would apply:\n"
            f"{bullet_list(sorted(strange), limit=5)}",
            Exit.MODEL,
        )
    return found


def renamed_config(
    values: dict[str, Any], base: Mapping[str, Sequence[int]], parameters: Mapping[str, str], place: Path
) -> dict[str, Any]:
    """Return a config with the full names of its targets under their other names.

    Short names and expressions would also match the parts of a larger model that read images.

    Args:
        values: result of `read_config_values`. Patterns of `target_parameters` are of the parameters' names.
        base: parameter name → shape, of the base that the config's names are of.
        parameters: parameter name → other name.
        place: see `renamed_tensors`.

    Raises:
        LoratuneError: see `settle_patterns`.
    """
    modules = {name.rpartition(".")[0]: other.rpartition(".")[0] for name, other in parameters.items()}
    targets = targeted(settle_patterns(values, base, place), base)
    stacks = [name for name in targeted_stacks(values, base) if name in parameters]
    adapted = {name: modules[name] for name in targets} | {name: parameters[name] for name in stacks}
    settled = settle_patterns(values, {f"{name}.weight": () for name in adapted}, place)
    renamed = {key: value for key, value in values.items() if key not in BY_PLACE}
    renamed["target_modules"] = sorted(modules[name] for name in targets)
    if stacks:
        renamed["target_parameters"] = sorted(parameters[name] for name in stacks)
    for key in ("rank_pattern", "alpha_pattern"):
        renamed[key] = {adapted[name]: number for name, number in settled[key].items()}
    return renamed
