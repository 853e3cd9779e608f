"""Judges driver, GPUs and number types against the build of torch."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.commands import Command
from loratune.console import memory
from loratune.doctor.facts import Failure, Gpu, Machine, RecipeFacts, TorchFacts, Trial
from loratune.doctor.finding import Finding, broken, fine, installing, shell, slower
from loratune.errors import counted
from loratune.model.nvidia import compiled_for

OLDEST_DRIVERS = {13: 580, 12: 525, 11: 450}
"""CUDA → the first driver that runs it, by their major versions."""
BUILDS = ((580, "cu130"), (525, "cu126"))
"""Driver → torch's build that it runs, the newest first."""
OLDER_CARDS = "cu126"
"""The build that still has kernels for cards that CUDA 13 has dropped."""
DRIVERS = "https://www.nvidia.com/drivers"
DRIVER_SAYS = shell("see what the driver says", "nvidia-smi")
REINSTALL = installing("install torch again", "--force-reinstall --no-cache-dir torch>=2.8")


def judge_gpu(machine: Machine, recipe: RecipeFacts | None) -> Iterator[Finding]:
    """Yield findings about the device that training would run on."""
    torch = machine.torch
    if isinstance(torch, Failure):
        yield _unanswered(torch, machine.works_without_gpu)
        return
    if torch.gpus:
        if machine.driver:
            yield fine("driver", f"{machine.driver}, which runs torch {torch.version} (CUDA {torch.cuda})")
        for number, gpu in enumerate(torch.gpus):
            yield _card(number, gpu, torch)
        yield from _products(machine.trials.get("torch"))
        yield _number_types(torch, recipe)
        return
    yield _without(machine, torch)
    yield _processor(torch, recipe)


def _unanswered(failure: Failure, works_without_gpu: bool) -> Finding:
    if not works_without_gpu:
        return broken("torch", f"torch cannot be loaded: {failure.text}", REINSTALL)
    text = f"asking for the GPU fails: {failure.text}. torch itself works; the driver or the GPU does not"
    return broken("GPU", text, DRIVER_SAYS, shell("use the CPU meanwhile", "export CUDA_VISIBLE_DEVICES=-1"))


def _without(machine: Machine, torch: TorchFacts) -> Finding:
    """Judge why torch finds no GPU."""
    if machine.are_gpus_hidden:
        if not machine.has_nvidia_device:
            return fine("GPU", "none; CUDA_VISIBLE_DEVICES would hide it")
        unset = shell("let programs see the GPU", "unset CUDA_VISIBLE_DEVICES")
        return slower("GPU", "CUDA_VISIBLE_DEVICES hides it, so loratune computes on the CPU", unset)
    if not machine.has_nvidia_device:
        if machine.driver is None:
            return fine("GPU", "none; loratune computes on the CPU, which suits small models")
        text = "this machine has an NVIDIA driver, but the container is given no GPU, so loratune computes on the CPU"
        return slower(
            "GPU", text, shell("start the container with the GPUs", "docker run --gpus all IMAGE", IMAGE="yours")
        )
    builds = _builds_for(machine.driver)
    if torch.cuda is None:
        text = f"torch {torch.version} was built without CUDA, so it cannot use the GPU of this machine"
        return broken("torch", text, *builds)
    needed = OLDEST_DRIVERS.get(_major(torch.cuda), 0)
    if machine.driver and _major(machine.driver) < needed:
        text = (
            f"{machine.driver} is older than {needed}, which torch {torch.version} (CUDA {torch.cuda}) needs. Install "
            f"a newer driver ({DRIVERS}), or a build of torch for this one"
        )
        return broken("driver", text, *builds)
    text = f"torch cannot use the GPU of this machine: {torch.reason}. If the driver was updated, restart the machine"
    return broken("GPU", text, DRIVER_SAYS)


def _card(number: int, gpu: Gpu, torch: TorchFacts) -> Finding:
    capability = ".".join(map(str, gpu.capability))
    name, about = f"GPU {number}", f"{gpu.name}, {memory(gpu.memory_bytes)}, compute capability {capability}"
    if torch.runs_on(gpu):
        return fine(name, about)
    known = [at for _, at in compiled_for(torch.architectures)]
    names = ", ".join(f"{major}.{minor}" for major, minor in known)
    text = f"{about}, for which torch {torch.version} has no kernels (it has them for {names})"
    if gpu.capability > max(known):
        return broken(name, text, installing("install a newer torch", "--upgrade torch"))
    return broken(name, text, _build(OLDER_CARDS))


def _products(trial: Trial | Failure | None) -> Iterator[Finding]:
    if isinstance(trial, Failure):
        yield broken("products", f"a product of two matrices on the GPU fails: {trial.text}", REINSTALL)
    elif trial and not trial.is_right:
        text = (
            f"a product of two matrices on the GPU is wrong ({trial}, compared with the CPU's): the GPU or its driver "
            "is damaged"
        )
        yield broken("products", text, DRIVER_SAYS)
    elif trial:
        yield fine("products", "a product of two matrices is the same on the GPU and on the CPU")


def _number_types(torch: TorchFacts, recipe: RecipeFacts | None) -> Finding:
    if all(gpu.has_bfloat16 for gpu in torch.gpus):
        return fine("number type", "bfloat16, which the GPU computes in")
    if recipe and recipe.asks_for_bfloat16:
        text = "the recipe asks for bfloat16, which this GPU only emulates; auto takes float16 here"
        return slower("number type", text, _automatic(recipe))
    return fine("number type", "float16, since this GPU only emulates bfloat16")


def _processor(torch: TorchFacts, recipe: RecipeFacts | None) -> Finding:
    cores = counted(torch.cores, "core")
    if torch.threads < torch.cores:
        text = f"torch uses {torch.threads} of {cores}, as OMP_NUM_THREADS says"
        return slower("CPU", text, shell("use all of them, unless other programs do", "unset OMP_NUM_THREADS"))
    if torch.cpu_has_bfloat16:
        return fine("CPU", f"{cores} computing in bfloat16")
    if recipe and recipe.asks_for_bfloat16:
        text = "the recipe asks for bfloat16, which this CPU only emulates; auto takes float32 here"
        return slower("CPU", text, _automatic(recipe))
    return fine("CPU", f"{cores} computing in float32, since bfloat16 is only emulated")


def _automatic(recipe: RecipeFacts) -> Command:
    flags = "--model.dtype auto --model.compute_dtype auto"
    return shell("leave the type to the machine", f"loratune sft --config {recipe.config} {flags}")


def _builds_for(driver: str | None) -> list[Command]:
    """Return the command that installs a build of torch for a driver; none if it is too old for each."""
    major = _major(driver) if driver else BUILDS[0][0]
    return [_build(build) for oldest, build in BUILDS if major >= oldest][:1]


def _build(name: str) -> Command:
    line = f"--force-reinstall torch>=2.8 --index-url https://download.pytorch.org/whl/{name}"
    return installing("install a build of torch for it", line)


def _major(version: str) -> int:
    number = version.partition(".")[0]
    return int(number) if number.isdecimal() else 0
