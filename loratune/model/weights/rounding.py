"""Adds the rounding errors of merging to base + adapter, so that a merged model can be compared with it exactly.

Rounding merged weights to 16 bits changes a model's outputs by 1e-5 to 1e-2 nats, depending on the size of the update:
a small update is partly lost. No bound on the distance from base + adapter separates this from a wrong merge. So the
reference gets the same rounding errors, computed from PEFT's own merge and not from the written files. It then differs
from the merged model only by float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loratune.model.adapter.own_parameters import parameter_modules
from loratune.model.adapter.peft_merge import Change
from loratune.model.architecture.structure import causal_model
from loratune.model.weights.dequantised import held_weight
from loratune.model.weights.mapped import embedded
from loratune.model.weights.rounding_steps import steps_off
from loratune.model.weights.stack import Stack, stacks_of
from loratune.protocols import CausalModel

PIECE_VALUES = 2_000_000
"""Maximum number of matrix elements that are computed at once."""


@dataclass(frozen=True)
class Rounding:
    """How a parameter of the reference was rounded to a merged tensor."""

    dtype: torch.dtype
    """Dtype of the written tensor."""
    change: Change | None = None
    """PEFT's change of the parameter; None if it has none."""
    original: torch.Tensor | None = None
    """The merged weights' base if the reference computes with other weights: the plain weights of a quantised base."""
    held_as: torch.dtype | None = None
    """Dtype that dequantised weights are rounded to before merging; None for other weights."""
    original_matrix: Callable[[int], torch.Tensor] | None = None
    """The same as `original` for a quantised stack: returns the plain matrix of a number."""
    found: torch.Tensor | None = None
    """The written tensor, of which ties are taken; see `_rounded`. None to round all values to the nearest."""
    seed: tuple[int, int] | None = None
    """Seeds noise: errors of up to one unit in the last place of float32, and sums in another order. None for none."""

    def error(self, held: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return written rows minus PEFT's merge of the reference's rows, in float32.

        Args:
            held: rows (n, columns) that the reference computes with; the errors are computed on their device.
            numbers: row numbers (n,), on the CPU.
        """
        if self.original is None:
            merged_into = held.to(self.held_as or held.dtype)
        else:
            merged_into = self.original[numbers].to(held.device)
        written = self._rounded(_merged(self.change, merged_into, numbers), numbers)
        # The reference's parameters already contain trained tokens and whole parameters; only LoRA is added.
        exact = _merged(replace(self.change, tokens=[]) if self.change else None, held, numbers)
        return (written.to(exact.dtype) - exact).float() + self._noise(exact, int(numbers[0]))

    def _rounded(self, merged: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Round PEFT's rows; where float32's rounding decides which of two numbers is nearer, take the written one.

        The writer sums in float32 and PEFT's DoRA in float64, so a value in the middle between two numbers of 16 bits
        may become either. A whole step of one weight changes logits more than all of float32's rounding.
        """
        rounded = merged.to(self.dtype)
        if self.found is None or self.change is None or self.dtype == torch.float32:
            return rounded
        found = self.found[numbers].to(rounded.device)
        places = (found != rounded).nonzero(as_tuple=True)
        if not len(places[0]):
            return rounded
        off = steps_off(found[places], merged[places], self.change.tolerance(merged, numbers)[places[0]])
        rounded[places] = torch.where(off <= 0.5, found[places], rounded[places])
        return rounded

    def written(self, exact: torch.Tensor, number: int) -> torch.Tensor:
        """Return a matrix of a stack as it was written, in float32.

        Args:
            exact: the matrix that the reference computes with, in float32.
            number: its index in the stack.
        """
        merged_into = self.original_matrix(number).to(exact.device) if self.original_matrix else exact
        return merged_into.to(self.held_as or merged_into.dtype).to(self.dtype).float() + self._noise(exact, number)

    def sum_noise(self, values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Return what the order of a linear layer's sums makes of its outputs (…, rows), or a zero without a seed.

        Float32's rounding of a sum grows with its length, and that of a weight does not. Two right sums of 2,048
        products differ by five times what noise on each weight makes of them.

        Args:
            values: inputs (…, columns), in float32.
            held: rows (rows, columns) that the reference computes with, on the same device.
        """
        if self.seed is None:
            return torch.zeros(())
        generator = torch.Generator().manual_seed(hash(self.seed) % 2**32)
        order, weight = torch.randperm(held.shape[-1], generator=generator).to(held.device), held.float()
        return functional.linear(values[..., order], weight[:, order]) - functional.linear(values, weight)

    def _noise(self, exact: torch.Tensor, number: int) -> torch.Tensor:
        if self.seed is None:
            return torch.zeros(())
        # Seeds of torch's generator on a CPU are of 32 bits.
        generator = torch.Generator().manual_seed(hash((*self.seed, number)) % 2**32)
        units = 2 * torch.rand(exact.shape, generator=generator) - 1
        return torch.finfo(torch.float32).eps * units.to(exact.device) * exact.float()


def _merged(change: Change | None, rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    if change is None:
        return rows.float()
    return change.rows(rows.double() if change.needs_float64 else rows.float(), numbers)


def tensor_modules(model: CausalModel) -> dict[str, Any]:
    """Name of a parameter or of a saved buffer → the module that holds it."""
    buffers = {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    return parameter_modules(model) | buffers


@contextmanager
def rounded_as(model: CausalModel, roundings: Mapping[str, Rounding]) -> Iterator[None]:
    """Let a reference compute with the rounding errors of merged weights.

    Args:
        model: base + adapter, in float32 arithmetic.
        roundings: name of a parameter of the base → how it was rounded.
    """
    modules, hooks, kept = tensor_modules(causal_model(model)), list[Any](), list[tuple[Any, torch.Tensor]]()
    stacks = list[Stack]()
    # Hooks are on the whole layer, because DoRA scales the output of its base layer.
    around = {id(module.base_layer): module for module in model.modules() if hasattr(module, "base_layer")}
    for name, rounding in roundings.items():
        module, attribute = modules[name], name.rpartition(".")[2]
        parameter = getattr(module, attribute)
        if attribute in stacks_of(module):
            stacks.append(stacks_of(module)[attribute])
            stacks[-1].changes.append(rounding.written)
        elif attribute == "weight" and (hook := _hook(module, rounding)):
            hooks.append(around.get(id(module), module).register_forward_hook(hook))
        else:
            kept.append((parameter, parameter.data))
            parameter.data = parameter.float() + rounding.error(parameter.data, torch.arange(len(parameter)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for stack in stacks:
            stack.changes.pop()
        for parameter, values in kept:
            parameter.data = values


def _hook(module: Any, rounding: Rounding) -> Callable[..., torch.Tensor] | None:
    """Return a forward hook that adds the rounding errors' effect to the output; None unless linear or embedding.

    The errors are computed some rows at a time, since those of a whole matrix may not fit into memory.
    """

    def of_linear(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        weight, values, output = held_weight(module), inputs[0].float(), output.float()
        for numbers in torch.arange(len(weight)).split(max(1, PIECE_VALUES // weight.shape[1])):
            rows = slice(int(numbers[0]), int(numbers[-1]) + 1)
            held = weight[rows].to(values.device)
            output[..., rows] += functional.linear(values, rounding.error(held, numbers))
            output[..., rows] += rounding.sum_noise(values, held)
        return output

    def of_embedding(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        tokens, places = inputs[0].unique(return_inverse=True)
        numbers = tokens.cpu()
        errors = rounding.error(module.weight[numbers].to(output.device), numbers)
        return output.float() + embedded(module, errors, places)

    if isinstance(module, nn.Embedding):
        return of_embedding
    return of_linear if isinstance(module, nn.Linear) else None
