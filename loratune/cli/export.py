"""`loratune export`: converts an adapter or merged model for another program."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from loratune import console
from loratune.choices import ExportFormat, GgufType, ServerName, listed
from loratune.cli.documents import Document
from loratune.cli.flags import (
    Adapter,
    DryRun,
    Force,
    Json,
    MovedBase,
    Output,
    Overwrite,
    Public,
    Push,
    adapter_folder,
    asked_model,
    filled,
)
from loratune.cli.push import push
from loratune.errors import Exit, LoratuneError
from loratune.imports import importing
from loratune.model.architecture.families import GGUF_ARCHITECTURES

DETAILS = f"""\
gguf and ollama: one file for llama.cpp and compatible programs, with a Modelfile for Ollama. bnb4: 4-bit safetensors.
These take a merged model, or an adapter, which is merged and verified first. vllm and sglang: the adapter with the
names of the class that servers load, checked against the server's limits and loaded in that class, and the command to
serve it. adapter: a clean PEFT folder with the names of the training and a model card, for sharing.

Architectures for GGUF, in llama.cpp's names: {", ".join(GGUF_ARCHITECTURES)}.
llama.cpp's convert_hf_to_gguf.py converts merged models of others.

--push lists the files that it would upload; --no-dry-run uploads them."""


def _printed() -> Any:
    from loratune.runs.verification_layout import PrintedExport

    return PrintedExport


DOCUMENT = Document("export", 1, _printed)
Format = Annotated[
    ExportFormat,
    typer.Option("--format", "-f", metavar=listed(ExportFormat), help="What for."),
]
Merged = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="folder",
        callback=filled,
        help="A merged model.",
    ),
]
Quantization = Annotated[
    GgufType | None,
    typer.Option(
        "--quantization",
        "-q",
        metavar=listed(GgufType),
        help="Type of a GGUF file's weights; default is f16. llama.cpp's llama-quantize makes smaller ones of it, such "
        "as q4_k_m.",
    ),
]
NumCtx = Annotated[
    int | None, typer.Option("--num-ctx", metavar="integer", min=1, help="Context length for Ollama, in tokens.")
]


def command(
    output: Output,
    format: Format,
    adapter: Adapter = None,
    model: Merged = None,
    base_model: MovedBase = None,
    quantization: Quantization = None,
    num_ctx: NumCtx = None,
    destination: Push = None,
    dry_run: DryRun = True,
    public: Public = False,
    overwrite: Overwrite = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Export, verify, and print the next command."""
    model = asked_model(adapter is not None, model, base_model)
    folder = adapter_folder(adapter)
    if quantization and format not in ("gguf", "ollama"):
        raise LoratuneError(f"--quantization is for gguf and ollama, not for --format {format}", Exit.USAGE)
    if num_ctx and format != "ollama":
        raise LoratuneError(f"--num-ctx is for ollama, not for --format {format}", Exit.USAGE)
    with console.status("starting"), importing():
        from loratune.delivery.export.export import export
        from loratune.delivery.export.job import ExportOptions
        from loratune.runs.opening import open_settled_adapter

    options = ExportOptions(format, quantization or "f16", num_ctx, model, force, overwrite)
    source = open_settled_adapter(folder, force) if folder else None
    with push(destination, output, not public, dry_run):
        verification, further = export(source, output, options)
        console.say(f"export: {output}", style="bold")
        if format in get_args(ServerName) and not json:
            console.write_result(further.line)
        elif format != "adapter" or destination is None:  # otherwise this command uploads it
            console.next_step(further)
    if json:
        DOCUMENT.write(verification.sealed_values() | {"next": further.line})
