"""Decides whether a model's embedding and head are tied, from its config and files."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import text_value
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import load_config
from loratune.model.files import weight_files
from loratune.model.weights.tensor_files import TensorFiles
from loratune.plain_files import read_json_object


@functools.cache
def head_is_tied(folder: Path) -> bool:
    """Return whether embedding and head are tied, as transformers decides it; warn if config and files disagree.

    A config may claim tying although the files hold a different head, as older merges of a trained head have produced.
    transformers then uses that head; other programs may not.

    Args:
        folder: a validated model folder.

    Raises:
        LoratuneError: config and files contradict each other, so that there is no valid model.
    """
    says_tied = text_value(read_json_object(folder / "config.json"), "tie_word_embeddings")
    if says_tied is None:  # the default depends on the architecture
        says_tied = load_config(folder).tie_word_embeddings
    files = TensorFiles(weight_files(folder))
    embedding, head = vocabulary_of(files.infos)
    of_embedding, of_head = files.infos.get(embedding), files.infos.get(head)
    if of_embedding is None:
        raise LoratuneError(
            f"{folder}: the weights lack {embedding}: files are missing, or this architecture calls its embedding "
            "otherwise, and loratune cannot use it",
            Exit.MODEL,
        )
    if of_head is None:
        if says_tied:
            return True
        raise LoratuneError(
            f"{folder}: config.json says tie_word_embeddings false, and the weights lack {head}", Exit.MODEL
        )
    if of_head.shape != of_embedding.shape:
        raise LoratuneError(
            f"{folder}: {head} is of shape {list(of_head.shape)} and {embedding} of {list(of_embedding.shape)}",
            Exit.MODEL,
        )
    if not says_tied:
        return False
    is_tied = bool(of_head.dtype == of_embedding.dtype and torch.equal(files.tensor(head), files.tensor(embedding)))
    if not is_tied:
        console.warn(
            f"{folder}/config.json says tie_word_embeddings, but {head} differs from the embedding: loratune uses the "
            "head from the files. Other programs may use the embedding; tie_word_embeddings: false in "
            "config.json avoids that"
        )
    files.release([head, embedding])
    return is_tied
