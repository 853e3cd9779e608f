"""PEFT's own result of merging an adapter: PEFT reads the adapter and merges it, some rows at a time.

The model is built on the meta device, so only the adapter takes memory. PEFT attaches its layers and loads the adapter;
every parameter that then has values is one that the adapter changes. Rows of the base are lent to the layer that they
belong to, together with the matching rows of the adapter's matrices.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn

from loratune.errors import Exit, LoratuneError, bullet_list, reason_of
from loratune.model.adapter.files import NAME, SETTINGS, WEIGHTS_FILE, read_config_values
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.patterns import as_expressions, settle_patterns
from loratune.model.adapter.peft_rows import LoraRows, merge_tokens
from loratune.model.adapter.peft_stacks import StackRows
from loratune.model.adapter.tensors import PREFIX, TOKENS, WRAPPER
from loratune.model.architecture.file_layout import file_layout
from loratune.model.architecture.structure import text_config
from loratune.model.config import empty_model, load_config
from loratune.model.files import weight_files
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel

ADAPTER = "default"
PATTERNS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern")
TRAINED = (".lora_", ".modules_to_save.", ".trainable_tokens_")


@dataclass
class Change:
    """PEFT's change to one parameter of the base."""

    replacement: torch.Tensor | None = None
    """Values that replace the base's."""
    lora: LoraRows | StackRows | None = None
    tokens: list[Any] = field(default_factory=list)
    """PEFT's layers of trained tokens."""
    is_bias: bool = False

    def rows(self, base: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return rows as PEFT merges them.

        Args:
            base: (n, columns) or (n,) of the base, or of its replacement, in the dtype of the computation; not
                modified.
            numbers: row numbers (n,).

        Raises:
            LoratuneError: PEFT rejects the merge, for example of values that are not finite.
        """
        try:
            for layer in self.tokens:
                base = merge_tokens(layer, base, numbers)
            if self.lora is None:
                return base
            return self.lora.merge_bias(base, numbers) if self.is_bias else self.lora.merge(base, numbers)
        except ValueError as error:
            raise LoratuneError(f"PEFT does not merge this adapter into this base: {error}", Exit.MODEL) from error

    def part(self, expert: int | None, rows: slice) -> Change:
        """Return the change of some rows of a parameter, or of a matrix in a stack; see `Divisible`.

        Raises:
            LoratuneError: PEFT's layer cannot merge a part of its parameter.
        """
        if self.tokens or self.is_bias or (self.lora is not None and not isinstance(self.lora, StackRows)):
            raise LoratuneError("the files hold an adapted parameter in several tensors", Exit.MODEL)
        whole = self.replacement if self.replacement is None or expert is None else self.replacement[expert]
        lora = None if self.lora is None or expert is None else self.lora.matrix(expert, rows.start)
        return Change(None if whole is None else whole[rows], lora)

    @property
    def needs_float64(self) -> bool:
        """Whether float32 sums are too inexact to tell a small change from rounding, as DoRA's norms are."""
        return self.lora is not None and self.lora.is_dora

    def tolerance(self, merged: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return the maximum difference between two correct float32 computations of `rows` (n,), on their device."""
        eps = torch.finfo(torch.float32).eps
        if self.lora is None:
            return torch.zeros(len(merged), dtype=torch.float32, device=merged.device)
        largest = merged.reshape(len(merged), -1).abs().amax(1).float()
        if self.is_bias:
            return 8 * eps * largest
        updates = self.lora.largest_updates(numbers).to(largest.device)
        return 2 * eps * (4 * largest + (self.lora.rank + 4) * updates)


class PeftMerge:
    """PEFT's view of an adapter on its base.

    Args:
        base: model folder; only config.json and the tensors' names are read.
        adapter: PEFT folder, already validated by `loratune.model.adapter.files`.
        vocabulary: rows of the merged model's embedding.
        is_tied: whether embedding and head of the base are tied.

    Raises:
        LoratuneError: PEFT cannot attach the adapter to the base, or a tensor is unexpected or missing.
    """

    def __init__(self, base: Path, adapter: Path, vocabulary: int, is_tied: bool) -> None:
        self.is_tied = is_tied
        model = _empty_model(base, vocabulary, is_tied)
        infos = TensorFiles(weight_files(base)).infos
        layout = file_layout(model, infos)
        places = {id(module): name for name, module in model.named_modules()}
        shapes = {name: tuple(values.shape) for name, values in model.named_parameters(remove_duplicate=False)}
        files = in_peft_layout(adapter, shapes)
        state = load_file(files / WEIGHTS_FILE)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft = PeftModelForCausalLM(model, _config(files, shapes), ADAPTER, low_cpu_mem_usage=True)
                shared = _fill(peft)
                result = set_peft_model_state_dict(peft, state, ADAPTER, low_cpu_mem_usage=True)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _misfit(adapter, [reason_of(error)]) from error
        _share_again(shared)
        peft.eval().requires_grad_(False)
        changes = _changes(peft, places)
        self.changes = layout.in_files(changes, infos)
        """Name of a tensor in the base's files → its change; unchanged tensors are omitted."""
        strange = [name for name in result.unexpected_keys if not _is_copy(name, state.get(name), changes)]
        problems = [f"{name}: PEFT does not use it" for name in strange]
        problems += [f"{name}: PEFT finds no values for it" for name in _empty(peft)]
        if problems:
            raise _misfit(adapter, problems)


def _config(adapter: Path, base: Mapping[str, Sequence[int]]) -> LoraConfig:
    """Return the config for PEFT, with expressions resolved, since PEFT could spend unlimited time on them."""
    values = read_config_values(adapter)
    settled = settle_patterns(values, base, adapter)
    for key in ("rank_pattern", "alpha_pattern"):
        settled[key] = as_expressions(settled[key])
    patterns = {key for key in PATTERNS if not all(map(NAME.fullmatch, _listed(values.get(key))))}
    known = {key: (settled if key in patterns else values)[key] for key in values if key in SETTINGS}
    return LoraConfig(**(known | {"task_type": "CAUSAL_LM", "inference_mode": True}))


def _listed(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _empty_model(base: Path, vocabulary: int, is_tied: bool) -> CausalModel:
    """The base's modules, without values."""
    config = load_config(base)
    text_config(config).vocab_size, config.tie_word_embeddings = vocabulary, is_tied
    model = empty_model(config)
    if is_tied:
        model.tie_weights()
    return model


Place = tuple[Any, str]
"""A module and the name of one of its parameters."""


def _fill(model: Any) -> list[list[Place]]:
    """Replace each meta parameter with a single expanded zero, because PEFT loads tensors to the device of their base.

    Returns:
        The places of each parameter that is shared.
    """
    places: dict[int, list[Place]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[id(parameter)].append((module, name))
    for found in places.values():
        module, name = found[0]
        zero = nn.Parameter(torch.zeros(()).expand(module._parameters[name].shape), requires_grad=False)
        for module, name in found:
            module._parameters[name] = zero
    for module in model.modules():  # trained tokens keep the base's rows in buffers
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return [found for found in places.values() if len(found) > 1]


def _is_loaded(parameter: Any) -> bool:
    return parameter is not None and not parameter.is_meta and (not parameter.ndim or any(parameter.stride()))


def _share_again(shared: list[list[Place]]) -> None:
    """Restore sharing of tied parameters, of which PEFT has loaded only one."""
    for places in shared:
        parameters = [module._parameters[name] for module, name in places]
        loaded = next(filter(_is_loaded, parameters), None)
        for (module, name), parameter in zip(places, parameters, strict=True):
            if loaded is not None and not _is_loaded(parameter):
                module._parameters[name] = loaded


def _is_copy(name: str, tensor: torch.Tensor | None, changes: dict[str, Change]) -> bool:
    """Return whether an unused tensor duplicates another one, as PEFT writes for saved embeddings.

    The base's values, which PEFT writes in addition to modules_to_save, count as duplicates too.
    """
    place = name.removeprefix(PREFIX)
    if ".original_module." in place:
        return True
    if tensor is None:
        return False
    if place.endswith(TOKENS):
        change = changes.get(f"{place.removesuffix(TOKENS)}.weight", Change())
        return any(torch.equal(layer.trainable_tokens_delta[ADAPTER].data, tensor) for layer in change.tokens)
    change = changes.get(WRAPPER.sub("", place), Change())
    return change.replacement is not None and torch.equal(change.replacement, tensor)


def _empty(model: Any) -> list[str]:
    """Return the adapter's parameters without loaded values."""
    return [
        name
        for name, parameter in model.named_parameters()
        if not _is_loaded(parameter)
        and (".lora_" in name or ".modules_to_save." in name or ".trainable_tokens_" in name)
    ]


def _changes(model: Any, places: dict[int, str]) -> dict[str, Change]:
    changes: dict[str, Change] = defaultdict(Change)
    modules = list(model.modules())
    replaced = {id(module.original_module) for module in modules if isinstance(module, ModulesToSaveWrapper)}
    for module in (module for module in modules if id(module) not in replaced):
        name = places.get(id(module))
        if name is not None:
            held = {f"{name}.{attribute}": parameter for attribute, parameter in module._parameters.items()}
            for full, parameter in held.items():
                if _is_loaded(parameter):
                    changes[full].replacement = parameter.data
        elif isinstance(module, ModulesToSaveWrapper):
            name = places[id(module.original_module)]
            for attribute, parameter in module.modules_to_save[ADAPTER].named_parameters():
                changes[f"{name}.{attribute}"].replacement = parameter.data
        elif isinstance(module, TrainableTokensLayer):
            changes[f"{places[id(module.get_base_layer())]}.weight"].tokens.append(module)
        elif isinstance(module, LoraLayer):
            name, rows = places[id(module.get_base_layer())], _rows(module)
            changes[f"{name}.{getattr(module, 'parameter_name', 'weight')}"].lora = rows
            if module.lora_bias[ADAPTER]:
                bias = changes[f"{name}.bias"]
                bias.lora, bias.is_bias = rows, True
    return dict(changes)


def _rows(layer: LoraLayer) -> LoraRows | StackRows:
    return StackRows(layer, ADAPTER) if isinstance(layer, ParamWrapper) else LoraRows(layer, ADAPTER)


def _misfit(adapter: Path, problems: list[str]) -> LoratuneError:
    return LoratuneError(
        f"{adapter}: PEFT cannot attach the adapter to this base, so its merge cannot be verified:\n"
        f"{bullet_list(problems, limit=5)}",
        Exit.MODEL,
    )
