"""The steps of `loratune export`, from an adapter or a merged model to another program's format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from loratune import console
from loratune.choices import ExportFormat, ServerName
from loratune.commands import Command
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.advice import SERVE
from loratune.delivery.export.adapter_folder import export_adapter
from loratune.delivery.export.comparison import SAME, FileProof, require_same
from loratune.delivery.export.job import Export, ExportOptions
from loratune.delivery.export.origin import of_adapter, of_model
from loratune.delivery.export.rehearsal import rehearse
from loratune.delivery.export.servers.flags import find_parsers
from loratune.delivery.export.servers.plan import require_servable, serve_command
from loratune.delivery.export.servers.proof import NOT_HERE, prove_served, show_served
from loratune.delivery.merge.job import Job
from loratune.delivery.merge.merge import carry_out
from loratune.delivery.merge.sources import base_here
from loratune.delivery.template import about_the_date
from loratune.delivery.verification.parity import compare_models
from loratune.delivery.verification.place import run_proof
from loratune.delivery.verification.proof import probe_rows
from loratune.delivery.verification.report import parity_text, show_verification
from loratune.errors import Exit, LoratuneError, counted, reason_of, refusal
from loratune.model.architecture.roles import expert_stacks
from loratune.model.architecture.served_class import ServedClass, served_class
from loratune.model.files import check_base
from loratune.model.memory import free_main_memory_bytes
from loratune.model.tokenizer import load_tokenizer
from loratune.model.weights.held import held_bytes
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.quantized_folder import load_quantized, write_quantized
from loratune.recipe.servers import SERVERS
from loratune.runs.exported import ServedAdapter
from loratune.runs.folder import VERIFICATION
from loratune.runs.intact import recorded_files
from loratune.runs.opening import AdapterSource, base_settings, merged_prompt
from loratune.runs.output import prepare_output, require_apart
from loratune.runs.probe import ProbeRow, read_probe
from loratune.runs.tokenizer_files import copy_tokenizer_files
from loratune.runs.verification import ExportedFolder, Verification, write_verification
from loratune.writing import disk_errors_explained, folder_in_one_step

Exported = tuple[ExportedFolder, Command]
"""What has been proved of an export, and what the user can do with it."""


def export(
    source: AdapterSource | None, output: Path, options: ExportOptions
) -> tuple[Verification[ExportedFolder], Command]:
    """Write an export, read it back, and give it its name.

    Args:
        source: an adapter; None for a merged model.
        output: folder of the export.
        options: format and details.

    Returns:
        What verification.json says, and what the user can do with the folder.

    Raises:
        LoratuneError: the format does not support this model, or verification failed; then `output` is not created.
    """
    with disk_errors_explained(output):
        output = output.resolve()
        kind, place = ("adapter", source.adapter) if source else ("model", Path(options.model or ""))
        require_apart(output, kind, place)
        prepare_output(output, options.overwrite, "export", VERIFICATION)
    if options.format in ("gguf", "ollama"):
        import loratune.delivery.export.gguf.file  # noqa: F401 - its package is missed before a merge, not after
    with disk_errors_explained(output), folder_in_one_step(output) as folder:
        job = Export(source, output, folder, options)
        if options.format in FROM_MODEL:
            with _merged(job, rehearse(job)) as model:
                exported, further = FROM_MODEL[options.format](job, model)
                exported = of_model(exported, model)
        else:
            exported, further = FROM_ADAPTER[options.format](job)
            exported = of_adapter(exported, _source(job))
        return write_verification(folder, exported, recorded_files(folder)), further


@contextmanager
def _merged(job: Export, merge: Job | None) -> Iterator[Path]:
    """Yield the merged model to export: the given one, or a temporary one merged from the adapter."""
    if merge is None:
        yield Path(job.options.model or "")
        return
    place = job.folder / "merged"
    show_verification(carry_out(replace(merge, output=place)).proved)
    yield place
    shutil.rmtree(place)


def _export_adapter(job: Export) -> Exported:
    source, options = _source(job), job.options
    base, served = _base_here(job, source)
    trained = served.as_trained if served else None
    model_class = served.trained if served and served.has_own_names else None
    if export_adapter(source, job.folder, options.model, options.force, model_class=model_class):
        console.warn("the chat template holds the training's prompt settings, the system prompt's text among them")
    if served and served.has_own_names:
        console.warn(
            f"the adapter is for {served.trained}, the language model alone, as in its training. Programs that load "
            f"{served.name}, as servers do, apply nothing of it; --format vllm writes the names of that class"
        )
    proved = _proved(job, source, base, trained)
    # The folder is there by then.
    further = job.command("give it away", job.output, push=f"hf:ORG/{job.hub_name}", overwrite=True)
    return ExportedFolder(options.format, served=proved), further


def _export_for_server(server: ServerName, job: Export) -> Exported:
    source, options = _source(job), job.options
    here, served = _base_here(job, source)
    advice = require_servable(server, source, job.output, options.model, options.force, served)
    base = base_settings(source, options.model).base
    for warning in advice.warnings:
        console.warn(warning)
    model_class = served.name if served and served.has_own_names else None
    has_own_template = export_adapter(source, job.folder, options.model, options.force, served, model_class)
    if here is None:
        console.warn(NOT_HERE)
    proved = _proved(job, source, here, served)
    template = job.output / "chat_template.jinja" if has_own_template else None
    parsers = find_parsers(job.folder, base, source, server)
    command = serve_command(base, job.name, job.output, advice, template, parsers.flags)
    if trained_day := source.trained_day:
        console.warn(about_the_date(f"{SERVERS[server].title} writes", trained_day))
    exported = ExportedFolder(
        options.format,
        max_lora_rank=advice.max_lora_rank,
        tool_call_parser=parsers.tools,
        reasoning_parser=parsers.reasoning,
        served=proved,
    )
    return exported, command


def _base_here(job: Export, source: AdapterSource) -> tuple[Path | None, ServedClass | None]:
    """Return the folder of an adapter's base, if it is on this machine, and what servers load of it."""
    try:
        found = base_here(source, job.options.model)
        return (found[1], served_class(found[1])) if found else (None, None)
    except LoratuneError:  # the checks of the export tell it with the others
        return None, None


