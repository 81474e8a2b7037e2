"""Times finalists and the full schedule in one round-robin, and compares the timings with the limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stagevar.errors import OutOfDeviceMemory
from stagevar.schedule import Steps
from tuner.evaluation.evaluator import Evaluator
from tuner.results.candidate import Interval, LatencyStats, Verdict
from tuner.statistics.bounds import median_interval, ratio_interval
from tuner.statistics.looks import judgement_alpha
from tuner.study.verdict import LEAST_GAIN, Limits, decide, status_of

if TYPE_CHECKING:
    from stagevar.card_state import CardState
    from stagevar.timing import Timing

#: Timing rounds after which decisions are made, with an equal share of the error each. Decided finalists drop out. Beyond
#: PATIENT_ROUNDS only those stay that the last look would decide if their estimates hold, or, if none is within the budget
#: yet, whose estimates are.
ROUNDS = (15, 30, 60, 120, 240)
PATIENT_ROUNDS = 60
BASELINE = "baseline"


def latency_stats(
    samples_ms: Sequence[float],
    baseline_samples_ms: Sequence[float] | None,
    baseline_ms: float | None,
    warm_up_runs: int = 0,
    warmed: bool = True,
    disturbed: Sequence[str] = (),
    card: Sequence[CardState] = (),
) -> LatencyStats:
    """Figures of one schedule, with the ratio if the baseline's samples of the same rounds are given.

    The ratio is scaled to `baseline_ms`; None takes the schedule's own median. `card` holds its states around the samples.
    """
    median = median_interval(samples_ms)
    ratio = None if baseline_samples_ms is None else ratio_interval(samples_ms, baseline_samples_ms)
    corrected = median.mean if ratio is None or baseline_ms is None else ratio.mean * baseline_ms
    return LatencyStats(
        samples_ms=tuple(samples_ms),
        median_ms=median.mean,
        p90_ms=float(np.percentile(samples_ms, 90)),
        low_ms=median.low,
        high_ms=median.high,
        drift_corrected_ms=corrected,
        ratio=ratio,
        warmup_runs=warm_up_runs,
        settled=warmed,
        disturbed=tuple(disturbed),
        card=tuple(card),
    )


def timed_stats(timing: Timing, full: Timing | None = None, full_ms: float | None = None) -> LatencyStats:
    """Figures of a timing, with the ratio, scaled to `full_ms`, if the full schedule's of the same rounds is given."""
    return latency_stats(
        timing.samples_ms,
        None if full is None else full.samples_ms,
        full_ms,
        timing.warm_up_runs,
        timing.warmed,
        timing.disturbed,
        timing.card,
    )


