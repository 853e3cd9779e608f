"""Loads the model that a GGUF file describes, to compare it with the original.

transformers reads the tensors and most of the metadata, but not scaled RoPE, some head sizes and a mixture's widths.
Those are read from the file's own keys, never from the model folder, because the comparison checks the file.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from loratune.delivery.export.gguf.keys import EXPERT_KEYS, attention_scale
from loratune.delivery.export.gguf.layout import LENGTHS
from loratune.delivery.export.gguf.restored import rope_parameters, stated_keys
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import decoder_of
from loratune.protocols import CausalModel

OTHER_SHAPES = ("mismatch", "conversion of the weights")
"""What transformers says of tensors that do not fit a config."""
ROPE_FACTORS, LONG_FACTORS = "rope_freqs.weight", "rope_factors_"


def load_gguf(file: Path) -> CausalModel:
    """The model of a GGUF file in float32, in memory and in eval mode.

    Raises:
        LoratuneError: the tensors do not have the shapes of the keys.
        Exception: any other error of transformers.
    """
    reader = gguf.GGUFReader(file)
    stated = stated_keys(reader)
    transformers_logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar that cannot be disabled
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        _complete(config, reader, stated)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                config=config,
                gguf_file=file.name,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
        except RuntimeError as error:
            if not any(said in str(error) for said in OTHER_SHAPES):
                raise
            raise LoratuneError(
                f"{file.name}: its tensors do not have the shapes that its keys state", Exit.MODEL
            ) from error
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:  # llama.cpp divides the frequencies by these
            decoder_of(model).rotary_emb.inv_freq /= torch.from_numpy(np.array(tensor.data))
    loaded: CausalModel = model.eval()
    return loaded


def _complete(config: Any, reader: Any, stated: dict[str, Any]) -> None:
    """Set what transformers does not read of a file's keys."""
    config.head_dim = stated["attention.key_length"]
    for key, own in EXPERT_KEYS.items():
        if key in stated:
            setattr(config, own, stated[key])
    rope = rope_parameters(stated)
    if "full_attention" in config.rope_parameters:
        config.rope_parameters["full_attention"] = rope
        config.query_pre_attn_scalar = attention_scale(config)
        return
    config.rope_parameters = {**config.rope_parameters, **rope}
    factors = {tensor.name: tensor.data.tolist() for tensor in reader.tensors if tensor.name.startswith(LONG_FACTORS)}
    if factors:
        lists = {f"{length}_factor": factors[f"{LONG_FACTORS}{length}.weight"] for length in LENGTHS}
        config.original_max_position_embeddings = stated["rope.scaling.original_context_length"]
        scale = stated["rope.scaling.attn_factor"]
        config.rope_parameters |= {"rope_type": "longrope", "attention_factor": scale, **lists}