def _proved(job: Export, source: AdapterSource, base: Path | None, served: ServedClass | None) -> ServedAdapter | None:
    """Prove an exported adapter, if its base is on this machine."""
    if base is None or served is None:
        return None
    proved = prove_served(source, job.folder, base, served)
    show_served(proved)
    return proved


def _export_gguf(job: Export, model: Path) -> Exported:
    from loratune.delivery.export.gguf import check as gguf_check
    from loratune.delivery.export.gguf import file as gguf_file

    target = job.folder / job.gguf_name
    with console.status(f"writing {target.name}"):
        gguf_file.write_gguf(model, target, job.options.quantization)
    with console.status(f"reading {target.name} back"):
        check = gguf_check.check_gguf(model, target)
    proof = _compare_gguf(job, model, target)
    if check.fallbacks:
        kept = counted(len(check.fallbacks), "tensor")
        console.warn(f"{kept} in f16, since q8_0 needs rows that divide into blocks of 32")
    parameters = f"; {proof.parameters} parameters as {proof.read_by} reads them" if proof and proof.parameters else ""
    console.table(
        [
            ("file", f"{target.name}, {console.memory(target.stat().st_size)}"),
            ("tensors", f"{check.tensors} read back{parameters}; off by at most {check.largest_difference:.2g}"),
            ("tokens", f"{check.tokens}, with chat template and end tokens"),
            ("logits", parity_text(proof.logits) if proof else "not compared"),
        ],
        title="verified",
    )
    if proof:
        exported = ExportedFolder(job.options.format, target.name, check, proof.logits, read_by=proof.read_by)
    else:
        exported = ExportedFolder(job.options.format, target.name, check)
    return exported, Command("run it", ("llama-cli", "-m", str(job.output / target.name)))


