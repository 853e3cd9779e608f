"""Whether a model has one matrix for embedding and head: the config's word against what the files hold."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.tensors import EMBEDDING, HEAD
from loratune.model.files import weight_files
from loratune.model.weights.tensor_files import TensorFiles
from loratune.plain_files import read_json_object


@functools.cache
def head_is_tied(folder: Path) -> bool:
    """Decide it as transformers does, once for everything that is done with a model, and tell of an odd one.

    A config may say that embedding and head are tied where the files hold a head of other values, as older merges of a
    trained head have left behind. transformers computes with that head; other programs may not.

    Args:
        folder: of a model, whose files have been checked.

    Raises:
        LoratuneError: config and files contradict each other in a way that leaves no model.
    """
    says_tied = read_json_object(folder / "config.json").get("tie_word_embeddings", False)
    files = TensorFiles(weight_files(folder))
    embedding, head = (files.infos.get(name) for name in (EMBEDDING, HEAD))
    if embedding is None:
        raise LoratuneError(f"{folder}: the weights lack {EMBEDDING}", Exit.MODEL)
    if head is None:
        if says_tied:
            return True
        raise LoratuneError(
            f"{folder}: config.json says tie_word_embeddings false, and the weights lack {HEAD}", Exit.MODEL
        )
    if head.shape != embedding.shape:
        raise LoratuneError(
            f"{folder}: {HEAD} is of shape {list(head.shape)} and {EMBEDDING} of {list(embedding.shape)}", Exit.MODEL
        )
    if not says_tied:
        return False
    is_tied = bool(head.dtype == embedding.dtype and torch.equal(files.tensor(HEAD), files.tensor(EMBEDDING)))
    if not is_tied:
        console.warn(
            f"{folder}/config.json says tie_word_embeddings, but {HEAD} differs from the embedding: the model is taken "
            "with the head that its files hold. Other programs may take the embedding; tie_word_embeddings: false in "
            "config.json makes it certain"
        )
    files.release([HEAD, EMBEDDING])
    return is_tied
