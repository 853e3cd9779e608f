"""Loads a base model with its adapters, each with the prompt settings of its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from loratune.data.encoding.encoder import Encoder
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.fitting import check_fits
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.own_parameters import BASE
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.base import load_base
from loratune.model.files import find_base, weight_files
from loratune.model.hardware import detect_hardware
from loratune.model.tokenizer import load_tokenizer, set_pad_token
from loratune.model.tying import head_is_tied
from loratune.plain_files import is_folder
from loratune.protocols import CausalModel
from loratune.recipe.sections import ModelSettings, PromptSettings
from loratune.runs.base_check import BaseCheck, check_same_template, check_vocabulary
from loratune.runs.intact import require_intact
from loratune.runs.opening import AdapterSource, base_settings, merged_prompt, open_adapter
from loratune.runs.tensor_hashes import TensorHashes
from loratune.runs.tokenizer_files import tokenizer_sha256


@dataclass(frozen=True)
class ServedModel:
    """A model that serves requests: an adapter, or the base alone."""

    encoder: Encoder
    adapter: str = BASE
    """PEFT's name of the adapter."""
    version: str = ""
    """See `RunningSequence`."""

    def answering(self, use_adapter: bool, ids: Sequence[int], vocabulary: Callable[[str], int]) -> str:
        """Return PEFT's name of the adapter that answers a prompt.

        Args:
            use_adapter: False for the base, with the same prompt.
            ids: token ids of the prompt.
            vocabulary: returns an adapter's vocabulary size.

        Raises:
            LoratuneError: an id is outside the vocabulary, such as the base's if the adapter extends it.
        """
        adapter = self.adapter if use_adapter else BASE
        known, highest = vocabulary(adapter), max(ids)
        if highest >= known:
            raise LoratuneError(
                f"{'the base' if adapter == BASE else 'the adapter'} has no token "
                f"{self.encoder.tokenizer.convert_ids_to_tokens(highest)}: its vocabulary has {known:,} rows",
                Exit.MODEL,
            )
        return adapter


@dataclass(frozen=True)
class Lease:
    """An adapter that stays in memory until it is released."""

    voice: ServedModel
    release: Callable[[], None]
    """To be called once."""


