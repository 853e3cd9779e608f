"""`loratune launch sky`: writes a SkyPilot task."""

from __future__ import annotations

from typing import Annotated

import typer

from loratune.cli.flags import Config, filled
from loratune.cli.launching import (
    Cpus,
    File,
    Gpus,
    GpuType,
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
)
from loratune.cli.options import recipe_options
from loratune.errors import Exit, LoratuneError
from loratune.launch.sky import SkyOptions, sky_task

DOCUMENT = printed("sky")
DETAILS = """\
Takes the recipe and flags of sft, and checks them here. The task is for sky jobs launch: SkyPilot uploads local rows
and models, mounts a bucket for the run folder, and starts the job again when a spot instance is taken away. It is
printed, and nothing is submitted."""


@recipe_options
def command(
    bucket: Annotated[
        str,
        typer.Option(
            "--bucket",
            metavar="url|name",
            callback=one_word,
            help="Bucket for the run: s3://… or gs://…, or a new name.",
        ),
    ],
    install: Annotated[
        str,
        typer.Option(
            "--install",
            metavar="text",
            callback=filled,
            help="loratune as a requirement for pip, such as a git+https URL.",
        ),
    ],
    config: Config = None,
    name: Name = None,
    nodes: Nodes = 1,
    gpus: Gpus = 1,
    gpu_type: GpuType = None,
    cpus: Cpus = None,
    memory: Memory = None,
    infra: Annotated[
        str | None,
        typer.Option(
            "--infra", metavar="text", callback=one_word, help="Where, such as aws/us-east-1; default is anywhere."
        ),
    ] = None,
    spot: Annotated[bool, typer.Option("--spot/--no-spot", help="Use spot instances (default).")] = True,
    retries: Annotated[
        int, typer.Option("--retries", metavar="count", min=0, help="Attempts after an error of the program.")
    ] = 3,
    secrets: Secrets = None,
    file: File = None,
    overwrite: Overwrite = False,
    json: Json = False,
    *,
    flags: dict[str, object],
) -> None:
    if gpus and gpu_type is None:
        raise LoratuneError("SkyPilot chooses instances by the type of GPU; give --gpu-type, or --gpus 0", Exit.USAGE)
    require_gpus(gpus, gpu_type)
    job = described_job(config, flags, name, nodes, gpus, cpus, memory, secrets)
    deliver(DOCUMENT, sky_task(job, SkyOptions(bucket, install, gpu_type, infra, spot, retries)), file, overwrite, json)
