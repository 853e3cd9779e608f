"""`loratune launch slurm`: writes an sbatch script."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loratune.cli.flags import Config
from loratune.cli.launching import (
    Cpus,
    File,
    Gpus,
    GpuType,
    Grace,
    Json,
    Memory,
    Name,
    Nodes,
    Overwrite,
    Secrets,
    deliver,
    described_job,
    one_word,
    printed,
    require_gpus,
    words,
)
from loratune.cli.options import recipe_options
from loratune.launch.job import GRACE_SECONDS
from loratune.launch.slurm import SlurmOptions, sbatch_script

DOCUMENT = printed("slurm")
DETAILS = """\
Takes the recipe and flags of sft, and checks them here. The script holds the recipe with absolute paths, starts one
task per GPU, and requeues itself when a signal has stopped the training. It is printed, and nothing is submitted.

The nodes must see the output folder, the data and the Python environment on the same paths as this machine."""


@recipe_options
def command(
    config: Config = None,
    name: Name = None,
    nodes: Nodes = 1,
    gpus: Gpus = 1,
    gpu_type: GpuType = None,
    cpus: Cpus = None,
    memory: Memory = None,
    time: Annotated[
        str, typer.Option("--time", metavar="[days-]hours:minutes:seconds", callback=one_word, help="Time limit.")
    ] = "24:00:00",
    partition: Annotated[
        str | None, typer.Option("--partition", metavar="text", callback=one_word, help="Partition of the cluster.")
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", metavar="text", callback=one_word, help="Account to charge.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch", metavar="option", callback=words, help="Option of sbatch, such as --qos=long. Repeatable."
        ),
    ] = None,
    grace: Grace = GRACE_SECONDS,
    max_requeues: Annotated[
        int, typer.Option("--max-requeues", metavar="count", min=0, help="How often the script requeues its job.")
    ] = 100,
    python: Annotated[
        str,
        typer.Option("--python", metavar="file", help="Python with loratune, on the nodes.", show_default="this one"),
    ] = sys.executable,
    secrets: Secrets = None,
    file: File = None,
    overwrite: Overwrite = False,
    json: Json = False,
    *,
    flags: dict[str, object],
) -> None:
    require_gpus(gpus, gpu_type)
    job = described_job(config, flags, name, nodes, gpus, cpus, memory, secrets)
    options = SlurmOptions(python, time, partition, account, gpu_type, tuple(sbatch or ()), grace, max_requeues)
    deliver(DOCUMENT, sbatch_script(job, options), file, overwrite, json)
