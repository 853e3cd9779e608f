"""Keeps the documents of a packed row apart where the attention alone does not.

A layer with a recurrent state or a convolution goes on from one document into the next. transformers separates them
only with kernels for GPUs, and not in every family. Here such a layer computes each document as a row of its own,
padded on the right, where no token can see the padding.

Attention that disregards document boundaries gets a mask of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.masking_utils import create_masks_for_generate

from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.structure import decoder_of
from loratune.multiples import round_up
from loratune.protocols import CausalModel, Decoder

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "document_lengths")
"""Arguments of a packed pass that only tell its document boundaries."""
MOST_PADDING = 2
"""A document shares a batch with documents of at most this many times its length."""
LENGTH_UNIT = 8
"""Lengths are padded to multiples of this, because oneDNN compiles and caches a kernel per shape."""


class _Documents(NamedTuple):
    """The documents of a row, in batches of similar length that are padded on the right."""

    lengths: list[int]
    """Tokens of each document."""
    shapes: list[tuple[int, int]]
    """Documents and padded length of each batch."""
    places: torch.Tensor
    """Place of each token in the joined batches, int64 [tokens]."""


class PackedRows:
    """Has a decoder compute packed rows with its documents apart, until it is removed again.

    The boundaries are taken from the arguments of the decoder, because some families do not pass them on to their
    layers. They are kept until the next pass, so that gradient checkpointing computes the layers again with them.

    Args:
        model: a causal language model, with or without an adapter.
        is_masked: whether the decoder gets a mask of the row, and no boundaries. The attention has to be one of
            transformers' own.
    """

    def __init__(self, model: CausalModel, is_masked: bool = False) -> None:
        self._is_masked = is_masked
        self._documents: _Documents | None = None
        self._replaced = ExitStack()
        decoder = decoder_of(model)
        self.recurrent = [*recurrent_modules(decoder)]
        """The modules that compute each document as a row of its own."""
        self._replace(decoder, self._decoder_forward(decoder))
        for module in self.recurrent:
            self._replace(module, self._module_forward(module.forward))

    def remove(self) -> None:
        """Restore the forward of every module."""
        self._replaced.close()

    def _replace(self, module: Any, forward: Callable[..., Any]) -> None:
        own = vars(module).get("forward")
        self._replaced.callback(_restore, module, own)
        module.forward = forward

    def _decoder_forward(self, decoder: Decoder) -> Callable[..., Any]:
        own = decoder.forward

        # Not a hook, which would also see the call of a stand-in for the decoder; see `OwnHead`.
        @wraps(own)
        def forward(*arguments: Any, **inputs: Any) -> Any:
            self._documents = _documents_of(inputs) if self.recurrent else None
            if self._is_masked and inputs.get("cu_seq_lens_q") is not None:
                inputs = _with_mask(decoder, inputs)
            return own(*arguments, **inputs)

        return forward

    def _module_forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def forward(hidden_states: torch.Tensor, *arguments: Any, **inputs: Any) -> Any:
            if self._documents is None:
                return own(hidden_states, *arguments, **inputs)
            rest = {name: value for name, value in inputs.items() if name not in (*BORDERS, "attention_mask")}
            return _by_document(lambda rows: own(rows, **rest), hidden_states, self._documents)

        return forward


def _restore(module: Any, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _with_mask(decoder: Decoder, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a packed pass's arguments with transformers' own masks in place of the boundaries."""
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    # Of the embeddings, only shape, dtype and device count.
    shape = torch.empty(*ids.shape, 0, dtype=decoder.dtype, device=ids.device)
    mask = create_masks_for_generate(decoder.config, shape, None, None, position_ids=positions)
    return {name: value for name, value in inputs.items() if name not in BORDERS} | {"attention_mask": mask}


def _documents_of(inputs: dict[str, Any]) -> _Documents | None:
    """Return the documents of a packed pass; None for another pass."""
    borders = inputs.get("cu_seq_lens_q")
    if borders is None:
        return None
    lengths = list(inputs.get("document_lengths") or borders.diff().tolist())
    starts, shapes, end = np.zeros(len(lengths), np.int64), list[tuple[int, int]](), 0
    for members in _alike(lengths):
        longest = round_up(lengths[members[0]], LENGTH_UNIT)
        for member in members:
            starts[member], end = end, end + longest
        shapes.append((len(members), longest))
    places = np.arange(sum(lengths)) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    # Copied once for all layers, and a GPU need not have finished what came before.
    return _Documents(lengths, shapes, torch.from_numpy(places).to(borders.device, non_blocking=True))


def _by_document(
    forward: Callable[[torch.Tensor], torch.Tensor], row: torch.Tensor, documents: _Documents
) -> torch.Tensor:
    """Compute each document of a row by itself, in as many operations for many documents as for few.

    Args:
        forward: of a module: [documents, longest, width] to the same shape.
        row: [1, tokens, width].
        documents: of the row.

    Raises:
        ValueError: the documents do not fill the row.
    """
    if row.shape[:2] != (1, sum(documents.lengths)):
        raise ValueError(f"documents of {sum(documents.lengths)} tokens in rows of {tuple(row.shape[:2])}")
    sizes = [members * longest for members, longest in documents.shapes]
    joined = row.new_zeros(sum(sizes), row.shape[2]).index_copy_(0, documents.places, row[0])
    batches = (batch.unflatten(0, shape) for batch, shape in zip(joined.split(sizes), documents.shapes, strict=True))
    outputs = torch.cat([forward(batch).flatten(0, 1) for batch in batches])
    return outputs.index_select(0, documents.places)[None]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Return the documents, by number, in groups of similar length, the longest first."""
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[groups[-1][0]] <= MOST_PADDING * lengths[document]:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups
