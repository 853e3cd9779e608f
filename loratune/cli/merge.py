"""`loratune merge`: merges adapters into their base model and verifies the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune import console
from loratune.choices import Combination, Dtype, MergeBase, listed
from loratune.cli.documents import Document
from loratune.cli.flags import (
    ADAPTER_HELP,
    DryRun,
    Force,
    Json,
    Logits,
    MovedBase,
    Output,
    Overwrite,
    Public,
    Push,
    named_adapters,
)
from loratune.cli.push import push
from loratune.commands import loratune
from loratune.imports import importing
from loratune.sizes import parse_size

if TYPE_CHECKING:
    from loratune.runs.verification import MergedModel

DETAILS = """\
Writes the merged model to a temporary folder, reads it back, and compares it with base + adapter: every weight with
PEFT's own merge, the other files, the logits on validation rows of the run, and some generations. If anything differs,
the result is deleted and the exit code is 4.

Several adapters: --adapter a=out/run1 --adapter b=out/run2 --weights 0.7,0.3 --combine linear"""


def _printed() -> Any:
    from loratune.runs.verification_layout import MergedFile

    return MergedFile


DOCUMENT = Document("merge", 1, _printed)
Adapters = Annotated[
    list[str],
    typer.Option("--adapter", "-a", metavar="folder", help=f"{ADAPTER_HELP} With several: name=folder each."),
]
WeightType = Annotated[
    Dtype | None, typer.Option("--dtype", metavar=listed(Dtype), help="Type of the weights; default is the base's.")
]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="size", help="Largest file, such as 5GB or 900MB.")]
AddedTo = Annotated[
    MergeBase,
    typer.Option(
        "--merge-base",
        metavar=listed(MergeBase),
        help="For an adapter of a quantised base: what it is added to; auto measures both.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="numbers", help="Comma-separated weights of several adapters, in order."),
]
Combine = Annotated[
    Combination,
    typer.Option(
        "--combine",
        metavar=listed(Combination),
        help="How several adapters become one: linear adds their weighted updates exactly, svd brings the sum back to "
        "the largest rank, ties and dare_ties drop what disagrees.",
    ),
]
Density = Annotated[
    float,
    typer.Option(
        "--density", metavar="number", min=0.01, max=1, help="Share of each update that ties and dare_ties keep."
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare the written files with base + adapter (default).")
]


def command(
    adapter: Adapters,
    output: Output,
    base_model: MovedBase = None,
    dtype: WeightType = None,
    shard_size: ShardSize = "5GB",
    merge_base: AddedTo = "auto",
    weights: Weights = None,
    combine: Combine = "linear",
    density: Density = 0.5,
    verify: Verify = True,
    logits: Logits = True,
    destination: Push = None,
    dry_run: DryRun = True,
    public: Public = False,
    overwrite: Overwrite = False,
    force: Force = False,
    json: Json = False,
) -> None:
    adapters = named_adapters(adapter)
    with importing():
        import torch

        from loratune.delivery.merge.job import MergeOptions
        from loratune.delivery.merge.merge import merge_adapter
        from loratune.delivery.merge.sources import open_adapters

    options = MergeOptions(
        model=base_model,
        dtype=getattr(torch, dtype) if dtype else None,
        shard_bytes=parse_size(shard_size, "--shard-size", 1, 2**63, "a size such as 5GB or 900MB"),
        merge_base=merge_base,
        verify=verify,
        logits=logits,
        force=force,
        overwrite=overwrite,
    )
    if not verify:
        console.warn("--no-verify: the merged model is not compared with base + adapter")
    with push(destination, output, not public, dry_run):
        with open_adapters(adapters, weights, combine, density, base_model, force) as source:
            verification = merge_adapter(source, output, options)
        _show(verification.proved, output)
    if json:
        DOCUMENT.write(verification.sealed_values())


def _show(merged: MergedModel, output: Path) -> None:
    from loratune.delivery.advice import serve_merged
    from loratune.delivery.verification.report import show_verification

    show_verification(merged)
    console.say(f"merged model: {output}", style="bold")
    console.next_step(loratune("try it", "infer", {"--model": output}))
    console.next_step(serve_merged(output))
