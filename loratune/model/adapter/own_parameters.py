"""Parameters of the base for which an adapter has its own values: trained biases, embeddings, whole modules.

PEFT writes trained biases and saved embeddings into the base itself, where they also affect other adapters and the base
without an adapter. Here a module holds an adapter's parameters only while that adapter is selected.
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
"""PEFT's name for no adapter."""
# PEFT's wrappers between a module's path and the module.
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.|$)")


class OwnParameters:
    """The replaced parameters of each adapter. The base's parameters are active until `select` is called.

    Args:
        model: a causal language model, without PEFT's outer wrapper.
    """

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._vocabulary = vocabulary_of(parameter_modules(model))
        self._modules: dict[str, Any] = {}
        """Name of a parameter that some adapter replaces → the module with the parameter."""
        self._values: dict[str, dict[str, Any]] = {BASE: {}}
        """Adapter → parameter name → value; for the base, everything that some adapter replaces."""
        self._in_place = BASE
        self._mixed: list[str] = []
        self._hooks: list[Any] = []

    def add(self, adapter: str, tensors: AdapterTensors, keep_dtype: bool = False) -> None:
        """Add an adapter's parameters; those equal to the base's are dropped.

        Args:
            adapter: PEFT's name of the adapter.
            tensors: the adapter's tensors; they match the base.
            keep_dtype: keep the file's dtype, for a base that computes in float32 with weights of any dtype.
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

    def remove(self, adapter: str) -> None:
        """Let go of an adapter's parameters; the base's are active then."""
        self.select([BASE])
        self._values.pop(adapter, None)

    def keep_trained(self, adapter: str) -> None:
        """Copy the base's values of the parameters that an adapter trains in their place."""
        own: dict[str, Any] = {}
        copies: dict[int, Any] = {}  # tied ones stay so
        for name, module in parameter_modules(self._model).items():
            parameter = module._parameters[_attribute(name)]
            if parameter.requires_grad:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                self._modules[name], own[name] = module, parameter
                self._values[BASE][name] = copies[id(parameter)]
        self._values[adapter], self._in_place = own, adapter

    def values(self, adapter: str) -> dict[str, Any]:
        """Return an adapter's parameters by their names in the base."""
        return dict(self._values.get(adapter, {}))

    def names(self, adapter: str) -> list[str]:
        """Return the names of the base's parameters that an adapter replaces."""
        return sorted(self._values.get(adapter, {}))

    def is_apart(self, adapter: str) -> bool:
        """Return whether an adapter replaces more than biases, so that its rows need a separate forward pass."""
        return any(not name.endswith(".bias") for name in self.names(adapter))

    def base_parameters(self) -> dict[str, Any]:
        """Return the base's parameters by their names in the files."""
        found = {name: module._parameters[_attribute(name)] for name, module in parameter_modules(self._model).items()}
        return found | self._values[BASE]

    def fingerprint(self) -> dict[str, tuple[int, int]]:
        """Fingerprint the base's parameters, in about the time of generating one token.

        Returns:
            Parameter name → identity of the object, and the sum of its bytes.
        """
        return {name: (id(parameter), _sum_of_bytes(parameter)) for name, parameter in self.base_parameters().items()}

    def vocabulary(self, adapter: str = BASE) -> int:
        """Return the number of embedding rows that are active for an adapter."""
        values = self._values[BASE] | self._values.get(adapter, {})
        return len(values.get(self._vocabulary.embedding, self._model.get_input_embeddings().weight))

    def select(self, rows: Sequence[str]) -> None:
        """Select whose parameters the next forward passes use.

        Args:
            rows: the adapter of each row, BASE for none; a single name applies to all rows.
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
        """Return a hook that replaces the base's bias with each row's own, in an output (rows, positions, out)."""
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
    """Return the sum of a parameter's bits as 64-bit words modulo 2⁶⁴, which detects any addition or rounding."""
    flat = parameter.detach().reshape(-1)
    words = flat.view(torch.int64 if flat.nbytes % 8 == 0 else torch.uint8)
    return int(words.sum(dtype=torch.int64))


def _fit_sizes(module: Any) -> None:
    """Update a module's size attributes to its matrix."""
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features = len(module.weight)
