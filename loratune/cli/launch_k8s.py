"""`loratune launch k8s`: writes the objects of a Kubernetes job."""

from __future__ import annotations

from typing import Annotated

import typer

from loratune.cli.flags import Config
from loratune.cli.launching import (
    Cpus,
    File,
    Gpus,
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
)
from loratune.cli.options import recipe_options
from loratune.errors import Exit, LoratuneError
from loratune.launch.job import GRACE_SECONDS
from loratune.launch.kubernetes import KubernetesOptions, kubernetes_objects

DOCUMENT = printed("k8s")
DETAILS = """\
Takes the recipe and flags of sft, and checks them here. Writes a TrainJob of Kubeflow Trainer with a runtime of its
own, or with --plain an ordinary Job; also the recipe, and a volume claim for the run unless --volume names one. Pods
that are preempted are replaced without being counted as failures. The objects are printed, and nothing is submitted."""


@recipe_options
def command(
    image: Annotated[
        str, typer.Option("--image", metavar="text", callback=one_word, help="Container image that has loratune.")
    ],
    config: Config = None,
    name: Name = None,
    plain: Annotated[bool, typer.Option("--plain", help="An ordinary Job, without Kubeflow Trainer.")] = False,
    nodes: Nodes = 1,
    gpus: Gpus = 1,
    cpus: Cpus = None,
    memory: Memory = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", metavar="text", callback=one_word, help="Namespace of the objects.")
    ] = None,
    volume: Annotated[
        str | None,
        typer.Option("--volume", metavar="claim", callback=one_word, help="Existing claim; default makes one."),
    ] = None,
    storage: Annotated[
        int | None,
        typer.Option("--storage", metavar="GB", min=1, help="Size of the claim that is made.", show_default="100"),
    ] = None,
    mount: Annotated[
        str, typer.Option("--mount", metavar="folder", callback=one_word, help="Where the volume is in the job.")
    ] = "/workspace",
    retries: Annotated[
        int, typer.Option("--retries", metavar="count", min=0, help="Attempts after an error of the program.")
    ] = 10,
    grace: Grace = GRACE_SECONDS,
    secrets: Secrets = None,
    from_secret: Annotated[
        str | None,
        typer.Option(
            "--from-secret",
            metavar="text",
            callback=one_word,
            help="Secret with a key for each --secret.",
            show_default="loratune",
        ),
    ] = None,
    file: File = None,
    overwrite: Overwrite = False,
    json: Json = False,
    *,
    flags: dict[str, object],
) -> None:
    if not mount.startswith("/") or mount == "/":
        raise typer.BadParameter("give an absolute path", param_hint="--mount")
    if volume is not None and storage is not None:
        raise LoratuneError("--storage is the size of a new claim, and --volume names an existing one", Exit.USAGE)
    if from_secret is not None and not secrets:
        raise LoratuneError("--from-secret is where --secret comes from; give --secret too", Exit.USAGE)
    job = described_job(config, flags, name, nodes, gpus, cpus, memory, secrets)
    options = KubernetesOptions(
        image, namespace, volume, storage or 100, mount.rstrip("/"), from_secret or "loratune", retries, grace, plain
    )
    deliver(DOCUMENT, kubernetes_objects(job, options), file, overwrite, json)
