"""What a job needs, whichever scheduler runs it, and the command that it runs."""

from __future__ import annotations

import json
import re
import shlex
import signal
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.commands import Command
from loratune.errors import Exit, counted
from loratune.recipe.sections import Recipe
from loratune.recipe.yaml_reader import write_yaml

PORT = 29500
"""Of the first node, where the processes of several nodes meet."""
CPUS_PER_GPU, MEMORY_PER_GPU = 8, 64
"""Defaults; the memory is in GB. A node without GPUs gets as much as one with a single one."""
GRACE_SECONDS = 120
"""Default of the time from SIGTERM to SIGKILL, for a step and its checkpoint."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a training that SIGTERM has stopped, after its checkpoint."""
HOPELESS = (Exit.USAGE, Exit.DATA, Exit.MODEL, Exit.DIVERGED)
"""Exit codes that another attempt would end with too."""
LINE = 116


@dataclass(frozen=True)
class Job:
    """A training run on a cluster."""

    name: str
    """Letters, digits and hyphens."""
    recipe: Recipe
    """As given, with paths of this machine."""
    nodes: int
    gpus: int
    """Of each node; 0 trains on CPUs."""
    cpus: int
    """Of each node."""
    memory: int
    """Of each node, in GB."""
    secrets: tuple[str, ...] = ()
    """Names of environment variables that the scheduler gets from its own store."""

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def saved_every(self) -> str:
        """The steps between two checkpoints, which is how many may have to be made again."""
        return counted(self.recipe.checkpoints.every_steps, "step")


@dataclass(frozen=True)
class JobFile:
    """A file for a scheduler."""

    text: str
    submit: Command
    """With the placeholder FILE."""
    moved: dict[str, str]
    """Path on this machine → path in the job."""


def sft_words(recipe: str) -> list[str]:
    """Return the arguments of loratune in a job: the same whether it starts or goes on.

    Args:
        recipe: path of the recipe in the job.
    """
    return ["sft", "--config", recipe, "--resume", "auto"]


def own_processes(job: Job) -> list[str]:
    """Return the flags with which loratune starts a process per GPU of one node."""
    # A number, not auto: a job that gets fewer GPUs the next time would be refused when it resumes.
    return ["--gpus", str(job.gpus)] if job.gpus > 1 else []


def torchrun_words(job: Job, node: str, first_host: str, grace_seconds: int) -> list[str]:
    """Return the beginning of a command that starts a node's processes, up to the module that they run.

    Args:
        job: the job; of several nodes.
        node: number of the node, or a variable that holds it.
        first_host: name of the first node, or a variable that holds it.
        grace_seconds: time from SIGTERM to SIGKILL.
    """
    return [
        *("torchrun", "--nnodes", str(job.nodes), "--nproc-per-node", str(job.processes_per_node)),
        # Fixed numbers, so that the first process, which writes and prints, is always on the first node.
        *("--node-rank", node, "--master-addr", first_host, "--master-port", str(PORT)),
        *("--shutdown-timeout", str(grace_seconds), "-m", "loratune"),
    ]


def recipe_text(recipe: Recipe) -> str:
    """Return the settings that were given, as YAML."""
    # Only those: a setting that is absent differs from its default where an earlier version began the run.
    given = recipe.model_dump(exclude_unset=True)
    return write_yaml({name: value for name, value in given.items() if value != {}})


def heredoc(path: str, text: str) -> str:
    """Return a shell command that writes a text to a file.

    Args:
        path: the file, as a word of the shell.
        text: whole lines.
    """
    mark = "RECIPE"
    while mark in text.splitlines():
        mark += "_"
    return f"cat > {path} <<'{mark}'\n{text}{mark}"


def quoted(text: str) -> str:
    """Return a string as a YAML scalar; without quotes, `null`, `on` or `1e3` would be something else."""
    return json.dumps(text, ensure_ascii=False)


def commented(*paragraphs: str, indent: int = 0) -> str:
    """Return paragraphs as comment lines."""
    margin = " " * indent
    return "\n".join(
        textwrap.fill(
            paragraph, LINE, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ", break_long_words=False
        )
        for paragraph in paragraphs
    )


def shell_command(words: Sequence[str], per_line: int = 100) -> str:
    """Return a command over several lines; words that begin with $ are variables and are put in double quotes."""
    first, *rest = [f'"{word}"' if re.match(r"\$\w", word) else shlex.quote(word) for word in words]
    lines, line = list[str](), first
    for word in rest:
        if len(line) + len(word) > per_line and word.startswith("-"):
            lines.append(line)
            line = f"    {word}"
        else:
            line += f" {word}"
    return " \\\n".join([*lines, line])
