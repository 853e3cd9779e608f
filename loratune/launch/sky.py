"""A SkyPilot task for a managed job on spot instances."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from loratune.commands import Command
from loratune.launch.job import (
    GRACE_SECONDS,
    STOPPED,
    Job,
    JobFile,
    commented,
    heredoc,
    own_processes,
    quoted,
    recipe_text,
    sft_words,
    shell_command,
    torchrun_words,
)
from loratune.launch.paths import below, placed

RUNS = "/loratune-runs"
"""Where the bucket is mounted."""
FILES = "loratune-files"
"""Where the recipe and its inputs lie, in the home folder."""


@dataclass(frozen=True)
class SkyOptions:
    """What SkyPilot alone asks for."""

    bucket: str
    """A URL such as s3://name, or the name of a bucket that SkyPilot makes."""
    install: str
    """The requirement that pip is given."""
    gpu_type: str | None = None
    infra: str | None = None
    is_spot: bool = True
    retries: int = 3


def sky_task(job: Job, options: SkyOptions) -> JobFile:
    """Return a task whose run folder is in a bucket, and whose inputs SkyPilot uploads."""
    files = placed(job.recipe, lambda path: f"~/{FILES}/{path.name}", below(RUNS, job.recipe.output, "."), RUNS)
    recipe = f"$HOME/{FILES}/recipe.yaml"
    parts = [
        _about(job, files.recipe.output),
        f"name: {quoted(job.name)}",
        _resources(job, options),
        f"num_nodes: {job.nodes}",
        _mounts(options, files.moved),
        _secrets(job),
        "setup: |\n" + textwrap.indent(shell_command(["pip", "install", options.install]), "  "),
        _run(job, recipe, recipe_text(files.recipe)),
    ]
    submit = Command("submit it", ("sky", "jobs", "launch", *(f"--secret={name}" for name in job.secrets), "FILE"))
    return JobFile("\n\n".join(part for part in parts if part) + "\n", submit, files.moved)


def _about(job: Job, output: str) -> str:
    return commented(
        f"Trains {output} as a managed job: sky jobs launch FILE. When an instance is taken away, SkyPilot starts the "
        "job on others, and --resume auto goes on from the newest whole checkpoint in the bucket; there is one every "
        f"{job.saved_every}.",
    )


def _resources(job: Job, options: SkyOptions) -> str:
    lines = [
        f"infra: {quoted(options.infra)}" if options.infra else "",
        # A fixed number, since a run is not resumed with another one.
        f"accelerators: {quoted(f'{options.gpu_type}:{job.gpus}')}" if job.gpus else "",
        f"cpus: {job.cpus}+",
        f"memory: {job.memory}+",
        f"use_spot: {str(options.is_spot).lower()}",
    ]
    recovery = ["job_recovery:", f"  max_restarts_on_errors: {options.retries}"]
    if job.nodes == 1:  # torchrun ends with 1, whatever stopped it
        about = f"{STOPPED} means that SIGTERM stopped the training after a step; this is not counted."
        recovery += [commented(about, indent=2), f"  recover_on_exit_codes: [{STOPPED}]"]
    return "resources:\n" + textwrap.indent("\n".join([*filter(None, lines), *recovery]), "  ")


def _mounts(options: SkyOptions, moved: dict[str, str]) -> str:
    key = "source" if "://" in options.bucket else "name"
    lines = [
        "file_mounts:",
        commented(
            "The run folder. MOUNT_CACHED, since checkpoints are renamed and metrics appended to, which MOUNT does not "
            "support; SkyPilot waits for its uploads at the end of the job.",
            indent=2,
        ),
        f"  {RUNS}:",
        f"    {key}: {quoted(options.bucket)}",
        "    mode: MOUNT_CACHED",
        *(f"  {quoted(there)}: {quoted(here)}" for here, there in moved.items()),
    ]
    return "\n".join(lines)


def _secrets(job: Job) -> str:
    if not job.secrets:
        return ""
    told = commented("Their values come from --secret NAME of sky jobs launch, which reads the environment.")
    return "\n".join([told, "secrets:", *(f"  {name}: null" for name in job.secrets)])


def _run(job: Job, recipe: str, text: str) -> str:
    words = sft_words(recipe)
    if job.nodes == 1:
        command = shell_command(["loratune", *words, *own_processes(job)])
    else:
        command = shell_command([*torchrun_words(job, "$SKYPILOT_NODE_RANK", "$first", GRACE_SECONDS), *words])
        command = f'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n{command}'
    written = f"mkdir -p ~/{FILES}\n{heredoc(quoted(recipe), text)}"
    # The exit code has to be the training's, and SkyPilot adds commands to the script: no exec, and nothing after it.
    return "run: |\n" + textwrap.indent(f"{written}\n{command}", "  ")
