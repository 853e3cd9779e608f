"""Parameters of the base that adapters have values of their own for: trained biases, embeddings, whole modules.

PEFT writes trained biases and saved embeddings into the base itself, where every other adapter and the base without
adapter find them. Here a module holds an adapter's parameters only while that adapter is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loratune.model.adapter.tensors import AdapterTensors
from loratune.model.architecture.structure import causal_model
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.protocols import CausalModel

BASE = "__base__"
"""PEFT's name for no adapter at all."""
# PEFT's layers, which stand between a module's name and the module.
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.|$)")


class OwnParameters:
    """What each adapter has of its own. The base's parameters are in place until `select` is called.

    Args:
        model: a causal language model, without PEFT's outer wrapper.
    """

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._vocabulary = vocabulary_of(parameter_modules(model))
        self._modules: dict[str, Any] = {}
        """Name of a parameter that some adapter has of its own → the module that holds it."""
        self._values: dict[str, dict[str, Any]] = {BASE: {}}
        """Adapter → name of a parameter → its value; of the base, all that some adapter replaces."""
        self._in_place = BASE
        self._mixed: list[str] = []
        self._hooks: list[Any] = []

    def add(self, adapter: str, tensors: AdapterTensors, keep_dtype: bool = False) -> None:
        """Take in what an adapter brings along; what equals the base's is left out.

        Args:
            adapter: PEFT's name of it.
            tensors: of its file; they fit the base.
            keep_dtype: keep the file's precision, for a base that computes in float32 whatever its weights' type.
        """
        modules = parameter_modules(self._model)
        own: dict[str, Any] = {}
        for name in sorted({*tensors.whole, *tensors.rows}):
            base = self._values[BASE].get(name, modules[name]._parameters[_attribute(name)])
            value = tensors.whole.get(name, base.detach())
            value = value.to(base.device) if keep_dtype else value.to(base.device, base.dtype, copy=True)
            if name in tensors.rows:
                numbers, rows = tensors.rows[name]
                value = value.index_copy(0, torch.tensor(numbers, device=base.device), rows.to(value))
            if value.dtype != base.dtype or not torch.equal(value, base):
                self._modules[name], self._values[BASE][name] = modules[name], base
                own[name] = nn.Parameter(value, requires_grad=False)
        self._values[adapter] = own

    def keep_trained_biases(self, adapter: str) -> None:
        """Give the base copies of the biases that an adapter is going to train in place."""
        own: dict[str, Any] = {}
        for name, module in parameter_modules(self._model).items():
            parameter = module._parameters[_attribute(name)]
            if name.endswith(".bias") and parameter.requires_grad:
                self._modules[name], own[name] = module, parameter
                self._values[BASE][name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        self._values[adapter], self._in_place = own, adapter

    def names(self, adapter: str) -> list[str]:
        """Which of the base's parameters an adapter has of its own."""
        return sorted(self._values.get(adapter, {}))

    def is_apart(self, adapter: str) -> bool:
        """Whether an adapter has more than biases of its own, so that its rows take a pass for themselves."""
        return any(not name.endswith(".bias") for name in self.names(adapter))

    def base_parameters(self) -> dict[str, Any]:
        """Name of each of the base's parameters, as its files have it → the parameter."""
        found = {name: module._parameters[_attribute(name)] for name, module in parameter_modules(self._model).items()}
        return found | self._values[BASE]

    def fingerprint(self) -> dict[str, tuple[int, int]]:
        """Of all that the base consists of; to compute it takes about as long as to make one token.

        Returns:
            Name of each of the base's parameters → which object it is, and the sum of its bytes.
        """
        return {name: (id(parameter), _sum_of_bytes(parameter)) for name, parameter in self.base_parameters().items()}

    def vocabulary(self, adapter: str = BASE) -> int:
        """Rows of the embedding that an adapter is asked with."""
        values = self._values[BASE] | self._values.get(adapter, {})
        return len(values.get(self._vocabulary.embedding, self._model.get_input_embeddings().weight))

    def select(self, rows: Sequence[str]) -> None:
        """Have the next passes computed with what the adapters of their rows have of their own.

        Args:
            rows: the adapter of each row, BASE for none; a single name holds for all rows.
        """
        mixed = list(rows) if len(set(rows)) > 1 else []
        self._put(BASE if mixed else rows[0])
        if mixed == self._mixed:
            return
        self._mixed = mixed
        for hook in self._hooks:
            hook.remove()
        names = sorted({name for adapter in mixed if adapter != BASE for name in self.names(adapter)})
        self._hooks = [self._modules[name].register_forward_hook(self._biases(name, mixed)) for name in names]

    def _biases(self, name: str, rows: Sequence[str]) -> Any:
        """A hook that gives each row of a layer's output (rows, positions, out) the bias of its adapter."""
        base = self._values[BASE][name]
        biases = torch.stack([self._values.get(adapter, {}).get(name, base).float() for adapter in rows])
        differences = (biases - base.float()).unsqueeze(1)

        def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return (output + differences).to(output.dtype)

        return add

    def _put(self, adapter: str) -> None:
        if adapter == self._in_place:
            return
        base, own = self._values[BASE], self._values.get(adapter, {})
        for name in {*own, *self._values.get(self._in_place, {})}:
            module = self._modules[name]
            module._parameters[_attribute(name)] = own.get(name, base[name])
            if name in self._vocabulary:
                _fit_sizes(module)
        self._in_place = adapter


def own_parameters(model: CausalModel) -> OwnParameters:
    """Those of a model, which carries them from now on; with or without PEFT's wrapper."""
    base: Any = causal_model(model)  # no model of transformers has such an attribute
    if not hasattr(base, "own_parameters"):
        base.own_parameters = OwnParameters(base)
    found: OwnParameters = base.own_parameters
    return found


def _attribute(name: str) -> str:
    return name.rpartition(".")[2]


def parameter_modules(model: CausalModel) -> dict[str, Any]:
    """Name of a parameter of the base, as its files have it → the module that holds it."""
    return {
        f"{_WRAPPED.sub('', path)}.{attribute}": module
        for path, module in model.named_modules()
        if ".lora_" not in path and ".modules_to_save." not in path
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    }


def _sum_of_bytes(parameter: Any) -> int:
    """Sum of a parameter's bits in words of 64, modulo 2⁶⁴: no addition and no rounding of values can hide in it."""
    flat = parameter.detach().reshape(-1)
    words = flat.view(torch.int64 if flat.nbytes % 8 == 0 else torch.uint8)
    return int(words.sum(dtype=torch.int64))


def _fit_sizes(module: Any) -> None:
    """Let a module say how many rows its matrix has."""
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features = len(module.weight)
