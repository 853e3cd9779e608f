"""The adapters of a command line as one: opened, or combined into a temporary one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from loratune import console
from loratune.choices import Combination
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.merge.update import read_updates
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.attach import check_adapter
from loratune.model.adapter.completeness import own_modules, tensor_shapes
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.adapter.tensors import check_alone
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.files import find_base, weight_files
from loratune.model.tokenizer import load_tokenizer
from loratune.model.tying import head_is_tied
from loratune.plain_files import is_folder
from loratune.recipe.sections import TINY_QWEN, ModelSettings
from loratune.runs.base_check import BaseCheck
from loratune.runs.folder import file_sha256
from loratune.runs.opening import AdapterSource, base_settings, check_same_template, open_settled_adapter
from loratune.runs.tensor_hashes import TensorHashes
from loratune.runs.verification import Combined, CombinedAdapter


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
        given: name and folder of each.
        weights: numbers with commas between, one for each of several.
        method: how several become one.
        density: for ties and dare_ties.
        model: where the base lies now.
        force: take changed adapters, and other bases than the trained one.

    Raises:
        LoratuneError: weights that do not match, or adapters that cannot be combined.
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
        yield AdapterSource(combined, first.record, first.manifest, first.run, combined=made)


def _common_base(adapters: dict[str, AdapterSource], model: str | None, force: bool) -> Path:
    """The base that all the adapters belong to, with every adapter checked against it."""
    first = next(iter(adapters.values()))
    settings = base_settings(first, model)
    base = find_base(settings)
    for name, source in adapters.items():
        for warning in check_pair(source, settings.base, base, force):
            console.warn(warning)
        training_encoder(source, base)
        read_updates(source.adapter, parameter_infos(base), head_is_tied(base))
        if source.record and source.record.model.quantization != settings.quantization:
            raise LoratuneError("the adapters were trained on different quantisations of the base", Exit.MODEL)
        if source.prompt != first.prompt:
            console.warn(f"{name} was trained with other prompt settings; the merged model gets those of the first")
    return base


def check_pair(source: AdapterSource, name: str, base: Path, force: bool) -> list[str]:
    """Make sure that an adapter belongs to a base, as it is done before it is asked: every delivery comes through here.

    Args:
        source: the adapter, whose files are as its run left them.
        name: what the user calls the base.
        base: its folder.
        force: let another base through.

    Returns:
        What could not be checked, or was let through.

    Raises:
        LoratuneError: it was trained on another base, or tensors of it are missing.
    """
    infos, is_tied = parameter_infos(base), head_is_tied(base)
    fits = partial(read_updates, source.adapter, infos, is_tied)
    check = BaseCheck(source, name, base, TensorHashes(weight_files(base)), force, fits)
    shapes = {name: info.shape for name, info in infos.items()}
    if is_tied:
        embedding, head = vocabulary_of(shapes)
        shapes[head] = shapes[embedding]
    check_adapter(source.adapter, shapes)
    return check.finish()


def training_encoder(source: AdapterSource, base: Path) -> Encoder:
    """How the training of an adapter rendered prompts.

    Raises:
        LoratuneError: the template is not that of the training, or there is none.
    """
    encoder = Encoder(load_tokenizer(source.tokenizer_folder(base)), source.prompt)
    check_same_template(source, encoder.template_sha256)
    return encoder


def check_where_possible(source: AdapterSource, model: str | None, force: bool) -> list[str]:
    """As `check_pair`, for what needs no base: one that is not on this machine is not fetched for it.

    Without a base the adapter's tensors are compared with its config alone.
    """
    try:
        name = base_settings(source, model).base
    except LoratuneError:  # a plain adapter whose base lies elsewhere
        name = ""
    if model is not None or name == TINY_QWEN or (name and is_folder(Path(name).expanduser())):
        base = find_base(ModelSettings(base=name))
        warnings = check_pair(source, name, base, force)
        if source.manifest:
            training_encoder(source, base)
        return warnings
    modules = own_modules(tensor_shapes(source.adapter))
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
