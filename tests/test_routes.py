"""Compared models choose alike where scores nearly tie, and by themselves where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge_families import rows_of
from tiny_models import make_tiny_model
from torch import nn

from loratune.delivery.verification.parity import InState, compare_models, compare_pairs
from loratune.delivery.verification.proof import EXACT, check_parity
from loratune.delivery.verification.routes import NEAR_TIE, Routes
from loratune.model.from_folder import load_plain

SCORES = torch.tensor([[0.9, 0.5, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])


def chosen(scores: torch.Tensor, others: torch.Tensor, call: Callable[[torch.Tensor], Any]) -> Any:
    """What is chosen of scores by a model that follows another one's."""
    routes = Routes()
    follower = routes.follower()
    with routes.noted():
        call(others)
    with follower():
        return call(scores)


CALLS: list[Callable[[torch.Tensor], Any]] = [
    lambda scores: torch.topk(scores, 2, dim=-1, sorted=False),
    lambda scores: scores.topk(2),
    lambda scores: torch.topk(scores, k=2),
    lambda scores: torch.topk(scores.T, 2, 0),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_near_tie_is_decided_as_the_other_model_did(call: Callable[[torch.Tensor], Any]) -> None:
    others = SCORES.clone()
    others[0, 1], others[0, 2] = 0.2, 0.2 + NEAR_TIE / 4
    scores = SCORES.clone()
    scores[0, 1], scores[0, 2] = 0.2 + NEAR_TIE / 4, 0.2
    values, indices = chosen(scores, others, call)
    dim = 0 if indices.shape == (2, 2) and call is CALLS[3] else 1
    assert set(indices.select(1 - dim, 0).tolist()) == {0, 2}
    assert set(indices.select(1 - dim, 1).tolist()) == {0, 1}
    assert sorted(values.select(1 - dim, 0).tolist()) == pytest.approx([0.2, 0.9])


@pytest.mark.parametrize("call", CALLS[:3])
def test_clearly_higher_scores_are_chosen_whatever_the_other_model_did(call: Callable[[torch.Tensor], Any]) -> None:
    values, indices = chosen(SCORES, SCORES.flip(1), call)
    assert indices.sort().values.tolist() == [[0, 1], [0, 1]]
    assert torch.equal(values.sort().values, SCORES[:, :2].flip(1))


def test_masked_scores_are_no_ties() -> None:
    masked = torch.tensor([[0.9, float("-inf"), 0.2, 0.1]])
    _, indices = chosen(masked, torch.tensor([[0.9, 0.8, 0.2, 0.1]]), CALLS[0])
    assert set(indices[0].tolist()) == {0, 2}


def test_choices_of_other_sizes_and_outside_the_comparison_are_left_alone() -> None:
    values, _ = chosen(SCORES, torch.rand(5, 4), CALLS[0])
    assert torch.equal(values, SCORES[:, :2])
    assert torch.equal(SCORES.topk(1).values[:, 0], SCORES[:, 0])


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A mixture whose routers tie for every token, and the same one with the tie decided in another way."""
    folder = make_tiny_model("qwen3_moe", tmp_path_factory.mktemp("tied") / "model", torch.float32)
    models = [load_plain(folder), load_plain(folder)]
    for model, sign in zip(models, (1, -1), strict=True):
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                weight = module.weight.data[:1].repeat(4, 1)
                steps = 1 + sign * torch.tensor([[3e-6], [2e-6], [1e-6], [0.0]])
                module.weight = nn.Parameter(weight * steps, requires_grad=False)
    return models[0], models[1]


def test_models_that_decide_ties_differently_are_compared_on_the_same_routes(tied: tuple[Any, Any]) -> None:
    first, second = tied
    rows = rows_of(30, 20)
    (apart,) = compare_models(first, [second], rows)
    assert check_parity(apart, EXACT)
    routes = Routes()
    (together,) = compare_pairs([InState(first, routes.noted), InState(second, routes.follower())], [(0, 1)], rows)
    assert check_parity(together, EXACT) == []
    (after,) = compare_models(first, [second], rows)
    assert after == apart, "nothing may be left of the other routes"


def test_another_router_does_not_follow(tied: tuple[Any, Any], tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3_moe", tmp_path / "model", torch.float32)
    first, second = load_plain(folder), load_plain(folder)
    for module in second.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.weight = nn.Parameter(module.weight.flip(0), requires_grad=False)
    routes = Routes()
    models = [InState(first, routes.noted), InState(second, routes.follower())]
    (parity,) = compare_pairs(models, [(0, 1)], rows_of(30, 20))
    assert check_parity(parity, EXACT)
