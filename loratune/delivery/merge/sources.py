"""Opens the adapters of a command line, and combines several into a temporary one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from loratune import console
from loratune.choices import Combination
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.merge.update import TensorUpdate, read_updates
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.attach import check_adapter
from loratune.model.adapter.completeness import own_modules, tensor_shapes
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.tensors import check_alone
from loratune.model.architecture.file_layout import file_layout
from loratune.model.architecture.roles import transposed_matrices
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import empty_model, load_config
from loratune.model.files import find_base, weight_files
from loratune.model.tokenizer import load_tokenizer
from loratune.model.tying import head_is_tied
from loratune.model.weights.tensor_files import TensorFiles, TensorInfo
from loratune.plain_files import is_folder
from loratune.printable import shortened
from loratune.recipe.sections import TINY_QWEN, ModelSettings
from loratune.runs.base_check import BaseCheck, check_same_template
from loratune.runs.folder import file_sha256
from loratune.runs.intact import require_intact
from loratune.runs.merged import Combined, CombinedAdapter
from loratune.runs.opening import AdapterSource, base_settings, open_settled_adapter
from loratune.runs.tensor_hashes import TensorHashes


@contextmanager
def open_adapters(
    given: list[tuple[str, Path]],
    weights: str | None,
    method: Combination,
    density: float,
    model: str | None,
    force: bool,
) -> Iterator[AdapterSource]:
    """Open one adapter, or combine several.

    Args:
        given: name and folder of each adapter.
        weights: comma-separated weights of several adapters.
        method: method to combine several adapters.
        density: for ties and dare_ties.
        model: location of the base, if moved.
        force: accept changed adapters and different bases.

    Raises:
        LoratuneError: the weights do not match, or the adapters cannot be combined.
    """
    if len(given) == 1:
        flag = "--weights" if weights is not None else "--combine" if method != "linear" else None
        if flag:
            raise LoratuneError(f"{flag} is for several adapters", Exit.USAGE)
        yield open_settled_adapter(given[0][1], force)
        return
    adapters = {name: open_settled_adapter(path, force) for name, path in given}
    numbers = _parse_weights(weights, len(adapters))
    base = _common_base(adapters, model, force)
    first = next(iter(adapters.values()))
    from loratune.model.adapter.combination import combine_adapters  # takes transformers and PEFT

    with tempfile.TemporaryDirectory(prefix="loratune-") as folder:
        with console.status(f"combining {len(adapters)} adapters"):
            paths = {name: source.adapter for name, source in adapters.items()}
            combined = combine_adapters(base, paths, numbers, method, density, Path(folder))
        parts = {
            name: CombinedAdapter(number, file_sha256(path / WEIGHTS_FILE))
            for (name, path), number in zip(paths.items(), numbers, strict=True)
        }
        made = Combined(method, density if "ties" in method else None, parts)
        source = AdapterSource(combined, first.record, first.manifest, first.run, combined=made)
        try:
            yield source
        except LoratuneError as error:  # the temporary folder's path would be useless
            raise LoratuneError(
                error.message.replace(str(combined), source.title), error.exit_code, error.commands
            ) from error


def _common_base(adapters: dict[str, AdapterSource], model: str | None, force: bool) -> Path:
    """Return the common base of the adapters, after checking each of them against it."""
    first = next(iter(adapters.values()))
    settings = base_settings(first, model)
    base = find_base(settings)
    for name, source in adapters.items():
        for warning in check_pair(source, settings.base, base, force):
            console.warn(warning)
        training_encoder(source, base)
        _reading(source.adapter, base)[1]()
        if source.record and source.record.model.quantization != settings.quantization:
            raise LoratuneError("the adapters were trained on different quantisations of the base", Exit.MODEL)
        if source.prompt != first.prompt:
            console.warn(
                f"{shortened(name)} was trained with other prompt settings; the merged model gets those of the first"
            )
    return base


def _reading(adapter: Path, base: Path) -> tuple[dict[str, TensorInfo], Callable[[], dict[str, TensorUpdate]]]:
    """Return the base's parameters, and what reads an adapter as updates of them, if it fits."""
    model, held = empty_model(load_config(base)), TensorFiles(weight_files(base)).infos
    infos = file_layout(model, held).infos(held)
    return infos, partial(read_updates, adapter, infos, head_is_tied(base), transposed_matrices(model))


def check_pair(source: AdapterSource, name: str, base: Path, force: bool) -> list[str]:
    """Check that an adapter belongs to a base, as inference does; all deliveries use this check.

    Args:
        source: the adapter, with unchanged files.
        name: the user's name of the base.
        base: the base's folder.
        force: accept a different base.

    Returns:
        Warnings about what could not be checked, or was forced.

    Raises:
        LoratuneError: it was trained on another base, or lacks tensors; or the base has changed since it was verified.
    """
    remarks = require_intact(base, force)
    infos, fits = _reading(source.adapter, base)
    check = BaseCheck(source, name, base, TensorHashes(weight_files(base)), force, fits)
    shapes = {name: info.shape for name, info in infos.items()}
    if head_is_tied(base):
        embedding, head = vocabulary_of(shapes)
        shapes[head] = shapes[embedding]
    check_adapter(source.adapter, shapes)
    return [*remarks, *check.finish()]


def training_encoder(source: AdapterSource, base: Path) -> Encoder:
    """Return an encoder that renders prompts as in the adapter's training.

    Raises:
        LoratuneError: the template differs from the training's, or there is none.
    """
    encoder = Encoder(load_tokenizer(source.tokenizer_folder(base)), source.prompt)
    check_same_template(source, encoder.template_sha256)
    return encoder


def base_here(source: AdapterSource, model: str | None) -> tuple[str, Path] | None:
    """Return the name and the folder of an adapter's base; None if it would have to be downloaded, or is unknown."""
    try:
        name = base_settings(source, model).base
    except LoratuneError:  # a plain adapter whose base is not on this machine
        name = model or ""
    if model is not None or name == TINY_QWEN or (name and is_folder(Path(name).expanduser())):
        return name, find_base(ModelSettings(base=name))
    return None


def check_where_possible(source: AdapterSource, model: str | None, force: bool) -> list[str]:
    """Check an adapter like `check_pair`, as far as possible without downloading its base.

    Without a base, the adapter's tensors are only compared with its config.
    """
    if found := base_here(source, model):
        name, base = found
        warnings = check_pair(source, name, base, force)
        if source.manifest:
            training_encoder(source, base)
        return warnings
    modules = own_modules(tensor_shapes(source.adapter))
    if in_peft_layout(source.adapter, modules) != source.adapter:
        raise LoratuneError(
            f"{source.adapter}: its tensors do not have PEFT's names; to translate them, give the base with "
            "--base-model",
            Exit.MODEL,
        )
    check_alone(source.adapter, modules)
    check_adapter(source.adapter, modules)
    return [
        *source.remarks,
        "the base is not on this machine, so neither it nor whether the adapter covers all of its layers was checked; "
        "give it with --base-model",
    ]


def _parse_weights(weights: str | None, count: int) -> list[float]:
    if weights is None:
        raise LoratuneError(f"give {count} weights, such as --weights {','.join(['0.5'] * count)}", Exit.USAGE)
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise LoratuneError(f"--weights {weights}: give {count} numbers with commas between", Exit.USAGE)
    return numbers
