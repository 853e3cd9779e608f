"""Judges the files that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.commands import Command
from loratune.console import memory
from loratune.doctor.facts import BaseFacts, Failure, HubFacts, Machine, RecipeFacts
from loratune.doctor.finding import Finding, broken, fine, shell
from loratune.errors import Exit, counted

SHOWN = 5


def judge_recipe(recipe: RecipeFacts, machine: Machine) -> Iterator[Finding]:
    """Yield findings about base, tokenizer, template and rows."""
    yield _base(recipe, machine)
    if isinstance(recipe.files, Failure) or recipe.files.folder:
        if recipe.template:
            text = recipe.template.text
            yield broken("template", text, *_fetch(recipe), exit_code=Exit.MODEL)
        else:
            yield fine("template", "the tokenizer can be loaded, and its template renders a question")
    for source, state in recipe.rows.items():
        if isinstance(state, Failure):
            text = state.text if source in state.text else f"{source}: {state.text}"
            check = shell("see all that is wrong with the rows", f"loratune data check --config {recipe.config}")
            yield broken("rows", text, check, exit_code=Exit.DATA)
        elif state:
            yield fine("rows", f"{source} can be read")
        else:
            yield fine("rows", f"{source} comes from a hub, and is downloaded by sft")


def _base(recipe: RecipeFacts, machine: Machine) -> Finding:
    files = recipe.files
    if isinstance(files, Failure) and files.kind == "refused":
        line = f"loratune sft --config {recipe.config} --model.base MODEL"
        another = shell("name another one", line, MODEL="a folder, or a hub id")
        return broken("base", files.text, another, exit_code=Exit.MODEL)
    if isinstance(files, Failure):
        return broken("base", f"{recipe.base}: {files.text}", *_fetch(recipe), exit_code=Exit.MODEL)
    if files.folder is None:
        return _elsewhere(recipe, files, machine.hub)
    problems = [*files.problems]
    if files.pointers:
        names = ", ".join(files.pointers)
        problems.append(f"{names}: Git LFS has left pointers here, not the weights")
    if not problems:
        checked = f", {counted(files.compared, 'file')} with the hub's sha256" if files.compared else ""
        return fine("base", f"{files.folder}: complete, {memory(files.weight_bytes)} of weights{checked}")
    if files.unfinished:
        problems.append(f"a download has not ended: {_listed(files.unfinished)}")
    pulled = [shell("fetch them", f"git -C {files.folder} lfs pull")] if files.pointers else []
    remedies = pulled or _fetch(recipe)
    return broken("base", "\n".join(problems), *remedies, exit_code=Exit.MODEL)


def _elsewhere(recipe: RecipeFacts, files: BaseFacts, hub: HubFacts | Failure) -> Finding:
    if files.unfinished:
        text = f"{recipe.base}: a download has not ended: {_listed(files.unfinished)}"
        return broken("base", text, *_fetch(recipe), exit_code=Exit.MODEL)
    size = f" ({memory(hub.base_bytes)})" if isinstance(hub, HubFacts) and hub.base_bytes else ""
    return fine("base", f"{recipe.base} is not on this machine yet; sft downloads it from {recipe.hub}{size}")


def _fetch(recipe: RecipeFacts) -> list[Command]:
    """Return the command that fetches what is missing of a base, and keeps what is whole."""
    client = "modelscope" if recipe.hub == "modelscope" else "hf"
    if recipe.is_from_hub:
        verified = [shell("see which files differ", f"hf cache verify {recipe.base}")] if client == "hf" else []
        return [shell("fetch what is missing", f"{client} download {recipe.base}"), *verified]
    place = "--local_dir" if client == "modelscope" else "--local-dir"
    words = (client, "download", "ORG/NAME", place, recipe.base)
    return [Command("fetch what is missing", words, {"ORG/NAME": "its name on the hub"})]


def _listed(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
