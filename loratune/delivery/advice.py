"""Suggests alternatives for adapters that a program cannot use; every suggested command is checked beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from loratune.choices import ServerName
from loratune.commands import Command, free_place, loratune
from loratune.delivery.export.rehearsal import check_merge
from loratune.delivery.merge.job import MergeOptions
from loratune.errors import refusal
from loratune.model.adapter.fitting import check_fits
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.files import QuantizedFolderError, find_base, weight_files
from loratune.model.tying import head_is_tied
from loratune.runs.base_check import check_same_base
from loratune.runs.opening import AdapterSource, base_settings

MERGED = "merge it into its base, and serve the merged model"
FULL_PRECISION = {"MODEL": "the folder of its base in full precision"}
BASE = {"MODEL": "the folder of its base"}


SERVE: dict[ServerName, tuple[str, ...]] = {
    "vllm": ("vllm", "serve"),
    "sglang": ("python", "-m", "sglang.launch_server", "--model-path"),
}
"""How a server is given a model."""


def serve_merged(folder: Path) -> Command:
    """Return the command that serves a merged model: with vLLM where torch has a GPU, with loratune elsewhere."""
    if torch.cuda.is_available():
        return Command("serve it", (*SERVE["vllm"], str(folder)))
    return loratune("serve it", "serve", {"--model": folder})


def instead_of_serving(
    source: AdapterSource, output: Path, model: str | None, force: bool, server: ServerName = "vllm"
) -> tuple[str, list[Command]]:
    """Suggest how to serve an adapter that a server cannot serve unmerged.

    Args:
        source: the adapter.
        output: output folder of the failed export.
        model: location of its base, if given.
        force: accept a different base, or a changed adapter.
        server: the server.

    Returns:
        A sentence, and the commands.
    """
    place = free_place(output)
    options = MergeOptions(model=model, force=force)
    served = Command("then serve it", (*SERVE[server], str(place)))
    why = refusal(lambda: check_merge(source, place, options))
    if why is None:
        return MERGED, [options.command("merge it", source, place), served]
    asked = FULL_PRECISION if isinstance(why, QuantizedFolderError) else None
    if model is None and refusal(lambda: base_settings(source, None)):
        asked = BASE
    if asked:
        merge = replace(options, model="MODEL").command("merge it", source, place)
        return MERGED, [replace(merge, chosen=asked), served]
    told = f"nor can it be merged into its base: {why.message}"
    if refusal(lambda: _check_fits(source, model, force)):
        return told, []
    flags = {"--adapter": source.place, "--base-model": model, "--force": force}
    return told, [loratune("loratune itself serves it", "serve", flags)]


def _check_fits(source: AdapterSource, model: str | None, force: bool) -> None:
    """Raise if an adapter could not be loaded on its base either.

    Raises:
        LoratuneError: with the reason.
    """
    settings = base_settings(source, model)
    base = find_base(settings)
    paths = weight_files(base)
    check_same_base(source, settings.base, base, paths, force)
    shapes = {name: info.shape for name, info in parameter_infos(base).items()}
    check_fits(in_peft_layout(source.adapter, shapes), shapes, head_is_tied(base))
