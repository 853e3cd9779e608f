"""Rows of a matrix lent to PEFT's own layers, which merge them, or run them, as they would the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding
from torch import nn

LARGEST_EYE = 4096
"""Columns of a DoRA layer that is run: PEFT multiplies its matrices with a unit matrix of so many rows and columns."""


class LoraRows:
    """One LoRA layer of PEFT's.

    Args:
        layer: with its adapter loaded, its base without values.
        name: PEFT's name of the adapter.
    """

    def __init__(self, layer: LoraLayer, name: str) -> None:
        self._layer, self._name, self._base = layer, name, layer.get_base_layer()
        self._is_embedding = isinstance(layer, Embedding)
        if self._is_embedding:
            self._base.padding_idx = None  # which gradients alone look at, and which few rows may not have
            self._down, self._up = layer.lora_embedding_B[name].data, layer.lora_embedding_A[name].data
        else:
            self._down, self._up = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
        # Of a matrix that is stored transposed, as an embedding's is, rows go with the columns of A.
        self._is_transposed = not self._is_embedding and bool(layer.fan_in_fan_out)
        if self._is_transposed:
            self._down, self._up = self._up, self._down
        self._bias = None if self._is_embedding else layer.lora_B[name].bias
        self.is_dora = name in layer.lora_variant
        self._magnitude = layer.lora_magnitude_vector[name].weight.data if self.is_dora else None
        self._lengths: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self._layer.r[self._name])

    def merge(self, base: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """What PEFT's safe merge makes of some rows.

        Args:
            base: (n, columns) in the type to compute in; not changed.
            numbers: which rows they are (n,).
        """
        with self._lent(base, numbers):
            self._layer.merge(safe_merge=True)
            self._layer.merged_adapters.clear()
            if self.is_dora:
                self._lengths = self._layer._cache_pop(f"{self._name}-weight_norm")
            merged: torch.Tensor = self._base.weight.data
        return merged

    def merge_bias(self, base: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The same of some values of the base's bias (n,), which do not depend on the weight."""
        nothing = base.new_zeros(len(base), 1)
        with self._lent(nothing, numbers, base):
            self._layer.merge(safe_merge=True)
            self._layer.merged_adapters.clear()
            merged: torch.Tensor = self._base.bias.data
        return merged

    def run(self, base: torch.Tensor, numbers: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor | None:
        """What PEFT's layer computes in training and inference, the adapter beside the base, without bias.

        Args:
            base: some rows (n, columns).
            numbers: which (n,).
            inputs: (positions, columns) in the same type; of an embedding, positions stand for the n rows themselves.

        Returns:
            (positions, n), or None where it would take too much memory.
        """
        if self._is_transposed or (self.is_dora and base.shape[1] > LARGEST_EYE):
            return None
        with self._lent(base, numbers), torch.inference_mode():
            if self._is_embedding:
                return inputs @ self._layer(torch.arange(len(base))).T
            return self._layer(inputs)

    def largest_updates(self, numbers: torch.Tensor) -> torch.Tensor:
        """Of each row, a bound of |s|·Σ|B||A|, with DoRA's factor (n,); to be called after `merge` of the same rows."""
        up = self._up_rows(numbers).float().abs()
        down = self._down.float().abs()
        across = self._is_embedding or self._is_transposed
        bounds = down.amax(0) @ up if across else up @ down.amax(1)
        bounds = abs(self._layer.scaling[self._name]) * bounds
        if self._magnitude is not None and self._lengths is not None:
            bounds = bounds * (self._magnitude[numbers].float() / self._lengths.float()).abs()
        return bounds

    def _up_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._up[:, numbers] if self._is_embedding or self._is_transposed else self._up[numbers]

    @contextmanager
    def _lent(self, base: torch.Tensor, numbers: torch.Tensor, bias: torch.Tensor | None = None) -> Iterator[None]:
        """Have the layer hold some rows and what belongs to them, in their type, and nothing afterwards."""
        up, down = self._up_rows(numbers).to(base.dtype), self._down.to(base.dtype)
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
            shift = None if bias is None or self._bias is None else _parameter(self._bias[numbers].to(base.dtype))
            lora_b._parameters["bias"] = shift
            self._layer.lora_bias[self._name] = bias is not None
            self._base._parameters["bias"] = None if bias is None else _parameter(bias)
        if self._magnitude is not None:
            magnitude = self._magnitude[numbers].to(base.dtype)
            self._layer.lora_magnitude_vector[self._name]._parameters["weight"] = _parameter(magnitude)
        self._base._parameters["weight"] = _parameter(base)
        try:
            yield
        finally:
            self._base._parameters["weight"] = None


def merge_tokens(layer: Any, base: torch.Tensor, numbers: torch.Tensor, name: str = "default") -> torch.Tensor:
    """What PEFT's layer of trained tokens makes of some rows (n, columns) of a matrix, which are not changed."""
    places = {int(number): place for place, number in enumerate(numbers)}
    indices, values = layer.token_indices[name], layer.trainable_tokens_delta[name]
    held = [place for place, index in enumerate(indices) if index in places]
    if not held:
        return base
    module = layer.get_base_layer()
    try:
        layer.token_indices[name] = [places[indices[place]] for place in held]
        layer.trainable_tokens_delta[name] = _parameter(values.data[held])
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
