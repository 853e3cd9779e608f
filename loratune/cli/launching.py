"""The flags of `loratune launch` that all schedulers share, and the writing of the job file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import TypedDict

from loratune import console
from loratune.cli.documents import Document
from loratune.errors import Exit, LoratuneError
from loratune.launch.job import CPUS_PER_GPU, MEMORY_PER_GPU, Job, JobFile
from loratune.printable import shortened
from loratune.recipe.loading import load_recipe
from loratune.writing import check_new_file, write_text

PLAIN_WORD = re.compile(r"[\w.,:;=+@%/*\[\]()&|!~-]+", re.ASCII)
"""What an option of a scheduler may be, so that it is one word of one line."""
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""As Kubernetes names services, and short enough for what it appends."""


def one_word(text: str | None) -> str | None:
    """Reject the value of an option that is not a single word.

    Raises:
        typer.BadParameter: it has spaces, quotes or other characters that a shell or YAML would read.
    """
    if text is not None and not PLAIN_WORD.fullmatch(text):
        raise typer.BadParameter(f"{shortened(text)!r} is not one plain word")
    return text


def words(texts: list[str] | None) -> list[str] | None:
    """Apply `one_word` to each value of an option."""
    return [one_word(text) or "" for text in texts] if texts else texts


def secret_names(names: list[str] | None) -> list[str] | None:
    """Reject what is not the name of an environment variable.

    Raises:
        typer.BadParameter: such as a name with its value.
    """
    for name in names or []:
        if not ENVIRONMENT_NAME.fullmatch(name):
            known = name.partition("=")[0]
            raise typer.BadParameter(f"give the name alone, such as {known if known != name else 'HF_TOKEN'}")
    return names


def _job_name(name: str | None) -> str | None:
    if name is not None and not JOB_NAME.fullmatch(name):
        raise typer.BadParameter("use up to 40 small letters, digits and hyphens; begin with a letter")
    return name


Name = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="text", callback=_job_name, help="Name of the job; default is that of the output folder."
    ),
]
Nodes = Annotated[int, typer.Option("--nodes", metavar="count", min=1, max=1000, help="Number of nodes.")]
Gpus = Annotated[
    int, typer.Option("--gpus", metavar="count", min=0, max=64, help="GPUs of each node; 0 trains on CPUs.")
]
Cpus = Annotated[
    int | None,
    typer.Option("--cpus", metavar="count", min=1, help=f"CPU cores of each node; default is {CPUS_PER_GPU} per GPU."),
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", metavar="GB", min=1, help=f"Memory of each node; default is {MEMORY_PER_GPU} GB per GPU."),
]
GpuType = Annotated[
    str | None, typer.Option("--gpu-type", metavar="text", callback=one_word, help="Type of the GPUs, such as H100.")
]
Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret",
        metavar="variable",
        callback=secret_names,
        help="Environment variable that the job needs, such as HF_TOKEN; its value is never written. Repeatable.",
    ),
]
Grace = Annotated[
    int,
    typer.Option(
        "--grace",
        metavar="seconds",
        min=10,
        max=3600,
        help="Time for a step and its checkpoint after SIGTERM.",
    ),
]
File = Annotated[
    Path | None, typer.Option("--file", "-f", metavar="file", help="Write the job file here, not to stdout.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file, if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print file, text, paths and next command as JSON to stdout.")]


def described_job(
    config: str | None,
    flags: dict[str, object],
    name: str | None,
    nodes: int,
    gpus: int,
    cpus: int | None,
    memory: int | None,
    secrets: list[str] | None,
) -> Job:
    """Return the job of a command line.

    Raises:
        LoratuneError: lists all problems of the recipe.
    """
    recipe = load_recipe(config, dict(flags))
    units = max(1, gpus)
    return Job(
        name or _named_by(recipe.output),
        recipe,
        nodes,
        gpus,
        CPUS_PER_GPU * units if cpus is None else cpus,
        MEMORY_PER_GPU * units if memory is None else memory,
        tuple(secrets or ()),
    )


def require_gpus(gpus: int, gpu_type: str | None) -> None:
    """Raise where a type of GPU is given for none.

    Raises:
        LoratuneError: the flag would have no effect.
    """
    if gpu_type is not None and not gpus:
        raise LoratuneError("--gpu-type is for nodes with GPUs; leave it out with --gpus 0", Exit.USAGE)


def _named_by(output: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", Path(output).name.lower())[:40].strip("-")
    return name if JOB_NAME.fullmatch(name) else f"run-{name}"[:40].strip("-")


class JobFileValues(TypedDict):
    """A job file."""

    file: str | None
    """Where it was written; null if it was not."""
    text: str
    moved: dict[str, str]
    """Path here → path in the job."""
    next: str
    """The command that submits it."""


def printed(scheduler: str) -> Document:
    """Return the document of a command that writes a job file."""
    return Document(f"launch-{scheduler}", 1, lambda: JobFileValues)


def deliver(document: Document, made: JobFile, file: Path | None, overwrite: bool, json: bool) -> None:
    """Print a job file, or write it in one step.

    Raises:
        LoratuneError: see `check_new_file`.
    """
    if file is None and not json and not made.text.isascii() and not console.takes_all_characters():
        raise LoratuneError("standard output cannot take all characters of the job file; give --file", Exit.USAGE)
    if file is not None:
        check_new_file(file, overwrite)
        write_text(file, made.text)
    submit = replace(made.submit, chosen={"FILE": "where you save it"})
    if file is not None:
        submit = replace(made.submit, words=tuple(str(file) if word == "FILE" else word for word in made.submit.words))
    if json:
        name = None if file is None else str(file)
        told: JobFileValues = {"file": name, "text": made.text, "moved": made.moved, "next": submit.line}
        document.write(told)
        return
    if file is None:
        console.write_result(made.text, end="")
    else:
        console.say(f"job file: {file}", style="bold")
    console.next_step(submit)
