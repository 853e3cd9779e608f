"""A base with its adapters, each with the prompt settings that it was trained with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratune.data.encoding.encoder import Encoder
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.adapter.tensors import check_fits
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.base import load_base
from loratune.model.files import find_base, weight_files
from loratune.model.hardware import detect_hardware
from loratune.model.tokenizer import load_tokenizer, set_pad_token
from loratune.model.tying import head_is_tied
from loratune.recipe.sections import ModelSettings, PromptSettings
from loratune.runs.base_check import BaseCheck
from loratune.runs.opening import (
    AdapterSource,
    base_settings,
    check_same_template,
    check_vocabulary,
    merged_prompt,
    open_adapter,
)
from loratune.runs.tensor_hashes import TensorHashes
from loratune.runs.verification import require_intact


@dataclass(frozen=True)
class Voice:
    """A model that can be asked: an adapter, or the base alone."""

    encoder: Encoder
    adapter: str = BASE
    """PEFT's name of it."""

    def answering(self, use_adapter: bool, ids: Sequence[int], vocabulary: Callable[[str], int]) -> str:
        """PEFT's name of the one who answers a prompt.

        Args:
            use_adapter: False for the base without it, whose prompt is the same.
            ids: of the prompt.
            vocabulary: how many tokens one knows.

        Raises:
            LoratuneError: it lacks a token, as a base does whose adapter was trained with a larger vocabulary.
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


def open_voices(
    adapters: Sequence[tuple[str, Path]], model: str | None, warnings: list[str], force: bool
) -> tuple[Any, str, dict[str | None, Voice]]:
    """Load a base once and put all adapters on it.

    Arguments and errors are those of `load_engine`.

    Returns:
        The model in eval mode, the base's name, and name of an adapter → how it is asked; that of None is the base.
    """
    sources = {name: open_adapter(path, force) for name, path in adapters}
    settings = _settings(list(sources.values()), model, warnings)
    folder = find_base(settings)
    warnings += require_intact(folder, force)
    hashes, checks = TensorHashes(weight_files(folder)), list[BaseCheck]()  # computed while the model is loaded
    voices: dict[str | None, Voice] = {}
    for number, (name, source) in enumerate(sources.items()):
        fits = partial(_check_fits, source, folder)
        checks.append(BaseCheck(source, settings.base, folder, hashes, force, fits))
        encoder = _encoder(source.tokenizer_folder(folder), source.prompt)
        check_same_template(source, encoder.template_sha256)
        voices[name] = Voice(encoder, f"adapter_{number}")
        warnings += _about_template(encoder, source.prompt)
    prompt = merged_prompt(folder)
    try:
        voices[None] = Voice(_encoder(folder, prompt))
        warnings += [] if sources else _about_template(voices[None].encoder, prompt)
    except LoratuneError:
        if not voices:
            raise
        voices[None] = Voice(next(iter(voices.values())).encoder)  # a base without chat template of its own
    loaded = load_base(settings, folder, detect_hardware())
    if sources:
        named = {voices[name].adapter: source for name, source in sources.items()}
        loaded = _with_adapters(loaded, named, folder, warnings)
    warnings[:0] = [warning for check in checks for warning in check.finish()]
    known = [source.trained_base.name for source in sources.values() if source.manifest]
    return loaded.eval(), _short_name(model or next(iter(known), settings.base)), voices


def _with_adapters(model: Any, sources: dict[str, AdapterSource], folder: Path, warnings: list[str]) -> Any:
    """Put adapters on their base, and make sure that it is still what it was for all others."""
    # Imported here because PEFT takes seconds, which a model alone is spared.
    from loratune.model.adapter.attach import load_adapter  # noqa: PLC0415
    from loratune.model.kernels.lora_linear import use_fused_lora  # noqa: PLC0415

    own = own_parameters(model)
    base = own.fingerprint()
    for name, source in sources.items():
        model = load_adapter(model, source.adapter, name)
        found = own.fingerprint()
        changed = sorted(key for key in {*base, *found} if base.get(key) != found.get(key))
        if changed:
            raise LoratuneError(
                f"{source.adapter}: loading it has changed {len(changed)} parameters of the base, first {changed[0]}, "
                "so that the base and other adapters would give other answers; merge it, and give the merged model",
                Exit.MODEL,
            )
        warnings += check_vocabulary(source, folder, own.vocabulary(), own.vocabulary(name))
    use_fused_lora(model)
    return model


def _check_fits(source: AdapterSource, folder: Path) -> None:
    shapes = {name: info.shape for name, info in parameter_infos(folder).items()}
    check_fits(source.adapter, shapes, head_is_tied(folder))


def _short_name(base: str) -> str:
    """A folder is called by its own name: nobody wants to ask for the whole path, or to show it to clients."""
    is_folder = os.path.isabs(base) or os.path.isdir(base)  # noqa: PTH112, PTH117 - a hub id is no path
    return Path(base).absolute().name if is_folder else base


def _settings(sources: Sequence[AdapterSource], model: str | None, warnings: list[str]) -> ModelSettings:
    """How the base is loaded: as in the training of the first adapter."""
    if not sources:
        return ModelSettings(base=model or "")
    known = [base_settings(source, model) for source in sources]
    for source, other in zip(sources, known, strict=True):
        if other.quantization != known[0].quantization:
            warnings.append(
                f"{source.run or source.adapter} was trained with quantization {other.quantization}; the base is "
                f"loaded with {known[0].quantization}, as for the first adapter"
            )
    return known[0]


def _encoder(folder: Path, prompt: PromptSettings) -> Encoder:
    """The renderer of a model; a date in its prompts is the current one, whatever the training's was."""
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, prompt.model_copy(update={"date": None}))
    set_pad_token(tokenizer, {encoder.end_id, tokenizer.eos_token_id})
    return encoder


def _about_template(encoder: Encoder, prompt: PromptSettings) -> list[str]:
    """What those who ask should know of a template.

    Args:
        encoder: the renderer.
        prompt: the settings of the training.
    """
    told = list(encoder.remarks)
    if encoder.is_dated:
        trained = f"; in training it was {prompt.date}" if prompt.date else ""
        told.append(f"the chat template writes the current date into prompts, as it does in other servers{trained}")
    return told
