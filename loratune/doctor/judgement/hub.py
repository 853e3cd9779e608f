"""Judges whether models can be downloaded."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.doctor.facts import Failure, Machine, RecipeFacts
from loratune.doctor.finding import Finding, broken, fine, shell, slower
from loratune.errors import Exit

LOGIN = shell("log in", "hf auth login")
OFFLINE = shell("if it is not to have a network, say so", "export HF_HUB_OFFLINE=1")
PROXY = shell("if it needs a proxy, name it", "export HTTPS_PROXY=http://HOST:PORT", **{"HOST:PORT": "of the proxy"})


def judge_hub(machine: Machine, recipe: RecipeFacts | None) -> Iterator[Finding]:
    """Yield findings about the hub, the token and the recipe's base there."""
    hub = machine.hub
    if recipe and not recipe.needs_hub:
        yield fine("hub", "this recipe needs nothing from Hugging Face that is not on this machine")
        return
    if isinstance(hub, Failure):
        text = f"asking it fails: {hub.text}"
        yield _unreachable(text, recipe) if hub.kind == "timeout" else broken("hub", text, PROXY, OFFLINE)
        return
    if hub.is_offline:
        yield _offline(recipe)
        return
    if hub.reason:
        yield _unreachable(f"{hub.endpoint} does not answer: {hub.reason}", recipe)
        return
    yield fine("hub", f"{hub.endpoint} answers")
    if hub.token == "refused":
        yield broken(
            "token", "the hub refuses it; it may have expired", LOGIN, shell("or do without", "hf auth logout")
        )
    elif hub.token == "none":
        yield fine("token", "none, which models with open access do not need (hf auth login adds one)")
    elif hub.token == "accepted":
        yield fine("token", "the hub accepts it")
    if hub.base_reason and recipe:
        text = f"{recipe.base} cannot be downloaded: {hub.base_reason}"
        yield broken("base", text, LOGIN, exit_code=Exit.MODEL)


def _unreachable(text: str, recipe: RecipeFacts | None) -> Finding:
    if not recipe:
        return slower("hub", f"{text}\nonly models that are on this machine can be used", PROXY, OFFLINE)
    folder = shell(
        "or give a folder", f"loratune sft --config {recipe.config} --model.base FOLDER", FOLDER="of the model"
    )
    return broken("hub", text, PROXY, *([folder] if recipe.needs_base else []))


def _offline(recipe: RecipeFacts | None) -> Finding:
    if recipe:
        text = "HF_HUB_OFFLINE is set, and this recipe needs files that are not on this machine"
        code = Exit.MODEL if recipe.needs_base else Exit.DATA
        return broken("hub", text, shell("allow downloads", "unset HF_HUB_OFFLINE"), exit_code=code)
    return fine("hub", "HF_HUB_OFFLINE is set, so only models on this machine are used")
