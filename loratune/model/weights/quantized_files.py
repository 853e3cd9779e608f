"""The base as seen by training with quantisation: weights quantised and dequantised, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from loratune.model.architecture.file_layout import file_layout
from loratune.model.architecture.roles import quantised_matrices
from loratune.model.config import empty_model, load_config
from loratune.model.hardware import Hardware, resolve_dtype
from loratune.model.weights.tensor_files import TensorFiles
from loratune.recipe.sections import ModelSettings


class DequantizedFiles(TensorFiles):
    """Tensor files whose linear layers include the error of 4-bit or 8-bit quantisation.

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
        self._kept: tuple[str, torch.Tensor] | None = None
        model = empty_model(load_config(paths[0].parent))
        layout = file_layout(model, self.infos)
        self._quantised = {layout.tensor_of(name) for name in quantised_matrices(model)}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; a quantised one is computed, and cached until the next one."""
        plain = super().tensor(name)
        if name not in self._quantised:
            return plain
        if self._kept is None or self._kept[0] != name:
            self._kept = (name, self._there_and_back(plain))
        return self._kept[1]

    def release(self, names: Iterable[str]) -> None:
        """Release the pages of some tensors."""
        super().release(name for name in names if self._kept is None or self._kept[0] != name)

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
