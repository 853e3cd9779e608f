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
from typing import Any

import torch
from torch.nn.functional import pad
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
        self._is_masked, self._lengths = is_masked, list[int]()
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
            self._lengths = _document_lengths(inputs)
            if self._lengths and self._is_masked:
                inputs = _with_mask(decoder, inputs)
            return own(*arguments, **inputs)

        return forward

    def _module_forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def forward(hidden_states: torch.Tensor, *arguments: Any, **inputs: Any) -> Any:
            if not self._lengths:
                return own(hidden_states, *arguments, **inputs)
            rest = {name: value for name, value in inputs.items() if name not in (*BORDERS, "attention_mask")}
            return _by_document(lambda rows: own(rows, **rest), hidden_states, self._lengths)

        return forward


def _restore(module: Any, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _document_lengths(inputs: dict[str, Any]) -> list[int]:
    """Return the lengths of a packed pass's documents; empty for another pass."""
    borders, lengths = inputs.get("cu_seq_lens_q"), inputs.get("document_lengths")
    if borders is None:
        return []
    return list(lengths) if lengths else list(borders.diff().tolist())


def _with_mask(decoder: Decoder, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a packed pass's arguments with transformers' own masks in place of the boundaries."""
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    # Of the embeddings, only shape, dtype and device count.
    shape = torch.empty(*ids.shape, 0, dtype=decoder.dtype, device=ids.device)
    mask = create_masks_for_generate(decoder.config, shape, None, None, position_ids=positions)
    return {name: value for name, value in inputs.items() if name not in BORDERS} | {"attention_mask": mask}


def _by_document(
    forward: Callable[[torch.Tensor], torch.Tensor], row: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Compute each document of a row by itself.

    Args:
        forward: of a module: [documents, longest, width] to the same shape.
        row: [1, tokens, width].
        lengths: tokens of each document.

    Raises:
        ValueError: the documents do not fill the row.
    """
    if row.shape[:2] != (1, sum(lengths)):
        raise ValueError(f"documents of {sum(lengths)} tokens in rows of {tuple(row.shape[:2])}")
    documents = row[0].split(list(lengths))
    outputs: dict[int, torch.Tensor] = {}
    for members in _alike(lengths):
        longest = round_up(lengths[members[0]], LENGTH_UNIT)
        rows = torch.stack([pad(documents[member], (0, 0, 0, longest - lengths[member])) for member in members])
        outputs |= {member: states[: lengths[member]] for member, states in zip(members, forward(rows), strict=True)}
    return torch.cat([outputs[document] for document in range(len(lengths))])[None]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Return the documents, by number, in groups of similar length, the longest first."""
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[groups[-1][0]] <= MOST_PADDING * lengths[document]:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups
