"""Lends rows of a base matrix to PEFT's layers, which merge or run them like the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding
from torch import nn

LARGEST_EYE = 4096
"""Maximum columns of a DoRA layer that is run: PEFT multiplies its matrices with an identity matrix of this size."""


class LoraRows:
    """One of PEFT's LoRA layers.

    Args:
        layer: the layer with a loaded adapter and a base without values.
        name: PEFT's name of the adapter.
    """

    def __init__(self, layer: LoraLayer, name: str) -> None:
        self._layer, self._name, self._base = layer, name, layer.get_base_layer()
        self._is_embedding = isinstance(layer, Embedding)
        if self._is_embedding:
            self._base.padding_idx = None  # only affects gradients, and may exceed the lent rows
            self._down, self._up = layer.lora_embedding_B[name].data, layer.lora_embedding_A[name].data
        else:
            self._down, self._up = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
        # If the matrix is stored transposed, like an embedding's, its rows correspond to the columns of A.
        self._is_transposed = not self._is_embedding and bool(layer.fan_in_fan_out)
        if self._is_transposed:
            self._down, self._up = self._up, self._down
        self._bias = None if self._is_embedding else layer.lora_B[name].bias
        self.is_dora = name in layer.lora_variant
        self._magnitude = layer.lora_magnitude_vector[name].weight.data if self.is_dora else None
        self._lengths: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self._layer.r[self._name])

    def merge(self, base: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return rows merged by PEFT's safe merge.

        Args:
            base: (n, columns) in the dtype of the computation; not modified.
            numbers: row numbers (n,).
        """
        with self._lent(base, numbers):
            self._layer.merge(safe_merge=True)
            self._layer.merged_adapters.clear()
            if self.is_dora:
                self._lengths = self._layer._cache_pop(f"{self._name}-weight_norm")
            merged: torch.Tensor = self._base.weight.data
        return merged

    def merge_bias(self, base: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return merged values of the base's bias (n,), which do not depend on the weight."""
        nothing = base.new_zeros(len(base), 1)
        with self._lent(nothing, numbers, base):
            self._layer.merge(safe_merge=True)
            self._layer.merged_adapters.clear()
            merged: torch.Tensor = self._base.bias.data
        return merged

    def run(self, base: torch.Tensor, numbers: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor | None:
        """Compute PEFT's forward pass of the unmerged layer for some rows, without bias.

        Args:
            base: the rows (n, columns).
            numbers: row numbers (n,).
            inputs: (positions, columns) in the same dtype; for an embedding, the positions are the n rows.

        Returns:
            (positions, n), or None if it would take too much memory.
        """
        if self._is_transposed or (self.is_dora and base.shape[1] > LARGEST_EYE):
            return None
        with self._lent(base, numbers), torch.inference_mode():
            if self._is_embedding:
                return inputs @ self._layer(torch.arange(len(base))).T
            return self._layer(inputs)

    def largest_updates(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return an upper bound of |s|·Σ|B||A| per row, with DoRA's factor (n,).

        Call it after `merge` of the same rows.
        """
        up = self._up_rows(numbers).float().abs()
        down = self._down.float().abs()
        across = self._is_embedding or self._is_transposed
        bounds = down.amax(0) @ up if across else up @ down.amax(1)
        bounds = abs(self._layer.scaling[self._name]) * bounds
        if self._magnitude is not None and self._lengths is not None:
            bounds = bounds * (self._magnitude[numbers].float() / self._lengths.to(bounds)).abs()
        return bounds

    def _up_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._up[:, numbers] if self._is_embedding or self._is_transposed else self._up[numbers]

    @contextmanager
    def _lent(self, base: torch.Tensor, numbers: torch.Tensor, bias: torch.Tensor | None = None) -> Iterator[None]:
        """Lend rows and the matching adapter values to the layer, in the rows' dtype and on their device."""
        up, down = self._up_rows(numbers).to(base), self._down.to(base)
        if bias is not None:
            down = down[:, :1]
        if self._is_embedding:
            self._layer.lora_embedding_A[self._name] = _parameter(up)
            self._layer.lora_embedding_B[self._name] = _parameter(down)
        else:
            first, second = (up, down) if self._is_transposed else (down, up)
            lora_b = self._layer.lora_B[self._name]
            self._layer.lora_A[self._name]._parameters["weight"] = _parameter(first)
            lora_b._parameters["weight"] = _parameter(second)
            shift = None if bias is None or self._bias is None else _parameter(self._bias[numbers].to(base))
            lora_b._parameters["bias"] = shift
            self._layer.lora_bias[self._name] = bias is not None
            self._base._parameters["bias"] = None if bias is None else _parameter(bias)
        if self._magnitude is not None:
            magnitude = self._magnitude[numbers].to(base)
            self._layer.lora_magnitude_vector[self._name]._parameters["weight"] = _parameter(magnitude)
        self._base._parameters["weight"] = _parameter(base)
        try:
            yield
        finally:
            self._base._parameters["weight"] = None


def merge_tokens(layer: Any, base: torch.Tensor, numbers: torch.Tensor, name: str = "default") -> torch.Tensor:
    """Apply PEFT's layer of trained tokens to rows (n, columns) of a matrix, which are not modified."""
    places = {int(number): place for place, number in enumerate(numbers)}
    indices, values = layer.token_indices[name], layer.trainable_tokens_delta[name]
    held = [place for place, index in enumerate(indices) if index in places]
    if not held:
        return base
    module = layer.get_base_layer()
    try:
        layer.token_indices[name] = [places[indices[place]] for place in held]
        layer.trainable_tokens_delta[name] = _parameter(values.data[held].to(base.device))
        module._parameters["weight"] = _parameter(base)
        layer.merge(safe_merge=True)
        merged: torch.Tensor = module._parameters["weight"].data
    finally:
        layer.merged_adapters.clear()
        layer.token_indices[name], layer.trainable_tokens_delta[name] = indices, values
        module._parameters["weight"] = None
    return merged


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