def _compare_gguf(job: Export, model: Path, target: Path) -> FileProof | None:
    """Load the file as it describes itself, and compare its logits with the merged model's."""
    from loratune.delivery.export.gguf import proof as gguf_proof  # needs the package gguf

    needed = gguf_proof.needed_bytes(model)
    free = free_main_memory_bytes()  # where the file is loaded, whatever GPU is there
    if needed > free:
        console.warn(
            f"the file's logits are not compared: loading it takes {console.memory(needed)} of memory, and "
            f"{console.memory(free)} are free. Every tensor has been read back"
        )
        return None
    kind = job.options.quantization
    with console.status("comparing the file's logits with the merged model's"):
        try:
            proof = gguf_proof.compare_logits(model, target, kind, _rows(job, model))
        except LoratuneError:
            raise
        except Exception as error:  # transformers raises all kinds, none of which says anything against the file
            console.warn(
                f"the file's logits are not compared: transformers cannot load it ({reason_of(error, 200)}). Every "
                "tensor has been read back"
            )
            return None
    if proof.read_by == "loratune":
        console.warn(
            "transformers does not read this architecture from GGUF: loratune's own reader compared keys, tensors and "
            "logits. Try the file in llama.cpp before you rely on it"
        )
    if proof.rounding:
        console.warn(
            f"rounding to {kind} changes this model's logits a lot, although the file holds exactly the rounded "
            f"weights: {'; '.join(proof.rounding)}. Compare answers, or choose another --quantization"
        )
    return proof


def _export_for_ollama(job: Export, model: Path) -> Exported:
    exported, _ = _export_gguf(job, model)
    create = ("ollama", "create", job.ollama_name, "-f", str(job.output / "Modelfile"))
    return exported, Command("give it to Ollama", create)


def _export_nf4(job: Export, model: Path) -> Exported:
    with console.status("quantising"):
        quantized = write_quantized(model, job.folder)
        copy_tokenizer_files(model, job.folder)
    with console.status("comparing the written folder with the quantised model and with the merged one"):
        rows = _rows(job, model)
        (same,) = compare_models(quantized, [load_quantized(job.folder)], rows)
        (parity,), _ = run_proof(
            lambda hardware: compare_models(load_mapped(model, device=hardware.device), [quantized], rows)
        )
    require_same(same, SAME, "the written folder")
    stacks = expert_stacks(quantized)
    in_stacks = sum(held_bytes(weight) for name, weight in quantized.named_parameters() if name in stacks)
    told = f"{console.memory(in_stacks)} of a mixture's matrices, for which bitsandbytes has no file format in 4 bits"
    console.table(
        [
            ("files", f"load again and give the same logits ({same.largest_difference:.1g} apart)"),
            ("nf4", f"beside the merged model: {parity_text(parity)}"),
            *([("16 bits", told)] if stacks else []),
        ],
        title="verified",
    )
    exported = ExportedFolder(job.options.format, read_back=same, logits=parity)
    return exported, Command("serve it", ("vllm", "serve", str(job.output)))


def _rows(job: Export, model: Path) -> list[ProbeRow]:
    """Return the rows for comparing models: the run's, or built-in prompts."""
    encoder = Encoder(load_tokenizer(model), merged_prompt(model))
    return probe_rows(read_probe(job.source.run if job.source else None), encoder)


def _source(job: Export) -> AdapterSource:
    if job.source is None:
        model, options = job.options.model or "", job.options
        server: ServerName | None = next((name for name in SERVERS if name == options.format), None)
        if server and refusal(lambda: check_base(Path(model))) is None:
            advice = [Command("a merged model is served as it is", (*SERVE[server], model))]
        else:
            advice = []
        raise LoratuneError(f"--format {options.format} takes an adapter; give it with --adapter", Exit.USAGE, advice)
    return job.source


FROM_ADAPTER: dict[ExportFormat, Callable[[Export], Exported]] = {
    "adapter": _export_adapter,
    "vllm": partial(_export_for_server, "vllm"),
    "sglang": partial(_export_for_server, "sglang"),
}
FROM_MODEL: dict[ExportFormat, Callable[[Export, Path], Exported]] = {
    "gguf": _export_gguf,
    "ollama": _export_for_ollama,
    "bnb4": _export_nf4,
}
