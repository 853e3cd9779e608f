"""Checks an export as far as configs and headers allow, before a merge that takes minutes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loratune import console
from loratune.choices import ExportFormat
from loratune.commands import Command
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.export.gguf.refusal import NotForGgufError
from loratune.delivery.export.job import Export
from loratune.delivery.export.ollama.modelfile import write_modelfile
from loratune.delivery.merge.job import Job, MergeOptions, gather
from loratune.delivery.merge.merged_weights import plan_merge
from loratune.delivery.merge.model_folder import write_model_files
from loratune.delivery.template import about_the_date
from loratune.errors import Exit, LoratuneError, counted
from loratune.model.files import check_base, weight_files
from loratune.model.tokenizer import load_tokenizer
from loratune.model.tying import head_is_tied
from loratune.model.weights.tensor_files import TensorFiles
from loratune.plain_files import require_folder
from loratune.runs.intact import require_intact
from loratune.runs.opening import AdapterSource, merged_prompt
from loratune.runs.verification import MergedModel, write_verification


@dataclass(frozen=True)
class Rehearsal:
    """The known parts of a model before it is merged."""

    folder: Path
    """Folder with config, tokenizer, template and generation config, as in a merged folder."""
    shapes: dict[str, tuple[int, ...]]
    is_tied: bool
    merged_bytes: int = 0
    """Size of the temporary merged model."""
    job: Job | None = None
    """The merge; None for an already merged model."""


@contextmanager
def rehearsed_merge(source: AdapterSource, output: Path, options: MergeOptions) -> Iterator[Rehearsal]:
    """Yield what a merge would write, except for the weights.

    Args:
        source: the adapter.
        output: folder of the merged model.
        options: options of the merge.

    Raises:
        LoratuneError: the merge would fail.
    """
    job = gather(source, output.resolve(), options)
    plan = plan_merge(TensorFiles(weight_files(job.base)), job.updates, job.is_tied, options.dtype, options.shard_bytes)
    with tempfile.TemporaryDirectory(prefix="loratune-") as place:
        folder = Path(place)
        write_model_files(source, job.encoder, job.base, folder, options.dtype, plan)
        prompt = source.prompt
        known = MergedModel(
            thinking=prompt.enable_thinking, generation_prompt=prompt.generation_prompt, date=prompt.date
        )
        write_verification(folder, known)
        shapes = {name: tensor.info.shape for name, tensor in plan.tensors.items()}
        try:
            yield Rehearsal(folder, shapes, plan.is_tied, plan.nbytes, job)
        except LoratuneError as error:  # the temporary folder's path would be useless
            told = error.message.replace(f"{folder}/", "the merged model's ").replace(str(folder), "the merged model")
            raise LoratuneError(told, error.exit_code, error.commands) from error


def check_merge(source: AdapterSource, output: Path, options: MergeOptions) -> None:
    """Raise if a merge would fail before it writes weights.

    Raises:
        LoratuneError: with the merge's reason.
    """
    with rehearsed_merge(source, output, options):
        pass


def rehearse(job: Export) -> Job | None:
    """Check the export of a merged model before the merge, and write the files that need no weights.

    Returns:
        The merge to carry out; None for an already merged model.

    Raises:
        LoratuneError: the export would fail later.
    """
    if job.source is None:
        folder = Path(job.options.model or "")
        require_folder(folder, "a merged model with --model, or an adapter with --adapter")
        check_base(folder)
        for warning in require_intact(folder, job.options.force):
            console.warn(warning)
        shapes = {name: info.shape for name, info in TensorFiles(weight_files(folder)).infos.items()}
        CHECKS[job.options.format](job, Rehearsal(folder, shapes, head_is_tied(folder)))
        return None
    options = MergeOptions(model=job.options.model, force=job.options.force, stands_in_for=job.output)
    with rehearsed_merge(job.source, job.output / "merged", options) as model:
        CHECKS[job.options.format](job, model)
        return model.job


def _check_gguf(job: Export, model: Rehearsal) -> None:
    _plan_file(job, model)
    tokenizer, prompt = load_tokenizer(model.folder), merged_prompt(model.folder)
    if tokenizer.chat_template is not None and Encoder(tokenizer, prompt).is_dated:
        console.warn(about_the_date("llama.cpp writes", prompt.date))


def _check_ollama(job: Export, model: Rehearsal) -> None:
    """Write the Modelfile, after checking that its GGUF file can be written."""
    _plan_file(job, model)
    try:
        # The merged model's template includes the other prompt settings.
        prompt = merged_prompt(model.folder)
        written = write_modelfile(model.folder, job.gguf_name, job.folder, job.options.num_ctx, prompt)
    except LoratuneError as error:
        place = job.place_beside("gguf")
        instead = job.command("write the GGUF file alone", place, format="gguf")
        raise LoratuneError(error.message, error.exit_code, [instead, _llama_server(place / job.gguf_name)]) from error
    if written.lost_tools:
        console.warn(
            f"{written.lost_tools}: Ollama will say that the model does not support tools. llama.cpp's server takes "
            "the template from the GGUF file, tools included"
        )
        console.next_step(_llama_server(job.output / job.gguf_name), indent="  ")


def _llama_server(file: Path) -> Command:
    return Command("serve the file with its own chat template", ("llama-server", "--jinja", "-m", str(file)))


def _plan_file(job: Export, model: Rehearsal) -> None:
    """Plan the GGUF file, and check that the disk has room for it and the merged model."""
    from loratune.delivery.export.gguf.file import plan_file  # needs the package gguf

    try:
        plan = plan_file(model.folder, model.shapes, model.is_tied)
    except NotForGgufError as error:
        raise LoratuneError(error.message, error.exit_code, _with_llama_cpp(job)) from error
    if plan.left_out:
        images = ". To read images, make a second file with llama.cpp's convert_hf_to_gguf.py --mmproj"
        console.warn(
            f"{counted(len(plan.left_out), 'tensor')} that take no part in writing text are not in the file, first "
            f"{plan.left_out[0]}{images if plan.reads_images else ''}"
        )
    needed, free = model.merged_bytes + plan.nbytes(job.options.quantization), shutil.disk_usage(job.folder).free
    if needed > free:
        raise LoratuneError(
            f"{job.output}: the GGUF file and the merged model that it is made from need {console.memory(needed)} of "
            f"disk, and {console.memory(free)} are free; make room, or choose another disk with --output",
            Exit.IO,
        )


def _with_llama_cpp(job: Export) -> list[Command]:
    """Return the commands to convert a merged model with llama.cpp's own converter."""
    if job.source is None:
        return [_convert(Path(job.options.model or ""))]
    place = job.place_beside("merged")
    merge = MergeOptions(model=job.options.model, force=job.options.force).command("merge it", job.source, place)
    return [merge, _convert(place)]


def _convert(model: Path) -> Command:
    return Command("convert it in llama.cpp's folder", ("python", "convert_hf_to_gguf.py", str(model)))


def _check_nothing_else(job: Export, model: Rehearsal) -> None:
    """Check nothing: bitsandbytes needs no more than the checks of the merge."""


CHECKS: dict[ExportFormat, Callable[[Export, Rehearsal], None]] = {
    "gguf": _check_gguf,
    "ollama": _check_ollama,
    "bnb4": _check_nothing_else,
}
