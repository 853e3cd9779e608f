"""Loss on labelled positions against full logits and plain cross-entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.encoding import IGNORED
from loratune.training import labelled_loss
from loratune.training.labelled_loss import add_labelled_loss, summed_loss


def plain(hidden: torch.Tensor, targets: torch.Tensor, head: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head(hidden).double(), targets, reduction="sum")


@settings(deadline=None, max_examples=40)
@given(
    positions=st.integers(0, 23),
    chunk=st.sampled_from([1, 3, 100]),
    block=st.sampled_from([1, 2, 100]),
    frozen=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_full_logits(
    positions: int, chunk: int, block: int, frozen: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    head = torch.nn.Linear(6, 11, bias=bias).requires_grad_(not frozen)
    hidden = torch.randn(positions, 6, requires_grad=True)
    targets = torch.randint(11, (positions,))
    expected = plain(hidden, targets, head)
    wanted = [hidden, *(() if frozen else head.parameters())]
    gradients = torch.autograd.grad(3 * expected, wanted, materialize_grads=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled_loss, "CHUNK_BYTES", 4 * 11 * chunk)
        patch.setitem(labelled_loss.BLOCK_LOGITS, "cpu", 11 * block)
        total, losses = summed_loss(hidden, targets, head)
        found = torch.autograd.grad(3 * total, wanted, materialize_grads=True)
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.sum(), total.detach())
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_head_in_bfloat16_is_as_near_to_the_truth_as_full_logits() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 500, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(40, 64, dtype=torch.bfloat16)
    targets = torch.randint(500, (40,))

    def gradient(state: torch.Tensor, loss: Any) -> torch.Tensor:
        state = state.clone().requires_grad_()
        return torch.autograd.grad(loss(state), state)[0].double()

    exact_head = torch.nn.Linear(64, 500, bias=False, dtype=torch.float64).requires_grad_(False)
    exact_head.weight.copy_(head.weight)
    truth = gradient(hidden.double(), lambda state: plain(state, targets, exact_head))
    theirs = gradient(hidden, lambda state: plain(state, targets, head))
    mine = gradient(hidden, lambda state: summed_loss(state, targets, head)[0])
    assert (mine - truth).norm() <= 1.1 * (theirs - truth).norm()


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    head = torch.nn.Linear(4, 9, bias=False).requires_grad_(False)
    with torch.no_grad():
        total, losses = summed_loss(torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 8]), head)
    assert not total.requires_grad
    assert losses.shape == (5,)


def test_a_model_returns_the_losses_of_its_labelled_positions_and_is_else_as_before(random_qwen: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_qwen).requires_grad_(False)
    ids = torch.randint(3, 99, (3, 8))
    labels = torch.where(torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5, ids, IGNORED)
    labels[1] = IGNORED
    before = model(input_ids=ids).logits
    add_labelled_loss(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    out = model(input_ids=ids, labels=labels, attention_mask=None, summed_loss=True)
    for row in range(3):
        wanted = torch.nn.functional.cross_entropy(
            before[row, :-1], labels[row, 1:], ignore_index=IGNORED, reduction="none"
        )
        wanted = wanted[labels[row, 1:] != IGNORED]
        torch.testing.assert_close(out.losses[out.rows == row], wanted)
    torch.testing.assert_close(out.loss_sum, out.losses.sum())


def test_batches_of_all_sizes_make_products_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    made = labelled_loss._losses_then_gradients

    def noted(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.add(len(logits))
        return made(logits, *others)

    monkeypatch.setattr(labelled_loss, "_losses_then_gradients", noted)
    monkeypatch.setattr(labelled_loss, "CHUNK_BYTES", 4 * 11 * 100)
    head = torch.nn.Linear(6, 11, bias=False).requires_grad_(False)
    for positions in range(1, 300):
        assert summed_loss(torch.randn(positions, 6), torch.zeros(positions, dtype=torch.int64), head)[1].shape == (
            positions,
        )
    assert seen == {32, 64, 96}
