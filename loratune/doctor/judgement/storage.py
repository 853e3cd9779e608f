"""Judges main memory, and the folders that loratune writes to."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.commands import Command
from loratune.console import memory
from loratune.doctor.facts import Failure, HubFacts, Machine, Place, TorchFacts
from loratune.doctor.finding import Finding, broken, fine, shell

LEAST_BYTES = {"output": 1e9, "model cache": 1e9, "row cache": 2e8, "temporary files": 1e8}
"""Place → free space below which a small run would fail."""
LEAST_MEMORY_BYTES = 2e9
"""torch and transformers alone take about one."""


def judge_storage(machine: Machine) -> Iterator[Finding]:
    """Yield findings about memory and each folder."""
    if isinstance(machine.torch, TorchFacts):
        free = machine.torch.free_memory_bytes
        if free < LEAST_MEMORY_BYTES:
            most = shell("see what takes it", "ps --sort=-rss -eo rss,pid,user,comm")
            yield broken("memory", f"{memory(free)} are free, less than torch and a small model take", most)
        else:
            yield fine("memory", f"{memory(free)} are free")
    for name, place in machine.places.items():
        yield _judged(name, place, _needed(name, machine.hub))


def _needed(name: str, hub: HubFacts | Failure) -> float:
    to_download = hub.base_bytes if isinstance(hub, HubFacts) and name == "model cache" else None
    return max(LEAST_BYTES[name], to_download or 0)


def _judged(name: str, place: Place | Failure, needed: float) -> Finding:
    if isinstance(place, Failure):
        text = f"the disk does not answer: {place.text}" if place.is_crash else place.text
        return broken(name, text, *_elsewhere(name))
    if place.reason:
        return broken(name, f"{place.path}: a file cannot be written: {place.reason}", *_elsewhere(name))
    if place.free_bytes < needed:
        text = f"{place.path}: {memory(place.free_bytes)} are free, and at least {memory(needed)} are needed"
        return broken(name, text, *_elsewhere(name))
    return fine(name, f"{place.path}, {memory(place.free_bytes)} are free")


def _elsewhere(name: str) -> list[Command]:
    """Return the commands that free space for something, or put it on another disk."""
    folder = {"FOLDER": "on another disk"}
    match name:
        case "output":
            return [
                shell("write to another disk", "loratune sft --config RECIPE --output FOLDER", RECIPE="yours", **folder)
            ]
        case "model cache":
            return [
                shell("remove downloads that have not ended and old revisions", "hf cache prune"),
                shell("keep models on another disk", "export HF_HOME=FOLDER", **folder),
            ]
        case "row cache":
            return [shell("keep encoded rows on another disk", "export LORATUNE_CACHE=FOLDER", **folder)]
        case _:
            return [shell("use another folder", "export TMPDIR=FOLDER", **folder)]
