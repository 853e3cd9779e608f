"""Measures a machine and the files of a recipe, each part in a process of its own with a time limit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from loratune import console
from loratune.doctor.facts import (
    BaseFacts,
    Failure,
    HubFacts,
    Machine,
    PackingFacts,
    Place,
    RecipeFacts,
    TorchFacts,
    Trial,
    Version,
)
from loratune.doctor.isolated import measured
from loratune.doctor.judgement.packages import PACKAGES
from loratune.doctor.judgement.several_gpus import WITHOUT
from loratune.doctor.judgement.storage import LEAST_BYTES
from loratune.model import nvidia
from loratune.plain_files import is_folder
from loratune.recipe.data_sections import SourceSettings
from loratune.recipe.loading import SHIPPED
from loratune.recipe.sections import TINY_QWEN, ModelSettings, Recipe
from loratune.runs.versions import LIBRARIES, version_of

SECONDS = {
    "torch_facts": 120,
    "trial": 240,
    "exchange": 120,
    "packing": 900,
    "place": 30,
    "hub": 90,
    "hashes": 60,
    "base": 400,
    "template": 180,
    "rows": 120,
}
"""Time limits of processes; importing torch alone takes seconds, and a busy machine takes several times as long."""
SHARED_MEMORY = Path("/dev/shm")
CONSTRAINTS = SHIPPED / "constraints.txt"
DRIVER_VERSION = re.compile(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b")
"""Of NVIDIA's driver, in the file that it shows."""
WITHOUT_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
OTHER_NAMES = {"flash-linear-attention": "fla-core"}
"""Package → one that has the same modules."""


def measure_recipe(recipe: Recipe, config: str) -> RecipeFacts:
    """Measure the files of a recipe. Nothing is downloaded.

    Args:
        recipe: the recipe.
        config: its name, for commands.
    """
    model = recipe.model.model_dump(mode="json")
    base = recipe.model.base
    is_from_hub = base != TINY_QWEN and not is_folder(Path(base).expanduser())
    hashes = _modelscope_hashes(model) if is_from_hub and recipe.model.hub == "modelscope" else {}
    with console.status("examining the base"):
        files = _ask(BaseFacts, "base", settings=model, hashes=hashes)
    is_here = isinstance(files, BaseFacts) and files.folder is not None
    template = None
    if is_here:
        with console.status("trying the tokenizer and the template"):
            tried = _ask(bool, "template", settings=model, prompt=recipe.prompt.model_dump(mode="json"))
        template = tried if isinstance(tried, Failure) else None
    validation = recipe.data.validation if isinstance(recipe.data.validation, list) else []
    with console.status("opening the rows"):
        sources = [*map(_path_of, [*recipe.data.train, *validation])]
        rows = {
            source: measured(
                bool, "rows", {"source": source, "encoding": recipe.data.encoding}, SECONDS["rows"], WITHOUT_NETWORK
            )
            for source in sources
        }
    types = [recipe.model.dtype, *([recipe.model.compute_dtype] if recipe.model.quantization != "none" else [])]
    return RecipeFacts(config, base, recipe.model.hub, is_from_hub, "bfloat16" in types, files, template, rows)


def _modelscope_hashes(model: dict[str, Any]) -> dict[str, str]:
    """Ask ModelScope for the hashes of a base on this machine; none if it does not tell them."""
    with console.status("asking ModelScope for hashes"):
        found = _ask(dict[str, str], "hashes", settings=model)
    return {} if isinstance(found, Failure) else found