class Encoders:
    """Encoders of a tokenizer's files and prompt settings, shared as long as one is in use."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[str, str], Encoder] = WeakValueDictionary()

    def of(self, folder: Path, prompt: PromptSettings) -> Encoder:
        """Return an encoder. Dates in its prompts are current, whatever the training used."""
        key = tokenizer_sha256(folder), prompt.model_dump_json()
        encoder = self._known.get(key)
        if encoder is None:
            tokenizer = load_tokenizer(folder)
            self._known[key] = encoder = Encoder(tokenizer, prompt.model_copy(update={"date": None}))
            set_pad_token(tokenizer, {encoder.end_id, tokenizer.eos_token_id})
        return encoder


@dataclass(frozen=True)
class ServedBase:
    """A base, and what adapters are checked against it with."""

    settings: ModelSettings
    folder: Path
    force: bool
    """Accept a different base, or an adapter whose files have changed."""
    hashes: TensorHashes
    encoders: Encoders

    def opened(self, source: AdapterSource, name: str) -> tuple[BaseCheck, Encoder]:
        """Check that an adapter was trained on this base and with its template.

        Args:
            source: the adapter.
            name: of the base, in messages.

        Returns:
            The comparison of the base's bytes, which may go on, and the adapter's encoder.

        Raises:
            LoratuneError: the base or the template is another one.
        """
        fits = partial(_check_fits, source, self.folder)
        check = BaseCheck(source, name, self.folder, self.hashes, self.force, fits)
        encoder = self.encoders.of(source.tokenizer_folder(self.folder), source.prompt)
        check_same_template(source, encoder.template_sha256)
        return check, encoder


@dataclass(frozen=True)
class LoadedModel:
    """A base model with its adapters, in eval mode."""

    model: CausalModel
    base: ServedBase
    base_name: str
    """Name of the base for clients."""
    voices: dict[str | None, ServedModel]
    """Name of an adapter → its encoder and PEFT name; None is the base."""
    warnings: tuple[str, ...]
    """What could not be checked, or differs from training."""


def open_voices(
    adapters: Sequence[tuple[str, Path]], model: str | None, force: bool = False, like: Path | None = None
) -> LoadedModel:
    """Load a base model once and attach all adapters. See `load_engine` for arguments and errors."""
    sources = {name: open_adapter(path, force) for name, path in adapters}
    first = [open_adapter(like, force)] if like and not sources else []
    settings, warnings = _settings([*sources.values(), *first], model)
    folder = find_base(settings)
    warnings += require_intact(folder, force)
    # Hashes are computed while the model loads.
    base, checks = ServedBase(settings, folder, force, TensorHashes(weight_files(folder)), Encoders()), []
    voices: dict[str | None, ServedModel] = {}
    for number, (name, source) in enumerate(sources.items()):
        check, encoder = base.opened(source, settings.base)
        checks.append(check)
        voices[name] = ServedModel(encoder, f"adapter_{number}")
        warnings += about_template(encoder, source.prompt)
    prompt = merged_prompt(folder)
    try:
        voices[None] = ServedModel(base.encoders.of(folder, prompt))
        warnings += [] if sources else about_template(voices[None].encoder, prompt)
    except LoratuneError:
        if not voices:
            raise
        voices[None] = ServedModel(next(iter(voices.values())).encoder)  # the base has no chat template
    loaded = load_base(settings, folder, detect_hardware())
    if sources:
        named = {voices[name].adapter: source for name, source in sources.items()}
        loaded, lacking = _with_adapters(loaded, named, folder)
        warnings += lacking
    warnings = [*(warning for check in checks for warning in check.finish()), *warnings]
    known = [source.trained_base.name for source in (*sources.values(), *first) if source.manifest]
    base_name = _short_name(model or next(iter(known), settings.base))
    return LoadedModel(loaded.eval(), base, base_name, voices, tuple(warnings))


def _with_adapters(
    model: CausalModel, sources: dict[str, AdapterSource], folder: Path
) -> tuple[CausalModel, list[str]]:
    """Put adapters on their base, and make sure that it is still what it was for all others.

    Returns:
        The model, and warnings about missing vocabulary.
    """
    # Deferred: importing PEFT takes seconds, which a model without adapters does not need.
    from loratune.engine.attached import AttachedAdapters  # noqa: PLC0415
    from loratune.model.adapter.reading import AdapterReader  # noqa: PLC0415

    attached, reader, lacking = AttachedAdapters(model), AdapterReader(model), list[str]()
    for name, source in sources.items():
        read = reader.read(source.adapter)
        attached.put(read, name)
        lacking += check_vocabulary(source, folder, reader.vocabulary, read.vocabulary)
    return attached.model, lacking


def _check_fits(source: AdapterSource, folder: Path) -> None:
    shapes = {name: info.shape for name, info in parameter_infos(folder).items()}
    check_fits(in_peft_layout(source.adapter, shapes), shapes, head_is_tied(folder))


def _short_name(base: str) -> str:
    """Return a folder's own name, so that clients do not see or type the whole path."""
    return Path(base).absolute().name if Path(base).is_absolute() or is_folder(base) else base


def _settings(sources: Sequence[AdapterSource], model: str | None) -> tuple[ModelSettings, list[str]]:
    """Return the settings to load the base, those of the first adapter's training, and warnings about differences."""
    if not sources:
        return ModelSettings(base=model or ""), []
    settings = base_settings(sources[0], model)
    return settings, [warning for source in sources for warning in other_quantization(source, settings, model)]


def other_quantization(source: AdapterSource, settings: ModelSettings, model: str | None) -> list[str]:
    """Return a warning if an adapter was trained on its base in another quantisation than it is loaded with.

    Args:
        source: the adapter.
        settings: of the base as it is loaded.
        model: see `base_settings`.
    """
    own = base_settings(source, model).quantization
    if own == settings.quantization:
        return []
    return [
        f"{source.run or source.adapter} was trained with quantization {own}; the base is loaded with "
        f"{settings.quantization}, as for the first adapter"
    ]


def about_template(encoder: Encoder, prompt: PromptSettings) -> list[str]:
    """Return warnings about a template.

    Args:
        encoder: the renderer.
        prompt: the settings of the training.
    """
    remarks = list(encoder.remarks)
    if encoder.is_dated:
        trained = f"; in training it was {prompt.date}" if prompt.date else ""
        remarks.append(f"the chat template writes the current date into prompts, as it does in other servers{trained}")
    return remarks
