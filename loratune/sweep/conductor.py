"""Trains what the plan of a sweep asks for until nothing is left, the budget is used up, or a signal comes.

Any number of these may work on one folder. Each claims a trial with a lock that ends with its process, trains it, and
records the result; what comes next follows from the results alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from filelock import FileLock

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.runs.lock import lock_holder
from loratune.sweep.definition import BASE, LOGS, Sweep
from loratune.sweep.messages import Ended, Rehearsal, Trained
from loratune.sweep.plan import Failure, Outcome, Trial, Work, firsts
from loratune.sweep.pool import Pool, Running
from loratune.sweep.price import measured
from loratune.sweep.reached import reached
from loratune.sweep.report import SweepState
from loratune.sweep.study import SweepStudy


class Conductor:
    """Works on a sweep with the processes of this machine."""

    def __init__(
        self,
        sweep: Sweep,
        study: SweepStudy,
        pool: Pool,
        rehearsal: Rehearsal,
        seconds: float,
        tell: Callable[[Trial, Sequence[Trial]], None],
    ) -> None:
        """Create a conductor.

        Args:
            sweep: the sweep.
            study: its trials.
            pool: where processes run.
            rehearsal: what is known of the trials.
            seconds: until when trials may run, from now on.
            tell: called with a trial that has a new result, and all trials.
        """
        self._sweep, self._study, self._pool, self._rehearsal, self._tell = sweep, study, pool, rehearsal, tell
        self._end = time.monotonic() + seconds
        self._is_out_of_budget = False
        self._waits = False
        """Whether a process that outlives its sweep still saves a trial, which then goes on here."""
        self._tried_again = set[int]()

    def run(self) -> SweepState:
        """Train until the end, and return what it was."""
        while True:
            self._start_all()
            if self._pool.is_idle:
                if self._pool.signal:
                    return "interrupted"
                if self._sweep.plan.is_done(self._study.trials()):
                    return "finished"
                if self._is_out_of_budget:
                    return "out of budget"
            for ended in self._pool.wait():
                self._collect(ended)

    def _start_all(self) -> None:
        """Start what can be started in every free place."""
        while not self._is_out_of_budget and (place := self._pool.free()):
            claimed = self._next() or (self._next() if not self._waits and self._added() else None)
            if claimed is None:
                return
            work, claim = claimed
            trial = work.trial
            try:
                recipe = self._sweep.recipe_of(trial.settings, trial.name, trial.seed)
            except LoratuneError as error:  # of settings that tpe has put together
                self._fail(trial, Failure(int(error.exit_code), error.message))
                claim.release()
                continue
            log = self._sweep.folder / LOGS / f"{trial.name}.log"
            self._pool.start(place, (recipe,), work.share, log, work, claim)

    def _next(self) -> tuple[Work, FileLock] | None:
        """Claim the first work that no process has; None if there is none, or no time for it."""
        self._waits = False
        for work in self._sweep.plan.work(self._study.trials()):
            claim = self._study.claim(work.trial)
            if claim is None:
                continue
            if self._is_open(work) and self._is_affordable(work):
                return work, claim
            claim.release()
            if self._is_out_of_budget:
                return None
        return None

    def _is_open(self, work: Work) -> bool:
        """Return whether claimed work is still to be done, and by this process."""
        run = self._sweep.run_folder(work.trial.name)
        if self._study.trials()[work.trial.number].is_settled(work.rung):
            return False
        if lock_holder(run):
            self._waits = True
            return False
        if work.rung == self._sweep.plan.last or (outcome := self._reached(work)) is None:
            return True  # of a run that is complete, the process measures what it has forgotten
        self._record(work, outcome)  # a sweep was killed before it could
        return False

    def _is_affordable(self, work: Work) -> bool:
        price = measured(self._study.trials())
        seconds = price.of(work) if price else 0.0
        self._is_out_of_budget = time.monotonic() + seconds > self._end
        return not self._is_out_of_budget

    def _added(self) -> bool:
        """Add the trials that follow from the results so far; return whether there are any."""
        plan, sweep = self._sweep.plan, self._sweep
        with self._study.creating():
            trials = self._study.trials()
            for trial, seed in plan.repetitions(trials):
                self._study.add(trial.settings, trial.steps, trial, seed)
            if sweep.sampler == "tpe" and len(firsts(trials)) < plan.count:
                self._study.add(self._study.next_settings(sweep.recipe.seed), self._rehearsal.steps[0])
            return len(self._study.trials()) > len(trials)

    def _collect(self, running: Running) -> None:
        """Record how a process has ended."""
        assert running.work
        assert running.claim
        ended, work = running.ended(), running.work
        try:
            if ended.code == Exit.OK:
                outcome = self._reached(work, running.seconds, ended.result)
                if outcome is None:
                    self._fail(work.trial, Failure(int(Exit.BUG), "its run folder does not hold what it has trained"))
                else:
                    self._record(work, outcome)
            elif not self._goes_on(work.trial, ended):
                self._fail(work.trial, Failure(ended.code, ended.message))
        finally:
            running.claim.release()

    def _goes_on(self, trial: Trial, ended: Ended) -> bool:
        """Return whether a trial was stopped from outside: it goes on from its checkpoint, here once."""
        if 0 < ended.code < 128:
            return False
        if self._pool.signal:
            return True
        is_first = trial.number not in self._tried_again
        self._tried_again.add(trial.number)
        if is_first:
            console.warn(f"{trial.name}: {ended.message or 'it was stopped'}; it goes on from its checkpoint")
        return is_first

    def _reached(self, work: Work, seconds: float = 0.0, trained: Trained | None = None) -> Outcome | None:
        peak, forgetting = (trained.peak_memory_bytes, trained.forgetting) if trained else (None, None)
        try:
            outcome = reached(self._sweep.run_folder(work.trial.name), work.share, seconds, peak)
        except LoratuneError:  # the training tells what is damaged
            return None
        if outcome is None or not math.isfinite(outcome.loss):
            return None
        if not self._sweep.varies_base:
            return replace(outcome, forgetting=forgetting.nats_per_token if forgetting else None)
        loss = outcome.loss * self._rehearsal.bits_per_byte[work.trial.settings[BASE]]
        return replace(outcome, loss=loss, forgetting=forgetting.bits_per_byte if forgetting else None)

    def _record(self, work: Work, outcome: Outcome) -> None:
        self._study.record(work.trial, work.rung, outcome, work.rung == self._sweep.plan.last)
        self._told(work.trial)

    def _fail(self, trial: Trial, failure: Failure) -> None:
        self._study.fail(trial, failure)
        self._told(trial)

    def _told(self, trial: Trial) -> None:
        trials = self._study.trials()
        self._tell(trials[trial.number], trials)