class FinalistTimes:
    """Timings of finalists and the full schedule.

    Args:
        finalists: key -> steps; those that run out of memory are removed.
        full: the full schedule's steps.
        note: called with a line of progress and the share done.
        stop: asked between looks whether to end early.
        extensions: earlier judgments of the study.

    Attributes:
        unmeasured: why finalists left, by key.
        cut_short: whether `stop` ended it before everything was decided.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        finalists: dict[str, Steps],
        full: Steps,
        limits: Limits,
        note: Callable[[str, float], None] = lambda line, share: None,
        stop: Callable[[], bool] = lambda: False,
        extensions: int = 0,
    ):
        self.evaluator, self.finalists, self.full, self.limits = evaluator, finalists, full, limits
        self.note, self.stop, self.extensions, self.cut_short = note, stop, extensions, False
        self.samples: dict[str, list[float]] = {name: [] for name in (BASELINE, *finalists)}
        self.warmth: dict[str, tuple[int, bool]] = {}
        self.disturbed: dict[str, None] = {}
        self.card: dict[str, tuple[CardState, ...]] = {}
        self.unmeasured: dict[str, str] = {}

    def take(self) -> None:
        """Times everything until each finalist is decided or out of patience."""
        names = list(self.finalists)
        for rounds in ROUNDS:
            missing = rounds - len(self.samples[BASELINE])
            self.note(f"timing {len(names)} finalists and the full schedule, {rounds} rounds", 0.0)
            for name, timing in self._timings(names, missing).items():
                self.samples[name] += timing.samples_ms
                runs, _ = self.warmth.get(name, (0, True))
                self.warmth[name] = (runs + timing.warm_up_runs, timing.warmed)
                self.disturbed |= dict.fromkeys(timing.disturbed)
                self.card[name] = timing.card
            # A finalist that sits a look out stays out: samples are paired with the full schedule's of the first rounds.
            names = [n for n in names if n in self.finalists and self._worth_timing(n, rounds)]
            if not names:
                break
            if self.stop():
                self.cut_short = rounds < ROUNDS[-1]
                break

    def _worth_timing(self, name: str, rounds: int) -> bool:
        """Whether a finalist is undecided and more than `rounds` would, or early on might, decide it."""
        undecided = [v for v in self.verdicts(name) if v.status == "open"]
        if not undecided or rounds < PATIENT_ROUNDS:
            return bool(undecided)
        if all(v.value <= v.limit for v in undecided) and all(self.status(n) != "met" for n in self.finalists):
            return True  # otherwise the study ends inconclusive, and a resume times everything again
        shrinks = (rounds / ROUNDS[-1]) ** 0.5
        return all(abs(v.limit - v.value) >= (v.bound - v.value) * shrinks for v in undecided)

    def _timings(self, names: Sequence[str], rounds: int) -> Mapping[str, Timing]:
        """Timings of the full schedule and these finalists; those that do not fit beside it in memory leave."""
        chosen = {name: self.finalists[name] for name in names}
        try:
            return self.evaluator.latency({BASELINE: self.full, **chosen}, rounds)
        except OutOfDeviceMemory:
            if not chosen:
                raise
        for name, steps in list(chosen.items()):
            try:
                self.evaluator.latency({BASELINE: self.full, name: steps}, 1, 1)
            except OutOfDeviceMemory as error:
                self.leave(name, str(error))
                del chosen[name]
        return self.evaluator.latency({BASELINE: self.full, **chosen}, rounds)

    def _beside(self, name: str) -> list[float]:
        """The full schedule's samples from the rounds in which this one was timed."""
        return self.samples[BASELINE][: len(self.samples[name])]

    def leave(self, name: str, error: str) -> None:
        """Removes a finalist that ran out of memory."""
        del self.finalists[name]
        self.unmeasured[name] = f"not measured here: {error}"

    def verdicts(self, name: str) -> list[Verdict]:
        """Verdicts on the latency and, for finalists, on the gain."""
        # One-sided, for all finalists and looks together (Bonferroni): timings are cheap, so this costs only a few rounds.
        # Every judgment takes new timings and may accept a limit by luck, so judgments share the 5 % as those on prompts do.
        level = 1 - 2 * judgement_alpha(self.extensions) / len(ROUNDS) / max(1, len(self.finalists))
        own = median_interval(self.samples[name], level)
        budget_ms = self.limits.budget_ms
        if name == BASELINE:
            if self.limits.budget.fraction is not None:
                own = Interval(self.limits.baseline_ms, self.limits.baseline_ms, self.limits.baseline_ms, own.n)
            return [Verdict("latency", budget_ms, "ms", own.mean, own.high, decide(budget_ms, own.low, own.high))]
        ratio = ratio_interval(self.samples[name], self._beside(name), level)
        if self.limits.budget.fraction is not None:
            scale = self.limits.baseline_ms
            own = Interval(ratio.mean * scale, ratio.low * scale, ratio.high * scale, own.n)
        return [
            Verdict("latency", budget_ms, "ms", own.mean, own.high, decide(budget_ms, own.low, own.high)),
            Verdict("gain", LEAST_GAIN, "ratio", ratio.mean, ratio.high, decide(LEAST_GAIN, ratio.low, ratio.high)),
        ]

    def status(self, name: str) -> str:
        """ "met", "broken" or "open"."""
        return status_of(self.verdicts(name))

    def stats(self, name: str) -> LatencyStats:
        """Current figures of a finalist or the full schedule."""
        share = self.limits.budget.fraction is not None
        return latency_stats(
            self.samples[name],
            None if name == BASELINE else self._beside(name),
            self.limits.baseline_ms if share else None,
            *self.warmth[name],
            tuple(self.disturbed),
            self.card[name],
        )
