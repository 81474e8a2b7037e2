"""Where a search gets latencies: predicted from step costs if these can be trusted, else timed end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stagevar.errors import InfrastructureError, OutOfDeviceMemory, first_line
from stagevar.schedule import Steps
from tuner.config.space import draws, steps_key
from tuner.evaluation.evaluator import Evaluator
from tuner.evaluation.executor import Failed, NotMeasured
from tuner.evaluation.step_costs import TOLERANCE, StepCosts
from tuner.results.candidate import LatencyStats
from tuner.study.ask_ahead import Asked
from tuner.study.finalist_times import BASELINE, timed_stats
from tuner.study.ledger import Ledger
from tuner.study.progress import Progress

SEARCH_ROUNDS = 7
#: Most warm-up runs per schedule in the search; a noisy machine never settles, and finalists are measured again.
SEARCH_WARM_UP = 4
#: Schedules drawn from the space to fill the table with their steps, and the timed walks over them.
TABLE_SCHEDULES, TABLE_ROUNDS = 24, 3
#: While schedules are predicted, one in this many rounds is timed, to keep the error honest.
CHECK_EVERY = 4


class LatencySource:
    """Latencies of one search.

    Attributes:
        table: what steps cost.
        could_not_time: whether steps could not be timed, so that there is no table.
    """

    def __init__(self, ledger: Ledger, evaluator: Evaluator, progress: Progress):
        self.ledger, self.evaluator, self.progress = ledger, evaluator, progress
        self.table = StepCosts(ledger.full, ledger.facts.chunks)
        self.could_not_time = False
        self._said_untrusted = False
        self._rounds = 0

    def fill_table(self, trials: int, seed: int) -> None:
        """Times the steps of the presets and of schedules drawn from all over the space, one image at a time."""
        ledger = self.ledger
        chosen = {ledger.full_key: ledger.full}
        chosen |= {key: steps for key, steps in ledger.steps.items() if self.table.covers(steps)}
        wanted = len(chosen) + min(TABLE_SCHEDULES, 3 * trials)
        for steps in draws(ledger.space, ledger.facts.grids, ledger.facts.chunks, seed, 20 * wanted):
            if len(chosen) >= wanted:
                break
            if self.table.covers(steps):
                chosen.setdefault(steps_key(steps), steps)
        try:
            times = self.evaluator.step_ms(list(chosen.values()), TABLE_ROUNDS)
            if times is not None:
                self.table.observe(times)
        except Exception as error:
            if isinstance(error, InfrastructureError) and not isinstance(error, OutOfDeviceMemory):
                raise
            self.could_not_time = True
            self.progress.say(f"could not time individual steps; timing schedules end to end: {first_line(error)}")

    def predicts(self, steps: Steps) -> bool:
        """Whether the table can be trusted for these steps."""
        return self.table.covers(steps) and self.table.trusted

    def hopeless(self, steps: Steps) -> float | None:
        """The predicted ratio of a schedule that is over the budget by more than the table's error, else None.

        Only reads the table, which only `measure` changes: safe on another thread between two calls of it.
        """
        if not self.predicts(steps):
            return None
        prediction = self.table.predict(steps)
        least = prediction.ratio * (1 - 2 * prediction.error)
        return prediction.ratio if least > self.ledger.budget_ratio else None

    def measure(self, pending: Sequence[Asked]) -> tuple[dict[str, LatencyStats], dict[str, Failed]]:
        """One round's latencies by key, predicted if the table can be trusted, else timed; and errors by key."""
        self._rounds += 1
        self._say_once_that_it_errs(pending)
        predicted = {p.key for p in pending if p.proposal.preset is None and self.predicts(p.steps)}
        if predicted and self._rounds % CHECK_EVERY == 0:
            predicted.discard(next(p.key for p in pending if p.key in predicted))
        timings, errors = self._timings({p.key: p.steps for p in pending if p.key not in predicted})
        full_ms = self.ledger.limits.baseline_ms
        latencies = {}
        for p in pending:
            if p.key in predicted:
                latencies[p.key] = self.ledger.predicted(self.table.predict(p.steps))
            elif p.key not in errors:
                timing, sentinel = timings[p.key]
                latencies[p.key] = timed_stats(timing, sentinel, full_ms)
                self.table.check(p.steps, latencies[p.key].share)
        return latencies, errors

    def _say_once_that_it_errs(self, pending: Sequence[Asked]) -> None:
        if self._said_untrusted or self.table.trusted or not np.isfinite(self.table.error):
            return
        if any(self.table.covers(p.steps) for p in pending):
            self._said_untrusted = True
            self.progress.say(
                f"step-cost model error is {100 * self.table.error:.1f} % (limit {100 * TOLERANCE:.0f} %); "
                "timing schedules end to end"
            )

    def _timings(self, schedules: Mapping[str, Steps]) -> tuple[dict[str, tuple[Any, Any]], dict[str, Failed]]:
        """Timings with the full schedule's of the same rounds, by key; and errors of those that have none."""
        if not schedules:
            return {}, {}
        try:
            found = self.evaluator.latency({BASELINE: self.ledger.full, **schedules}, SEARCH_ROUNDS, SEARCH_WARM_UP)
            return {key: (found[key], found[BASELINE]) for key in schedules}, {}
        except OutOfDeviceMemory as error:
            if len(schedules) == 1:
                return {}, dict.fromkeys(schedules, NotMeasured(str(error)))
        except InfrastructureError:
            raise
        except Exception as error:
            if len(schedules) == 1:
                return {}, dict.fromkeys(schedules, Failed(first_line(error)))
        timings: dict[str, tuple[Any, Any]] = {}
        broken: dict[str, Failed] = {}
        for key, steps in schedules.items():
            one, bad = self._timings({key: steps})
            timings |= one
            broken |= bad
        return timings, broken
