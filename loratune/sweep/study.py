"""The trials of a sweep in Optuna's journal, which any number of processes with a shared folder read and write.

A trial's results are attributes of Optuna's trial, so that its state changes only once nothing can follow: COMPLETE
after a whole run, FAIL after a divergence, PRUNED for what was left behind when the sweep ended. A trial that failed
otherwise stays RUNNING, because it is tried again with --resume.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from loratune.choices import BestBy
from loratune.errors import Exit, LoratuneError
from loratune.sweep.plan import Failure, Outcome, Trial, order
from loratune.sweep.space import Axis, Choices, Settings, Space, folder_name, of_use, stored

JOURNAL, CLAIMS = "study.log", "claims"
NAME = "sweep"
"""Of the study in the journal."""
FAILURE, RUNG, ROWS = "failure", "rung ", "rows"
FIRST_AT_RANDOM = 5
"""Trials of tpe before what they show counts."""


class SweepStudy:
    """The study in a sweep's folder."""

    def __init__(self, folder: Path, space: Space, best_by: BestBy = "auto") -> None:
        """Open the study, or create it.

        Args:
            folder: the sweep's folder.
            space: what the sweep varies.
            best_by: which of two results is better.

        Raises:
            LoratuneError: the journal is damaged.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._folder, self._best_by = space, folder, best_by
        (folder / CLAIMS).mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL
        # Unlike Optuna's own locks, the system releases this one when its process is killed.
        lock = FileLock(f"{path}.lock")
        with lock:
            _drop_unfinished_line(path)
        try:
            self._storage = JournalStorage(JournalFileBackend(str(path), cast(Any, lock)))
            with self.creating():
                optuna.create_study(storage=self._storage, study_name=NAME, direction="minimize", load_if_exists=True)
            self._id = self._storage.get_study_id_from_name(NAME)
        except (ValueError, KeyError, TypeError) as error:
            raise LoratuneError(
                f"{path}: damaged ({error}); restore it, or start the sweep anew in another folder", Exit.MODEL
            ) from error

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Hold what a process needs to add trials, so that no two add the same."""
        with FileLock(self._folder / CLAIMS / "study.lock"):
            yield

    def claim(self, trial: Trial) -> FileLock | None:
        """Return the lock of a trial's work; None while another process has it. Its process's end releases it."""
        lock = FileLock(self._folder / CLAIMS / f"{trial.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def trials(self) -> list[Trial]:
        """Return the trials as they stand now, in order of their numbers."""
        return [self._trial(frozen) for frozen in self._frozen()]

    def add(self, settings: Settings, steps: int, repeats: Trial | None = None, seed: int | None = None) -> None:
        """Add a trial, in one record of the journal."""
        number = len(self._frozen())
        name = folder_name(number, settings) if repeats is None else f"{repeats.name}-seed-{seed}"
        about = {"name": name, "steps": steps, "repeats": repeats.number if repeats else None, "seed": seed}
        trial = create_trial(
            state=TrialState.RUNNING,
            params={setting: stored(value) for setting, value in settings.items()},
            distributions={setting: distribution(self._space[setting]) for setting in settings},
            user_attrs=about,
        )
        self._storage.create_new_trial(self._id, trial)

    def next_settings(self, seed: int) -> Settings:
        """Return what TPE tries next: a function of the seed and the trials so far, whichever process asks."""
        earlier = self._frozen()
        sampler = TPESampler(seed=(seed + len(earlier)) % 2**32, n_startup_trials=FIRST_AT_RANDOM)
        return suggested(self._space, sampler, earlier)

    def require_rows(self, rows: str) -> None:
        """Record a hash of the rows, or compare it with what is recorded.

        Raises:
            LoratuneError: they have changed.
        """
        known = self._storage.get_study_user_attrs(self._id).get(ROWS)
        if known is None:
            self._storage.set_study_user_attr(self._id, ROWS, rows)
        elif known != rows:
            raise LoratuneError(
                f"{self._folder}: the rows have changed since the sweep began, so losses cannot be compared; restore "
                "them, or start a sweep in another folder",
                Exit.DATA,
            )

    def record(self, trial: Trial, rung: int, outcome: Outcome, is_last: bool) -> None:
        """Record what a trial has reached."""
        number = self._number(trial)
        if outcome.step not in self._storage.get_trial(number).intermediate_values:
            self._storage.set_trial_intermediate_value(number, outcome.step, outcome.loss)
        self._storage.set_trial_user_attr(number, FAILURE, None)
        self._storage.set_trial_user_attr(number, f"{RUNG}{rung}", asdict(outcome))
        if is_last:
            # One number for Optuna: exact answers are below every loss, and among equals it sees no difference.
            exact, loss = order(outcome, self._best_by)
            self._storage.set_trial_state_values(number, TrialState.COMPLETE, [exact or loss])

    def fail(self, trial: Trial, failure: Failure) -> None:
        """Record that a trial has ended without a result."""
        number = self._number(trial)
        self._storage.set_trial_user_attr(number, FAILURE, asdict(failure))
        if failure.code == Exit.DIVERGED:
            self._storage.set_trial_state_values(number, TrialState.FAIL)

    def forget_failures(self) -> list[Trial]:
        """Let trials be tried again that have failed, but for those that diverged; return them."""
        again = [one for one in self.trials() if one.failure and one.failure.code != Exit.DIVERGED]
        for trial in again:
            self._storage.set_trial_user_attr(self._number(trial), FAILURE, None)
        return again

    def close(self) -> None:
        """Mark trials that were left behind, once the sweep is complete."""
        for frozen in self._frozen():
            if frozen.state == TrialState.RUNNING and not frozen.user_attrs.get(FAILURE):
                self._storage.set_trial_state_values(frozen._trial_id, TrialState.PRUNED)

    def _frozen(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._id, deepcopy=False)

    def _number(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)

    def _trial(self, frozen: FrozenTrial) -> Trial:
        about, failure = frozen.user_attrs, frozen.user_attrs.get(FAILURE)
        rungs = {name: value for name, value in about.items() if name.startswith(RUNG)}
        return Trial(
            number=frozen.number,
            name=about["name"],
            settings=_settings(self._space, frozen.params),
            steps=about["steps"],
            repeats=about["repeats"],
            seed=about["seed"],
            outcomes={int(name.removeprefix(RUNG)): Outcome(**value) for name, value in rungs.items()},
            failure=Failure(**failure) if failure else None,
        )


def suggested(space: Space, sampler: BaseSampler, earlier: Sequence[FrozenTrial] = ()) -> Settings:
    """Return settings for one more trial, after what the earlier ones show."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    study.add_trials(earlier)
    chosen = study.ask({name: distribution(axis) for name, axis in space.items()})
    return of_use(_settings(space, chosen.params))


def random_trials(space: Space, seed: int, count: int) -> list[Settings]:
    """Return settings drawn at random, each by a generator of its own."""
    return [suggested(space, RandomSampler(seed=(seed + number) % 2**32)) for number in range(count)]


def distribution(axis: Axis) -> BaseDistribution:
    """Return what Optuna samples a setting from."""
    if isinstance(axis, Choices):
        return CategoricalDistribution([stored(value) for value in axis.values])
    if axis.is_whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
    return FloatDistribution(axis.low, axis.high, log=axis.is_log)


def _settings(space: Space, params: Mapping[str, Any]) -> Settings:
    return {name: _value(axis, params[name]) for name, axis in space.items() if name in params}


def _value(axis: Axis, param: Any) -> Any:
    if isinstance(axis, Choices):
        return next(value for value in axis.values if stored(value) == param)
    return axis.rounded(param)


def _drop_unfinished_line(path: Path) -> None:
    """Remove what a process had not finished writing when it was ended; Optuna could read nothing behind it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
            os.fsync(file.fileno())
