"""Fused linear cross-entropy: computes the loss at labelled positions in chunks, without the logits of a whole batch.

With Qwen's vocabulary, a batch of 4000 tokens has 600 million logits, most of them at positions without labels. Here
the hidden states of labelled positions are gathered, and head, cross-entropy and gradient run in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from loratune.model.architecture.head import head_of
from loratune.model.architecture.structure import decoder_of, output_layer
from loratune.model.sharding.gathering import gathered
from loratune.multiples import round_up
from loratune.protocols import CausalModel

CHUNK_BYTES = 1 << 27
"""Size of a chunk's logits: enough positions that reading the head's matrix does not dominate."""
BLOCK_LOGITS = {"cpu": 1 << 22}
"""Logits of a chunk that are float32 at a time: 16 MB, which fits into caches."""
BLOCK_LOGITS_ELSEWHERE = 1 << 25
POSITIONS_UNIT = 32
"""Chunks have multiples of this many positions, because oneDNN compiles and caches a kernel per shape."""


@dataclass
class LabelledLoss(ModelOutput):
    """Output of a model called with `summed_loss=True`."""

    loss_sum: torch.Tensor | None = None
    """Sum of the losses in nats: float32 scalar with gradient."""
    losses: torch.Tensor | None = None
    """Loss of each labelled position in nats, row after row: float32, detached."""
    predicted: torch.Tensor | None = None
    """Whether each label is the likeliest token, bool; None in a pass with gradients."""
    positions: torch.Tensor | None = None
    """Index of each labelled position in the flattened batch: int64, ascending."""


class LabelLosses(NamedTuple):
    """The cross-entropy of some logits."""

    total: torch.Tensor
    """The sum: float32 scalar with gradient."""
    losses: torch.Tensor
    """Loss of each position in nats: float32, detached."""
    predicted: torch.Tensor | None
    """See `LabelledLoss`."""


def add_labelled_loss(model: CausalModel, find_head: Callable[[CausalModel], Any] | None = None) -> Any:
    """Let a causal language model return `LabelledLoss` when it is called with labels and `summed_loss=True`.

    The call goes through the model's own forward, so that wrappers such as DDP work as usual.

    Args:
        model: the model.
        find_head: finds what makes the logits; `head_of` by default.

    Returns:
        What makes the logits; see `head_of`.

    Raises:
        LoratuneError: the model's logits do not follow from its hidden states.
    """
    plain_forward, head = model.forward, (find_head or head_of)(model)

    def forward(*arguments: Any, summed_loss: bool = False, **inputs: Any) -> Any:
        return _forward(model, head, **inputs) if summed_loss else plain_forward(*arguments, **inputs)

    model.forward = forward
    return head


def _forward(model: CausalModel, head: Any, labels: torch.Tensor, **inputs: Any) -> LabelledLoss:
    given = {name: value for name, value in inputs.items() if value is not None}
    hidden = decoder_of(model)(**given | {"use_cache": False}).last_hidden_state
    targets = pad(labels[:, 1:], (0, 1), value=-1).flatten()  # negative where there is no label
    places = (targets >= 0).nonzero()[:, 0]  # once, because a GPU is waited for
    with gathered(output_layer(model)) as is_gathered:
        states, aims = hidden.flatten(0, 1).index_select(0, places), targets[places]
        total, losses, predicted = summed_loss(states, aims, head, is_settled=is_gathered)
    return LabelledLoss(loss_sum=total, losses=losses, predicted=predicted, positions=places)


def summed_loss(hidden: torch.Tensor, targets: torch.Tensor, head: Any, is_settled: bool = False) -> LabelLosses:
    """Compute the cross-entropy of a head's logits.

    Args:
        hidden: hidden states at labelled positions, [positions, width].
        targets: following tokens, int64, [positions].
        head: computes logits from hidden states, with a `weight`; see `head_of`.
        is_settled: compute the gradient at once, with a head that is frozen and will be gone in the backward pass.
    """
    is_plain = getattr(type(head), "forward", None) is torch.nn.Linear.forward  # its class changes as it is sharded
    if is_plain and head.bias is None and not head.weight.requires_grad:
        return LabelLosses(*_FrozenHeadLoss.apply(hidden, head.weight, targets))
    if not len(targets):
        return LabelLosses(hidden.float().sum(), hidden.new_zeros(0, dtype=torch.float32), targets > 0)
    chunks = _parts(len(targets), _chunk_positions(hidden, head.weight))
    if is_settled:
        return LabelLosses(*_SettledLoss.apply(hidden, targets, head, list(chunks)))
    parts = [checkpoint(_losses, hidden[chunk], targets[chunk], head, use_reentrant=False) for chunk in chunks]
    losses, predicted = torch.cat([part for part, _ in parts]), [part for _, part in parts if part is not None]
    return LabelLosses(losses.sum(), losses.detach(), torch.cat(predicted) if predicted else None)


def _losses(hidden: torch.Tensor, targets: torch.Tensor, head: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the losses with gradient, and in a pass without gradients whether the targets are predicted."""
    scores = head(hidden).float()
    predicted = None if torch.is_grad_enabled() else _are_predicted(scores, targets)
    return torch.nn.functional.cross_entropy(scores, targets, reduction="none"), predicted


