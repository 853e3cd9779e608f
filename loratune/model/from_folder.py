"""Loads a model folder with transformers, with filtered configs and uniform errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from loratune.errors import Exit, LoratuneError, bullet_list, reason_of
from loratune.model.architecture.file_layout import file_layout
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import auto_class, empty_model, load_config, load_generation_config
from loratune.model.files import weight_files
from loratune.model.memory import is_out_of_memory, release_file_pages
from loratune.model.tying import head_is_tied
from loratune.model.weights.tensor_files import TensorFiles
from loratune.model.weights.unpacked import keep_odd_sizes_unpacked
from loratune.protocols import CausalModel, ModelConfig

IGNORED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Patterns of names that files of earlier versions of transformers hold, and that it computes now."""


def load_from_folder(folder: Path, is_quantized: bool = False, auto: Any = None, **options: Any) -> CausalModel:
    """A causal language model, frozen.

    Args:
        folder: model folder.
        is_quantized: whether loratune has quantised the weights.
        auto: see `empty_model`.
        options: arguments of `from_pretrained`.

    Raises:
        LoratuneError: it cannot be loaded, or weights and config do not fit.
        MemoryError: there is no room for it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config, is_tied = load_config(folder, is_quantized), head_is_tied(folder)
    options = options | {"attn_implementation": supported_attention(config, options.get("attn_implementation"))}
    if not is_quantized:
        _check_shapes(folder, config)
    with _failures_told(folder):
        model, info = (auto or auto_class(type(config))).from_pretrained(
            folder,
            config=config,
            generation_config=load_generation_config(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    release_file_pages(weight_files(folder))
    if info["missing_keys"]:
        raise _lacking(folder, info["missing_keys"])
    if info["unexpected_keys"]:
        raise _left_over(folder, info["unexpected_keys"])
    return _checked(folder, model, is_tied)


def _checked(folder: Path, model: Any, is_tied: bool) -> CausalModel:
    infinite = [name for name, buffer in model.named_buffers() if not buffer.isfinite().all()]
    if infinite:
        raise LoratuneError(
            f"{folder}/config.json: rope_parameters (rope_theta, rope_scaling) give no finite {infinite[0]}; fetch the "
            "file again, or correct it",
            Exit.MODEL,
        )
    loaded: CausalModel = model.requires_grad_(False)
    loaded.config.tie_word_embeddings = is_tied
    keep_odd_sizes_unpacked(loaded)
    return loaded


def load_empty(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> CausalModel:
    """A causal language model without the values of its files, which are to be given to it; on the CPU.

    What transformers computes from the config, such as rotary frequencies, has values. By default, a stack of matrices
    is computed with one matrix at a time.

    Args:
        folder: model folder.
        dtype: that it is to compute in.
        options: other choices of implementations than those for the CPU.

    Raises:
        LoratuneError: it cannot be loaded, or tensors are missing or left over.
    """
    transformers_logging.set_verbosity_error()
    config, is_tied = load_config(folder), head_is_tied(folder)
    _check_shapes(folder, config)
    config.tie_word_embeddings = is_tied
    options = options or {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    options = options | {"attn_implementation": supported_attention(config, options.get("attn_implementation"))}
    with _failures_told(folder), no_init_weights(), init_empty_weights(include_buffers=False):
        model = auto_class(type(config)).from_config(config, dtype=dtype, **options)
        model.generation_config = load_generation_config(folder)
    if is_tied:
        model.tie_weights()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names = file_layout(model, TensorFiles(weight_files(folder)).infos).unused
    left = [name for name in names if not any(re.search(pattern, name) for pattern in (*IGNORED, *ignored))]
    if left:
        raise _left_over(folder, left)
    return _checked(folder, model, is_tied).eval()


def load_plain(folder: Path, is_quantized: bool = False) -> CausalModel:
    """A causal language model as anybody would load it with transformers, in the type of its files, on the CPU.

    Args:
        folder: model folder.
        is_quantized: whether its weights are, by this program.

    Raises:
        LoratuneError: it cannot be loaded, or tensors are missing or left over.
    """
    return load_from_folder(folder, is_quantized, dtype="auto", attn_implementation="sdpa").eval()


@contextmanager
def _failures_told(folder: Path) -> Iterator[None]:
    """Name the folder in what transformers and torch raise.

    Raises:
        LoratuneError: in place of any other error.
        MemoryError: there is no room.
    """
    try:
        yield
    except LoratuneError:
        raise
    except Exception as error:  # of values in files, each layer of transformers and torch raises another kind
        if is_out_of_memory(error):  # in a class that every command knows
            raise MemoryError(f"{folder}: {reason_of(error)}") from error
        raise LoratuneError(f"{folder}: cannot be loaded: {reason_of(error)}", Exit.MODEL) from error


def supported_attention(config: ModelConfig, wanted: str | None) -> str | None:
    """Return the attention to ask for; None leaves the choice to transformers, for a model that has fewer kinds."""
    model_class = auto_class(type(config))._model_mapping[type(config)]
    return None if wanted == "sdpa" and not getattr(model_class, "_supports_sdpa", True) else wanted


def _check_shapes(folder: Path, config: ModelConfig) -> None:
    """Compare the sizes that a config states with the weights' own, before anything is allocated for them."""
    infos, model = TensorFiles(weight_files(folder)).infos, empty_model(config)
    held = {name: info.shape for name, info in file_layout(model, infos).infos(infos).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = [name for name, shape in wanted.items() if name in held and held[name] != shape]
    if other:
        lines = [f"{name}: {list(held[name])}, by the config {list(wanted[name])}" for name in other]
        raise LoratuneError(
            f"{folder}: weights and config do not match:\n{bullet_list(lines, limit=5)}\nfetch config.json again, or "
            "correct its sizes",
            Exit.MODEL,
        )
    head = vocabulary_of(wanted).head
    missing = [name for name in wanted if name not in held and name != head]
    if missing:
        raise _lacking(folder, missing)


def _left_over(folder: Path, names: Iterable[str]) -> LoratuneError:
    left = ", ".join(sorted(names)[:5])
    return LoratuneError(
        f"{folder}: weights and config do not match: the config's model does not have {left}", Exit.MODEL
    )


def _lacking(folder: Path, names: list[str]) -> LoratuneError:
    missing = ", ".join(sorted(names)[:5])
    return LoratuneError(f"{folder}: the weights lack tensors that the model needs: {missing}", Exit.MODEL)
