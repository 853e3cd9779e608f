"""Compares the gradients of a whole packed step with those of PEFT, which gets the same rows one by one."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from gpu_checks.models import adapted_base, packed, random_model, random_rows, relative_error, use_loratune
from gpu_checks.table import Figures, Workplace

LAYERS = 4
LENGTHS = tuple(range(24, 24 + 16 * 13, 13))
"""Of 16 rows; without a GPU every fourth."""


def whole_step(place: Workplace) -> Figures:
    """Return how far the adapters' gradients differ, relative to each one's norm, in both types."""
    figures: dict[str, Any] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = adapted_base(*random_model(place, LAYERS), dtype)
        rows = random_rows(3000, LENGTHS if place.is_gpu else LENGTHS[::4])
        labelled = sum(label >= 0 for _, labels in rows for label in labels[1:])
        figures[f"{name} residual"] = residual(model, rows)
        right_loss, right = by_peft(model, rows, labelled)
        use_loratune(model)
        loss, found = by_loratune(model, rows, labelled)
        errors = [relative_error(found[name], right[name]) for name in right]
        figures[f"{name} difference"], figures[f"{name} median"] = max(errors), statistics.median(errors)
        figures[f"{name} loss difference"] = abs(loss - right_loss) / right_loss
        del model
    return figures


def by_peft(model: Any, rows: list[Any], labelled: int) -> tuple[float, dict[str, Any]]:
    """Return the loss of all rows and the gradients, with full logits and plain cross-entropy."""
    total = 0.0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float()
        targets = torch.tensor(labels[1:], device=model.device)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / labelled
        loss.backward()
        total += loss.item()
    return total, taken_gradients(model)


def by_loratune(model: Any, rows: list[Any], labelled: int, is_padded: bool = False) -> tuple[float, dict[str, Any]]:
    """Return the same of one pass with all rows, packed or padded."""
    batch = packed(rows, model.device, is_padded)
    loss = model(**batch, summed_loss=True).loss_sum / labelled
    loss.backward()
    return loss.item(), taken_gradients(model)


def taken_gradients(model: Any) -> dict[str, Any]:
    """Return the gradients by name, and take them from the model."""
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


def residual(model: Any, rows: list[Any]) -> float:
    """Return the root mean square of the last layer's output."""
    with torch.no_grad():
        ids = torch.tensor([rows[-1][0]], device=model.device)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    return states.float().square().mean().sqrt().item()
