"""Judges the packages with kernels, each by what it has computed, and the attention that is used with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loratune.commands import Command
from loratune.doctor.facts import Failure, Machine, PackingFacts, RecipeFacts, TorchFacts, Trial
from loratune.doctor.finding import Finding, broken, fine, installing, shell, slower
from loratune.errors import Exit
from loratune.model.nvidia import FLASH_CAPABILITY


@dataclass(frozen=True)
class Package:
    """A package that loratune or transformers compute with."""

    use: str
    """What it is for."""
    install: str
    is_left_out: bool = False
    """Whether loratune goes on without it where it raises an error; transformers does not."""
    is_for_recurrent: bool = False
    """Whether only models with recurrent layers have a use for it."""


PACKAGES = {
    "bitsandbytes": Package("nf4, int8 and 8-bit optimizers", "bitsandbytes>=0.49"),
    "liger-kernel": Package("norms and MLPs in fewer passes", "loratune[gpu]", is_left_out=True),
    "flash-attn": Package("attention", "flash-attn --no-build-isolation"),
    "flash-linear-attention": Package("recurrent layers", "flash-linear-attention", is_for_recurrent=True),
    "causal-conv1d": Package("recurrent layers", "causal-conv1d --no-build-isolation", is_for_recurrent=True),
}


def judge_packages(machine: Machine) -> Iterator[Finding]:
    """Yield findings about each package."""
    for name in PACKAGES:
        version = machine.packages.get(name)
        yield _missing(name, machine) if version is None else _tried(name, version, machine.trials.get(name))


def judge_attention(machine: Machine, recipe: RecipeFacts | None) -> Iterator[Finding]:
    """Yield findings about the attention of a model, and whether packed rows are apart with it.

    Args:
        machine: the facts.
        recipe: the recipe that the model is the base of; None for the practice model.
    """
    found, sft = machine.packing, f"loratune sft --config {recipe.config if recipe else 'quickstart'}"
    if found is None:
        return
    if isinstance(found, Failure):
        text = f"a model cannot be loaded and run: {found.text}"
        is_base_at_fault = recipe is not None and not _is_out_of_memory(found)
        code = Exit.MODEL if is_base_at_fault else Exit.IO
        yield broken("model", text, *_for_failure(found, sft, machine), exit_code=code)
        return
    yield _attention(found, sft, machine)
    if found.is_packed:
        yield fine("packed rows", f"{found.reason} ({found.dtype})")
    elif found.is_packed is False:
        yield slower("packed rows", found.reason, *_recurrent_kernels(found, machine))


def _for_failure(failure: Failure, sft: str, machine: Machine) -> list[Command]:
    if _is_out_of_memory(failure):
        return [shell("quantise the base", f"{sft} --model.quantization nf4")]
    whole = shell("see the whole error", f"{sft} --debug")
    if failure.kind == "refused":
        return [whole]
    # Packages that transformers calls wherever they are installed.
    names = (name for name in ("flash-attn", *_for_recurrent()) if machine.packages.get(name))
    return [*map(_uninstall, names), whole]


def _is_out_of_memory(failure: Failure) -> bool:
    return failure.text.startswith("out of memory")


def _attention(found: PackingFacts, sft: str, machine: Machine) -> Finding:
    is_by_document = found.is_packed and found.attention.startswith(("sdpa", "eager"))
    if not is_by_document or not _capable(machine) or "recipe says" in found.attention:
        return fine("attention", found.attention)
    if found.dtype == "float32":
        return slower("attention", found.attention, shell("compute in 16 bits", f"{sft} --model.dtype auto"))
    missing = [_install("flash-attn")] if machine.packages.get("flash-attn") is None else []
    return slower("attention", found.attention, *_recurrent_kernels(found, machine), *missing)


def _recurrent_kernels(found: PackingFacts, machine: Machine) -> list[Command]:
    """Return the commands that install the missing kernels for a model's recurrent layers."""
    missing = [name for name in _for_recurrent() if found.recurrent_layers and machine.packages.get(name) is None]
    return [_install(name) for name in missing] if _has_gpu(machine) else []


def _missing(name: str, machine: Machine) -> Finding:
    package = PACKAGES[name]
    if name == "bitsandbytes":
        return broken(name, "not installed, and model.quantization needs it", _install(name))
    if not _has_gpu(machine):
        return fine(name, "not installed; only GPUs have a use for it")
    if package.is_for_recurrent:
        if isinstance(machine.packing, PackingFacts) and machine.packing.recurrent_layers:
            text = "not installed; the recurrent layers of this model run without its kernels"
            return slower(name, text, _install(name))
        return fine(name, "not installed; only models with recurrent layers have a use for it")
    if name == "flash-attn":
        return fine(name, "not installed; torch has a kernel for packed rows itself")
    return slower(name, f"not installed ({package.use})", _install(name))


def _tried(name: str, version: str, trial: Trial | Failure | None) -> Finding:
    package = PACKAGES[name]
    if trial is None:
        return fine(name, f"{version}, not tried")
    if isinstance(trial, Trial) and trial.is_right:
        done = "computes what torch does" if trial.has_computed else "can be imported; it is not used on this machine"
        return fine(name, f"{version}, {done} ({package.use})")
    if isinstance(trial, Failure):
        reason, is_left_out = f"fails here: {trial.text}", package.is_left_out and not trial.is_crash
    else:
        reason, is_left_out = f"computes something else than torch: {trial}", package.is_left_out
    if is_left_out:
        return slower(name, f"{version} {reason}; loratune does without it", _install(name, again=True))
    if name == "bitsandbytes":
        return broken(name, f"{version} {reason}", _install(name, again=True))
    return broken(name, f"{version} {reason}", _uninstall(name), _install(name, again=True))


def _install(name: str, again: bool = False) -> Command:
    option = "--force-reinstall --no-deps " if again else ""
    wanted = PACKAGES[name].install if not again else PACKAGES[name].install.replace("loratune[gpu]", name)
    return installing("install it again" if again else "install it", f"{option}{wanted}")


def _uninstall(name: str) -> Command:
    return shell("do without it", f"pip uninstall {name}")


def _for_recurrent() -> list[str]:
    return [name for name, package in PACKAGES.items() if package.is_for_recurrent]


def _has_gpu(machine: Machine) -> bool:
    return isinstance(machine.torch, TorchFacts) and bool(machine.torch.gpus)


def _capable(machine: Machine) -> bool:
    """Whether torch has a kernel for all documents of a row on the GPU."""
    return isinstance(machine.torch, TorchFacts) and any(
        gpu.capability >= FLASH_CAPABILITY for gpu in machine.torch.gpus
    )
