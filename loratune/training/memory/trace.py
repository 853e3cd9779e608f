"""Runs a training pass on tensors without values, and counts what it holds at each moment.

The pass is the model's own, with its kernels, attention and checkpointing. Only shapes are computed, so a model of any
size takes a second, and needs no weights. Layers of one kind take the same: one of each is run, and another one, and
the difference stands for the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_leaves

from loratune.model.architecture.cache_argument import cache_argument
from loratune.model.architecture.structure import causal_model, decoder_of, layer_kinds
from loratune.model.kernels import linear_cross_entropy
from loratune.model.shapes_only import ShapesOnly
from loratune.protocols import AdaptedModel
from loratune.training.memory.live import LiveBytes

Batch = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """What a pass holds beside the model, in bytes."""

    before: int
    """Before the pass: gradients of an earlier pass of the step."""
    kept: int
    """When the last layer has been computed; most of it is kept for the backward pass."""
    forward: int
    """The most until then."""
    loss: int
    """The most while logits and loss are computed."""
    backward: int
    """The most in the backward pass."""

    @property
    def peak(self) -> int:
        return max(self.forward, self.loss, self.backward)

    def plus(self, other: Trace, times: float = 1) -> Trace:
        """Add another one, some times."""
        mine, others = vars(self), vars(other)
        return Trace(**{one.name: round(mine[one.name] + times * others[one.name]) for one in fields(self)})


@dataclass(frozen=True)
class Setting:
    """How passes are computed."""

    is_recomputed: bool = False
    """With gradient checkpointing."""
    autocast: torch.dtype | None = None
    """That products are computed in, where trained weights are float32 ones of the base."""
    is_repeated: bool = False
    """Whether a step has several passes, so that gradients are there before the last one."""
    on_gpu: bool = False


def trace(model: AdaptedModel, batch: Batch, setting: Setting) -> Trace:
    """Run a pass without values; the model stays as it was.

    Args:
        model: with an adapter or trained weights, and with `add_labelled_loss`.
        batch: a collated pass, with values.
        setting: how it is computed.

    Raises:
        Exception: of any type, where the model asks for values.
    """
    kinds = layers_by_kind(model)
    several = [numbers for numbers in kinds if len(numbers) > 1]
    with _ready(model, setting):
        if not several:
            return _traced(model, batch, setting)
        first = [numbers[0] for numbers in kinds]
        with only_layers(model, first):
            found = once = _traced(model, batch, setting)
        for numbers in several:
            with only_layers(model, sorted([*first, numbers[1]])):
                twice = _traced(model, batch, setting)
            found = found.plus(twice.plus(once, -1), len(numbers) - 1)
        return found


def cache_bytes(model: AdaptedModel, rows: int, tokens: int) -> tuple[int, int]:
    """Return what decoding keeps of some rows of tokens: bytes of keys and values, and of recurrent states."""
    causal = causal_model(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with ShapesOnly(), torch.no_grad():
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            decoder = decoder_of(causal)
            cache = decoder(input_ids=ids, use_cache=True)[cache_argument(decoder)]
    finally:
        for module, mode in modes:
            module.training = mode
    keys = states = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    size = tensor.numel() * tensor.element_size()
                    keys, states = (keys + size, states) if name in ("keys", "values") else (keys, states + size)
    return keys, states


def _traced(model: AdaptedModel, batch: Batch, setting: Setting) -> Trace:
    """Run a pass through the layers that are there."""
    causal = causal_model(model)
    decoder: Any = decoder_of(causal)
    labelled = int((batch["labels"][:, 1:] >= 0).sum())
    mode = ShapesOnly(labelled)
    trained = [weight for weight in causal.parameters() if weight.requires_grad]
    held = [*causal.parameters(), *causal.buffers()]
    fakes = [mode.stand_in(tensor) for tensor in held]
    inputs = {name: mode.stand_in(value) if torch.is_tensor(value) else value for name, value in batch.items()}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in inputs:  # what attention on a CPU would read from them
            inputs[name].document_lengths = inputs["document_lengths"]
    live = LiveBytes([*held, *fakes, *(value for value in inputs.values() if torch.is_tensor(value))])
    marks: list[tuple[int, int]] = []
    hook = decoder.register_forward_hook(lambda *_: marks.append((live.now, live.restart())))
    casting = torch.autocast("cpu", setting.autocast, enabled=setting.autocast is not None)
    try:
        with mode, live:
            if setting.is_repeated:
                for weight in trained:
                    weight.grad = torch.empty_like(weight)
            before = live.now
            live.restart()
            with casting:
                loss = causal(**inputs, summed_loss=True).loss_sum
            of_loss = live.restart()
            loss.backward()
            of_backward = live.restart()
        kept, forward = marks[0]
    finally:
        hook.remove()
        for weight in trained:
            weight.grad = None
    return Trace(before, kept, forward, of_loss, of_backward)


@contextmanager
def _ready(model: AdaptedModel, setting: Setting) -> Iterator[None]:
    """Have a model compute as in training, and leave it as it was."""
    causal: Any = causal_model(model)
    modes = [(module, module.training) for module in model.modules()]
    logits = linear_cross_entropy.BLOCK_LOGITS.copy()
    if setting.on_gpu:  # tensors without values are on no GPU, whose blocks are larger
        linear_cross_entropy.BLOCK_LOGITS.clear()
    model.train()
    inputs_had_gradients = bool(getattr(causal, "_require_grads_hooks", None))
    if setting.is_recomputed:
        causal.activation_checkpointing_enable({"use_reentrant": False})
    try:
        with _in_float32(causal), torch.random.fork_rng([]):
            yield
    finally:
        linear_cross_entropy.BLOCK_LOGITS.update(logits)
        if setting.is_recomputed:
            causal.activation_checkpointing_disable()
            if not inputs_had_gradients:
                causal.disable_input_require_grads()
        for module, mode in modes:
            module.training = mode
        # Rounded copies without values are not to be used.
        increment_version([weight for weight in model.parameters() if weight.requires_grad])


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Give trained weights the type that they have from the first step on; see `train_in_float32`."""
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad and parameter.element_size() < 4
    ]
    wide = {id(one): nn.Parameter(torch.zeros((), dtype=torch.float32).expand(one.shape)) for _, _, one in places}
    for module, name, parameter in places:
        module._parameters[name] = wide[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _layers(model: AdaptedModel) -> tuple[str, Sequence[Any]]:
    """Return the name and the layers of a decoder; none if they are no list."""
    decoder: Any = decoder_of(model)
    kinds = len(layer_kinds(causal_model(model).config))
    lists = {name: part for name, part in decoder.named_children() if isinstance(part, nn.ModuleList)}
    return next(((name, part) for name, part in lists.items() if len(part) == kinds), ("", []))


def layers_by_kind(model: AdaptedModel) -> list[list[int]]:
    """Return the numbers of a decoder's layers, by kind: two of one kind take the same memory."""
    _, layers = _layers(model)
    named = layer_kinds(causal_model(model).config)
    trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in layers]
    first = trained.index(True) if True in trained else 0
    found: dict[Hashable, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        shapes = tuple((name, one.shape, one.dtype, one.requires_grad) for name, one in layer.named_parameters())
        is_passed = number >= first  # no gradient goes through earlier layers
        found[is_passed, named[number], type(layer), shapes].append(number)
    return list(found.values())


@contextmanager
def only_layers(model: AdaptedModel, numbers: Sequence[int]) -> Iterator[None]:
    """Leave a decoder some of its layers."""
    name, layers = _layers(model)
    decoder: Any = decoder_of(model)
    config = decoder.config
    kinds = layer_kinds(config)
    had = {key: getattr(config, key) for key in ("num_hidden_layers", "layer_types") if hasattr(config, key)}
    setattr(decoder, name, nn.ModuleList([layers[number] for number in numbers]))
    config.num_hidden_layers = len(numbers)
    if had.get("layer_types"):
        config.layer_types = [kinds[number] for number in numbers]
    try:
        yield
    finally:
        setattr(decoder, name, layers)
        for key, value in had.items():
            setattr(config, key, value)
