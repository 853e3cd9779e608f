"""Loads a base model with its adapters, each with the prompt settings of its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loratune.data.encoding.encoder import Encoder
from loratune.errors import Exit, LoratuneError, counted
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.adapter.tensors import check_fits
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


@dataclass(frozen=True)
class ServedModel:
    """A model that serves requests: an adapter, or the base alone."""

    encoder: Encoder
    adapter: str = BASE
    """PEFT's name of the adapter."""

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
class LoadedModel:
    """A base model with its adapters, in eval mode."""

    model: CausalModel
    base_name: str
    """Name of the base for clients."""
    voices: dict[str | None, ServedModel]
    """Name of an adapter → its encoder and PEFT name; None is the base."""
    warnings: tuple[str, ...]
    """What could not be checked, or differs from training."""


def open_voices(adapters: Sequence[tuple[str, Path]], model: str | None, force: bool = False) -> LoadedModel:
    """Load a base model once and attach all adapters. See `load_engine` for arguments and errors."""
    sources = {name: open_adapter(path, force) for name, path in adapters}
    settings, warnings = _settings(list(sources.values()), model)
    folder = find_base(settings)
    warnings += require_intact(folder, force)
    hashes, checks = TensorHashes(weight_files(folder)), list[BaseCheck]()  # computed while the model loads
    voices: dict[str | None, ServedModel] = {}
    for number, (name, source) in enumerate(sources.items()):
        fits = partial(_check_fits, source, folder)
        checks.append(BaseCheck(source, settings.base, folder, hashes, force, fits))
        encoder = _encoder(source.tokenizer_folder(folder), source.prompt)
        check_same_template(source, encoder.template_sha256)
        voices[name] = ServedModel(encoder, f"adapter_{number}")
        warnings += _about_template(encoder, source.prompt)
    prompt = merged_prompt(folder)
    try:
        voices[None] = ServedModel(_encoder(folder, prompt))
        warnings += [] if sources else _about_template(voices[None].encoder, prompt)
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
    known = [source.trained_base.name for source in sources.values() if source.manifest]
    base_name = _short_name(model or next(iter(known), settings.base))
    return LoadedModel(loaded.eval(), base_name, voices, tuple(warnings))


def _with_adapters(
    model: CausalModel, sources: dict[str, AdapterSource], folder: Path
) -> tuple[CausalModel, list[str]]:
    """Put adapters on their base, and make sure that it is still what it was for all others.

    Returns:
        The model, and warnings about missing vocabulary.
    """
    # Deferred: importing PEFT takes seconds, which a model without adapters does not need.
    from loratune.model.adapter.attach import load_adapter  # noqa: PLC0415
    from loratune.model.kernels.lora_linear import use_fused_lora  # noqa: PLC0415

    own, lacking = own_parameters(model), list[str]()
    base = own.fingerprint()
    for name, source in sources.items():
        model = load_adapter(model, source.adapter, name)
        found = own.fingerprint()
        changed = sorted(key for key in {*base, *found} if base.get(key) != found.get(key))
        if changed:
            raise LoratuneError(
                f"{source.adapter}: loading it has changed {counted(len(changed), 'parameter')} of the base, first "
                f"{changed[0]}, so that the base and other adapters would give other answers; merge it, and give the "
                "merged model",
                Exit.MODEL,
            )
        lacking += check_vocabulary(source, folder, own.vocabulary(), own.vocabulary(name))
    use_fused_lora(model)
    return model, lacking


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
    known = [base_settings(source, model) for source in sources]
    others = [
        f"{source.run or source.adapter} was trained with quantization {other.quantization}; the base is loaded with "
        f"{known[0].quantization}, as for the first adapter"
        for source, other in zip(sources, known, strict=True)
        if other.quantization != known[0].quantization
    ]
    return known[0], others


def _encoder(folder: Path, prompt: PromptSettings) -> Encoder:
    """Return a model's encoder. Dates in its prompts are current, whatever the training used."""
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, prompt.model_copy(update={"date": None}))
    set_pad_token(tokenizer, {encoder.end_id, tokenizer.eos_token_id})
    return encoder


def _about_template(encoder: Encoder, prompt: PromptSettings) -> list[str]:
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
