"""Plans the tensors of a GGUF file: names, shapes, and how their values follow from the model's parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loratune.delivery.export.gguf.architectures import ARCHITECTURES, architecture_name
from loratune.delivery.export.gguf.changes import UNCHANGED, Change, part_rows, plus_one
from loratune.delivery.export.gguf.refusal import not_for_gguf
from loratune.model.architecture.gguf_names import GgufName, gguf_names
from loratune.model.architecture.norms import adds_one, is_norm
from loratune.model.architecture.structure import head_size, text_config
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import empty_model
from loratune.protocols import CausalModel, ModelConfig, TextConfig

IN_FLOAT32 = ("FFN_GATE_INP", "FFN_GATE_INP_SHEXP", "SHORTCONV_CONV", "SSM_CONV1D")
"""Kinds of matrices that llama.cpp never stores in another type."""

LENGTHS = ("long", "short")
"""Of contexts, in the names of tensors and of a config's lists of factors."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF file.

    `source` is the name of the model's parameter, and `source_shape` its shape; `values` are set for a computed tensor.
    """

    name: str
    shape: tuple[int, ...]
    source: str = ""
    source_shape: tuple[int, ...] = ()
    values: torch.Tensor | None = None
    change: Change = UNCHANGED
    in_float32: bool = True
    """Whether it is float32 whatever the file's type is, as all vectors are."""

    @property
    def is_stack(self) -> bool:
        """Whether it is a matrix per expert."""
        return len(self.shape) > 2


def plan_tensors(config: ModelConfig) -> list[PlannedTensor]:
    """The tensors of the file, in the model's order, as the model's own code says which there are.

    Args:
        config: of a whole model; parameters outside of its language model are left out.

    Raises:
        NotForGgufError: gguf has no name for a parameter.
    """
    model, text, architecture = empty_model(config), text_config(config), architecture_name(config)
    weights, names = model.state_dict(), gguf_names(model, architecture)
    if text.tie_word_embeddings:
        names.pop(vocabulary_of(weights).head, None)  # without an output tensor, programs use the embedding
    nameless = [parameter for parameter, found in names.items() if not found]
    if nameless:
        raise not_for_gguf(nameless[0], f"a parameter that GGUF's {architecture} does not have")
    shifted = _shifted_norms(model)
    changes = ARCHITECTURES[architecture].changes(text)
    planned = []
    for parameter, found in names.items():
        shape = tuple(weights[parameter].shape)
        for one in found:
            written = _written(one, shape, changes, is_shifted=parameter in shifted)
            planned += [_plan_tensor(name, shape, parameter, change, kind) for kind, name, change in written]
    factors = _frequency_factors(text)
    return planned + [PlannedTensor(name, tuple(values.shape), values=values) for name, values in factors.items()]


def _shifted_norms(model: CausalModel) -> set[str]:
    """Return the names of the norms' weights to which the model adds 1."""
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    by_class = {type(module): module for module in norms.values()}
    adding = {kind for kind, module in by_class.items() if adds_one(module)}
    return {f"{name}.weight" for name, module in norms.items() if type(module) in adding}


def _written(
    found: GgufName, shape: tuple[int, ...], changes: dict[str, list[tuple[str, Change]]], is_shifted: bool
) -> list[tuple[str, str, Change]]:
    """Return kind, name and change of each tensor that is written of a parameter."""
    if found.parts > 1:
        return [(found.kind, found.name, Change(part_rows(shape[-2], found.part, found.parts), dim=-2))]
    if is_shifted:
        return [(found.kind, found.name, Change(formula=plus_one))]
    return [(kind, found.as_kind(kind), change) for kind, change in changes.get(found.kind, [(found.kind, UNCHANGED)])]


def _plan_tensor(name: str, shape: tuple[int, ...], source: str, change: Change, kind: str) -> PlannedTensor:
    """Plan a tensor; llama.cpp reads no dimension of size 1."""
    sizes = list(shape)
    if change.rows is not None:
        sizes[change.dim] = len(change.rows)
    stored = tuple(size for size in sizes if size > 1) or (1,)
    in_float32 = len(stored) < 2 or kind in IN_FLOAT32
    return PlannedTensor(name, stored, source, shape, change=change, in_float32=in_float32)


def _frequency_factors(config: TextConfig) -> dict[str, torch.Tensor]:
    """Return what frequencies are divided by, by the names of their tensors."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config)}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float() for kind in LENGTHS}
    return {}


def _llama3_factors(config: TextConfig) -> torch.Tensor:
    """What each frequency is divided by, float32, one for each pair of a head's elements."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = torch.exp(-exponents * math.log(config.rope_parameters["rope_theta"]))
    factors: torch.Tensor = frequencies / scaled
    return factors.float()
