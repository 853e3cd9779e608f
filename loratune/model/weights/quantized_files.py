"""The base as seen by training with quantisation: weights quantised and dequantised, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from loratune.model.architecture.file_layout import file_layout
from loratune.model.architecture.roles import expert_stacks, quantised_matrices
from loratune.model.config import empty_model, load_config
from loratune.model.hardware import Hardware, resolve_dtype
from loratune.model.weights.tensor_files import TensorFiles
from loratune.recipe.sections import ModelSettings


class DequantizedFiles(TensorFiles):
    """Tensor files whose quantised parameters include the error of 4-bit or 8-bit quantisation.

    Args:
        paths: the base's safetensors files, in a folder with its config.json.
        settings: model settings of the training.
        hardware: the device that quantises; it also determines the dtype, as in training.
    """

    def __init__(self, paths: Sequence[Path], settings: ModelSettings, hardware: Hardware) -> None:
        super().__init__(paths)
        self._settings = settings
        self._dtype = resolve_dtype(settings.dtype, hardware)
        self._device = hardware.device
        self._plain = TensorFiles(paths)
        self._kept: tuple[tuple[str, int | None], torch.Tensor] | None = None
        model = empty_model(load_config(paths[0].parent))
        self._layout = file_layout(model, self.infos)
        self._matrices = {self._layout.tensor_of(name) for name in quantised_matrices(model)}
        stacks = expert_stacks(model) if settings.quantization == "nf4" else []
        self._stacks = {
            place.tensor: (name, place) for name in stacks for place in self._layout.places(name, self.infos)
        }

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; quantised values are computed, and cached until the next ones."""
        if name in self._matrices:
            return self._cached((name, None), lambda: self._there_and_back(self._plain.tensor(name)))
        if name not in self._stacks:
            return super().tensor(name)
        parameter, place = self._stacks[name]
        number, rows = place.expert, place.rows
        if number is not None and rows is not None:
            return self._cached((parameter, number), lambda: self._matrix(parameter, number))[rows]
        count = self.infos[name].shape[0]
        return self._cached(
            (parameter, None), lambda: torch.stack([self._matrix(parameter, one) for one in range(count)])
        )

    def release(self, names: Iterable[str]) -> None:
        """Release the pages of some tensors."""
        given = list(names)
        super().release(given)
        self._plain.release(given)

    def _matrix(self, parameter: str, number: int) -> torch.Tensor:
        return self._there_and_back(self._layout.matrix(parameter, number, self._plain))

    def _cached(self, key: tuple[str, int | None], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # frees its memory
            self._kept = (key, make())
        return self._kept[1]

    def _there_and_back(self, plain: torch.Tensor) -> torch.Tensor:
        weight = plain.to(self._device, self._dtype)
        if self._settings.quantization == "int8":
            # LLM.int8 quantises float16 weights: one scale per row, integers up to 127.
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            return (codes.float() * (scales.float() / 127).unsqueeze(1)).to(plain.dtype).cpu()
        codes, state = bnb.quantize_4bit(
            weight.contiguous(), quant_type="nf4", compress_statistics=self._settings.double_quantization
        )
        return bnb.dequantize_4bit(codes, state).to(plain.dtype).cpu()