def _are_predicted(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return whether greedy decoding gives the targets: of equal scores, it takes the first."""
    return scores.argmax(dim=-1) == targets


def _chunk_positions(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    fitting: int = CHUNK_BYTES // hidden.element_size() // len(weight)
    return max(fitting // POSITIONS_UNIT * POSITIONS_UNIT, POSITIONS_UNIT)


def _parts(positions: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, positions)) for start in range(0, positions, size))


def _losses_then_gradients(logits: torch.Tensor, targets: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    """Return the losses of logits, float32, [positions]; optionally overwrite the logits with their gradients."""
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    block_logits = BLOCK_LOGITS.get(logits.device.type, BLOCK_LOGITS_ELSEWHERE)
    for block in _parts(len(targets), block_logits // logits.shape[1]):
        aims = targets[block, None]
        log_probabilities = logits[block].float().log_softmax(dim=-1)
        losses[block] = -log_probabilities.gather(1, aims)[:, 0]
        if with_gradients:
            probabilities = log_probabilities.exp_()
            logits[block] = probabilities.scatter_add_(1, aims, probabilities.new_full(aims.shape, -1.0))
    return losses


class _FrozenHeadLoss(torch.autograd.Function):
    """Computes the gradient of the hidden states together with the losses, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        positions = len(targets)
        missing = round_up(positions, POSITIONS_UNIT) - positions
        hidden, targets = pad(hidden, (0, 0, 0, missing)), pad(targets, (0, missing))
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        # float16 would lose small gradients before a loss scaler can enlarge them.
        kind = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        gradient = torch.empty_like(hidden, dtype=kind) if ctx.needs_input_grad[0] else None
        predicted = torch.empty_like(targets, dtype=torch.bool) if gradient is None else None
        for chunk in _parts(len(targets), _chunk_positions(hidden, weight)):
            logits = hidden[chunk] @ weight.T
            if predicted is not None:
                predicted[chunk] = _are_predicted(logits, targets[chunk])
            losses[chunk] = _losses_then_gradients(logits, targets[chunk], gradient is not None)
            if gradient is not None:
                gradient[chunk] = logits @ weight
        ctx.gradient, ctx.kind = None if gradient is None else gradient[:positions], hidden.dtype
        losses = losses[:positions].clone()
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses, None if predicted is None else predicted[:positions]

    @staticmethod
    def backward(ctx: Any, of_sum: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        return (gradient * of_sum).to(ctx.kind), None, None


class _SettledLoss(torch.autograd.Function):
    """The same for any head, by autograd within each chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Any, chunks: Sequence[slice]
    ) -> tuple[torch.Tensor | None, ...]:
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        ctx.gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        predicted = torch.empty_like(targets, dtype=torch.bool) if ctx.gradient is None else None
        for chunk in chunks:
            states = hidden[chunk].detach().requires_grad_(ctx.gradient is not None)
            with torch.set_grad_enabled(ctx.gradient is not None):
                own, are_predicted = _losses(states, targets[chunk], head)
                if ctx.gradient is not None:
                    (ctx.gradient[chunk],) = torch.autograd.grad(own.sum(), states)
            losses[chunk] = own.detach()
            if predicted is not None:
                predicted[chunk] = are_predicted
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses, predicted

    @staticmethod
    def backward(ctx: Any, of_sum: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        return gradient * of_sum, None, None, None