def measure_machine(recipe: Recipe | None, facts: RecipeFacts | None) -> Machine:
    """Measure everything about this machine.

    Args:
        recipe: decides about output and model; None for those of the defaults.
        facts: of its files.
    """
    with console.status("asking torch for its devices"):
        torch = _ask(TorchFacts, "torch_facts")
    gpus = len(torch.gpus) if isinstance(torch, TorchFacts) else 0
    packages = {name: version_of(name) or version_of(OTHER_NAMES.get(name, name)) for name in PACKAGES}
    with console.status("asking disks and the hub"):
        output = str(recipe.output) if recipe else "."
        places = {kind: _ask(Place, "place", kind=kind, folder=output) for kind in LEAST_BYTES}
        hub = _hub(recipe, facts)
    machine = Machine(
        driver=_driver(),
        has_nvidia_device=nvidia.DEVICE.exists(),
        are_gpus_hidden=nvidia.are_gpus_hidden(),
        torch=torch,
        works_without_gpu=isinstance(torch, Failure) and nvidia.DEVICE.exists() and _works_without_gpu(),
        packages=packages,
        trials={},
        packing=None,
        places=places,
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        hub=hub,
        exchanges={},
        versions=dict(_versions()),
    )
    if not machine.can_compute:
        return machine
    return replace(
        machine,
        trials=_trials(packages, gpus),
        packing=_packing(recipe, facts),
        exchanges=_exchanges(gpus) if gpus > 1 else {},
    )


def _ask(kind: Any, probe: str, /, **arguments: Any) -> Any:
    return measured(kind, probe, arguments, SECONDS[probe])


def _works_without_gpu() -> bool:
    with console.status("asking torch without the GPU"):
        hidden = {"CUDA_VISIBLE_DEVICES": "-1"}
        return not isinstance(measured(TorchFacts, "torch_facts", {}, SECONDS["torch_facts"], hidden), Failure)


def _trials(packages: dict[str, str | None], gpus: int) -> dict[str, Trial | Failure]:
    trials = {}
    for name in [*(["torch"] if gpus else []), *(name for name, version in packages.items() if version)]:
        with console.status(f"trying {name}"):
            trials[name] = _ask(Trial, "trial", package=name)
    return trials


def _packing(recipe: Recipe | None, facts: RecipeFacts | None) -> PackingFacts | Failure | None:
    """Try two packed rows on the base, or on the practice model; None if the base is not whole."""
    if facts and (isinstance(facts.files, Failure) or not facts.files.is_whole):
        return None
    model = recipe.model if recipe else ModelSettings(base=TINY_QWEN)
    with console.status("running packed rows through the model"):
        settings, is_packed = model.model_dump(mode="json"), recipe is None or recipe.training.packing
        found: PackingFacts | Failure = _ask(PackingFacts, "packing", settings=settings, is_packed=is_packed)
        return found


def _hub(recipe: Recipe | None, facts: RecipeFacts | None) -> HubFacts | Failure:
    is_to_download = facts and recipe and isinstance(facts.files, BaseFacts) and facts.files.folder is None
    asked = recipe.model if is_to_download and recipe and recipe.model.hub == "huggingface" else None
    found: HubFacts | Failure = _ask(
        HubFacts, "hub", base=asked.base if asked else None, revision=asked.revision if asked else None
    )
    return found


def _exchanges(gpus: int) -> dict[str, Trial | Failure]:
    """Try an all-reduce; where it fails, try it again without each way to exchange."""
    with console.status(f"adding up a tensor over {gpus} GPUs"):
        tried = {"": _ask(Trial, "exchange", count=gpus)}
    for variable in WITHOUT if isinstance(tried[""], Failure) else ():
        name, _, value = variable.partition("=")
        with console.status(f"the same with {variable}"):
            tried[variable] = measured(Trial, "exchange", {"count": gpus}, SECONDS["exchange"], {name: value})
    return tried


def _driver() -> str | None:
    """Return the version of NVIDIA's driver."""
    try:
        found = DRIVER_VERSION.search(nvidia.DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _versions() -> Iterator[tuple[str, Version]]:
    """Yield the packages that loratune needs, by their names."""
    tested = _tested_set()
    try:
        wanted = [Requirement(line) for line in requires("loratune") or ()]
    except PackageNotFoundError:  # run from a checkout that is not installed
        wanted = [Requirement(name) for name in LIBRARIES]
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            yield one.name, Version(version_of(one.name), str(one.specifier), tested.get(canonicalize_name(one.name)))


def _tested_set() -> dict[NormalizedName, str]:
    """Return package → version of constraints.txt, which an installed wheel has too."""
    try:
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, _, version in pairs}


def _path_of(source: str | SourceSettings) -> str:
    return source if isinstance(source, str) else source.path
