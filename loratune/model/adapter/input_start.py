"""Initial matrices A from what the layers read on training rows (EVA, Paischer et al. 2024).

The rows of A are the principal directions of a layer's inputs, and B is zero. So the adapter is plain LoRA of the
recipe's rank, and has no effect before the first step. As in PEFT, inputs are those at the labelled positions, less
their mean; ranks are not redistributed between layers (rho 1).
"""

from __future__ import annotations

from typing import Any

import torch

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.targets import attached_layers
from loratune.model.architecture.structure import decoder_of
from loratune.protocols import AdaptedModel


def start_from_inputs(model: AdaptedModel, ids: torch.Tensor, mask: torch.Tensor, labelled: torch.Tensor) -> None:
    """Set the matrices A of a fresh adapter.

    Args:
        model: the base with the adapter.
        ids: token ids of rows, padded on the right, int64 [rows, tokens].
        mask: whether a position holds a token, bool of the same shape.
        labelled: whether it holds a labelled one.

    Raises:
        LoratuneError: inputs have fewer directions than a layer has ranks, or a layer reads none; lists all layers.
    """
    layers = dict(attached_layers(model))
    reader = _InputReader(labelled, max(layer.r["default"] for layer in layers.values()))
    hooks = [layer.register_forward_pre_hook(reader.reads(name)) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            decoder_of(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    problems = []
    for name, layer in layers.items():
        rank, directions = layer.r["default"], reader.found.get(name)
        if directions is None:
            problems.append(f"{name}: it does not read every token")
        elif len(directions) < rank:
            problems.append(f"{name}: {len(directions)} directions, and its rank is {rank}")
        else:
            weight = layer.lora_A["default"].weight
            with torch.no_grad():
                weight.copy_(directions[:rank])
    if problems:
        told = bullet_list(problems, limit=5)
        raise LoratuneError(
            f"lora.init eva: the inputs at {int(labelled.sum()):,} answer tokens have too few directions; lower "
            f"lora.rank, or leave these modules out of lora.target_modules:\n{told}",
            Exit.USAGE,
        )


class _InputReader:
    """Computes the directions of the inputs while layers read them; layers that read one tensor share them."""

    def __init__(self, labelled: torch.Tensor, most: int) -> None:
        self._labelled, self._most = labelled, most
        self._read: tuple[torch.Tensor, torch.Tensor] | None = None
        self.found: dict[str, torch.Tensor] = {}
        """Name of a layer → directions [count, features]."""

    def reads(self, name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            states = inputs[0]
            if states.shape[:-1] not in (self._labelled.shape, (self._labelled.numel(),)):
                return  # of a routed expert, which reads some of the tokens
            if self._read is None or self._read[0] is not states:
                labelled = states.flatten(0, -2)[self._labelled.flatten()]
                self._read = states, principal_directions(labelled, self._most)
            self.found[name] = self._read[1]

        return hook


def principal_directions(inputs: torch.Tensor, most: int) -> torch.Tensor:
    """Return unit vectors along which inputs vary most, the strongest first.

    They are eigenvectors of the smaller product of the centred inputs with themselves, in float64. A direction that is
    within the rounding of the inputs' own type is none.

    Args:
        inputs: one input a row, [tokens, features].
        most: how many to return at most.

    Returns:
        float32 [directions, features]; the largest entry of each is positive.
    """
    rounding = torch.finfo(inputs.dtype).eps
    centred = inputs.double() - inputs.double().mean(0)
    is_wide = len(centred) < centred.shape[1]
    squares, vectors = torch.linalg.eigh(centred @ centred.T if is_wide else centred.T @ centred)
    count = min(most, int((squares > squares[-1] * rounding**2).sum())) if squares[-1] > 0 else 0
    strongest = vectors[:, vectors.shape[1] - count :].flip(1)
    directions = (centred.T @ strongest if is_wide else strongest).T
    directions = directions / directions.norm(dim=1, keepdim=True)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return (directions * largest.sign()).float()
