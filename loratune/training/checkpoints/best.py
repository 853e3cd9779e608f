"""Which validation is the best: the one with most exact answers where the rows ask for such, else the lowest loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loratune.choices import BestBy, BestOf

if TYPE_CHECKING:
    from loratune.training.callbacks import Metrics

MANY = 0.5
"""Share of exact answers from which rows count as asking for them: answers in free words are hardly ever exact."""


class Validation(NamedTuple):
    """What a validation has measured."""

    step: int
    loss: float
    """Nats per labelled token."""
    exact: float | None
    """Share of exact answers; None in a record of a version that did not count them."""


def validations(metrics: Metrics) -> list[Validation]:
    """Return a run's validations, that of the untrained adapter included."""
    exact = dict(metrics.of("exact_answers"))
    return [Validation(step, loss, exact.get(step)) for step, loss in metrics.of("validation_loss")]


def judged_by(validation: Validation, best_by: BestBy) -> BestOf:
    """Return what says how good a validation is."""
    if validation.exact is None or best_by == "loss":
        return "loss"
    return "exact" if best_by == "exact" or validation.exact >= MANY else "loss"


def rank(validation: Validation, best_by: BestBy) -> tuple[float, float]:
    """Return what is larger for a better validation.

    It depends on no other validation, so that a resumed run and one that looks back choose alike. Among validations
    with equally many exact answers, the one with the lowest loss is the best.
    """
    exact = validation.exact if judged_by(validation, best_by) == "exact" else None
    return exact or 0.0, -validation.loss


def best_of(measured: list[Validation], best_by: BestBy) -> Validation | None:
    """Return the best validation after a step, the first one of equals; None if there is none."""
    trained = [one for one in measured if one.step > 0]
    return max(trained, key=lambda one: rank(one, best_by), default=None)
