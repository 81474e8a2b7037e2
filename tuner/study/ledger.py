"""What a study knows: every schedule seen so far, what was found out about it, and what that means under the limits.

Plain data and rules; nothing is run here. Everything is on disk before it enters (`record`), so that after a crash a study
continues with all that was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stagevar.profile import steps_to_data
from stagevar.schedule import StageSchedule, Steps, exact
from tuner.config.limits import Budget
from tuner.config.quality import MetricLimit, limited
from tuner.config.space import SearchSpace, steps_key
from tuner.evaluation.evaluator import EvaluationInfo
from tuner.evaluation.step_costs import Prediction
from tuner.proposals.trial_sampler import Proposal, TrialOutcome
from tuner.results import pareto
from tuner.results.candidate import (
    Candidate,
    Failed,
    Failure,
    Finalist,
    Interval,
    LatencyStats,
    Measured,
    Unmeasured,
    Verdict,
    Verification,
)
from tuner.results.codec import record_of
from tuner.results.run_dir import EvidenceLog
from tuner.statistics.pruning import shrink_to_prior
from tuner.study.verdict import Limits, keeps_quality


class Ledger:
    """Schedules by key, and their figures.

    Args:
        facts: of the model.
        budget, metrics: the user's limits.

    Attributes:
        full, full_key: the full schedule.
        baseline: its figures, None before it is measured.
        candidates, failed: by key.
        unmeasured: by key, those that ran out of memory in this run.
        failures: failed and unmeasured ones, in order.
        dropped: keys that were not judged, with their predicted ratios.
        foreseen: keys that the predicted front proposed.
        proved: keys of which another study proved that they keep the limits on quality.
    """

    def __init__(
        self, run_dir: Path, space: SearchSpace, facts: EvaluationInfo, budget: Budget, metrics: Sequence[MetricLimit]
    ):
        self.space, self.facts, self.budget, self.metrics = space, facts, budget, tuple(metrics)
        self.quality = not facts.random_weights
        self.evidence = EvidenceLog(run_dir)
        self.schedules: dict[str, StageSchedule] = {}
        self.steps: dict[str, Steps] = {}
        self.candidates: dict[str, Measured] = {}
        self.failed: dict[str, Failed] = {}
        self.unmeasured: dict[str, Unmeasured] = {}
        self.failures: list[Failure] = []
        self.dropped: dict[str, float] = {}
        self.foreseen: set[str] = set()
        self.proved: frozenset[str] = frozenset()
        self.baseline: Measured | Failed | None = None
        schedule = exact(len(facts.grids))
        self.full = schedule.expand(facts.grids, facts.chunks)
        self.full_key = self.register(schedule)

    def register(self, schedule: StageSchedule) -> str:
        """The schedule's key; the first schedule that expands to these steps stands for all."""
        steps = schedule.expand(self.facts.grids, self.facts.chunks)
        key = steps_key(steps)
        self.schedules.setdefault(key, schedule)
        self.steps.setdefault(key, steps)
        return key

    def expand(self, proposal: Proposal) -> tuple[str, StageSchedule, Steps]:
        """Key, schedule and steps of a proposal, not registered. Raises ScheduleError for a preset that does not fit."""
        if proposal.preset is not None:
            schedule = self.space.known_schedule(proposal.preset, self.facts.grids)
        else:
            schedule = self.space.schedule(proposal.values, self.facts.grids)
        steps = schedule.expand(self.facts.grids, self.facts.chunks)
        return steps_key(steps), schedule, steps

    def blank(self, key: str, proposal: Proposal) -> Candidate:
        """A candidate about which nothing is known yet."""
        schedule, steps, preset = self.schedules[key], self.steps[key], proposal.preset
        accelerator = schedule.accelerator
        return Candidate(
            key=key,
            params=dict(proposal.values) if preset is None else {},
            schedule=schedule.to_dict(),
            steps=tuple(steps_to_data(steps)),
            accelerator=accelerator if isinstance(accelerator, str) else "+".join(dict.fromkeys(accelerator)),
            source=f"enqueued: {preset}" if preset else "predicted" if key in self.foreseen else "sampler",
            trial=proposal.trial,
            skipped_scales=sum(step.skipped for step in steps),
            processed_tokens=float(sum(step.processed_tokens(self.facts.chunks) for step in steps)),
        )

    def record(self, kind: str, candidate: Candidate) -> None:
        """Writes what was found; returns when it is on disk."""
        self.evidence.append({"kind": kind, "candidate": record_of(candidate)})

    def record_dropped(self, trial: int, key: str, ratio: float) -> None:
        """Writes that a schedule was not judged because its predicted ratio is over the budget."""
        self.evidence.append({"kind": "dropped", "trial": trial, "key": key, "ratio": ratio})
        self.dropped[key] = ratio

    def keep(self, candidate: Measured | Failed | Unmeasured) -> None:
        """Adds what became of a schedule."""
        self.register(StageSchedule.from_dict(candidate.schedule))
        if isinstance(candidate, Measured):
            self.candidates[candidate.key] = candidate
            return
        if isinstance(candidate, Failed):
            self.failed[candidate.key] = candidate
        else:
            self.unmeasured[candidate.key] = candidate
        self.failures.append(Failure(candidate.trial_number, candidate.params, candidate.error))

    @property
    def known(self) -> frozenset[str]:
        """Keys of the schedules with something to tell the sampler."""
        return frozenset((self.full_key, *self.candidates, *self.failed, *self.unmeasured, *self.dropped))

    def knows(self, key: str) -> bool:
        """Whether there is something to tell the sampler about a schedule."""
        return key in self.known

    @property
    def evaluated(self) -> int:
        """Number of schedules that trials were spent on."""
        return len(self.candidates) + len(self.failures)

    @property
    def proved_in_time(self) -> bool:
        """Whether another study proved the quality of a schedule that is within the budget here."""
        return any(c.key in self.proved and c.latency.share <= self.budget_ratio for c in self.candidates.values())

    # ------------------------------------------------------------------------------------------------ limits

    @property
    def constraint_names(self) -> tuple[str, ...]:
        if not self.quality:
            return ("latency",)
        return ("latency", *(m.name for m in limited(self.metrics)), *(f"floor:{m}" for m in self.space.floors))

    @property
    def measured_baseline(self) -> Measured:
        """The full schedule's figures, once it has been measured."""
        assert isinstance(self.baseline, Measured)
        return self.baseline

    def measured(self, key: str) -> Measured:
        """A candidate that was measured, or the full schedule."""
        return self.measured_baseline if key == self.full_key else self.candidates[key]

    def replace(self, candidate: Measured) -> None:
        """Replaces what was known about a measured candidate, or the full schedule."""
        if candidate.key == self.full_key:
            self.baseline = candidate
        else:
            self.candidates[candidate.key] = candidate

    def finalist(self, key: str, verification: Verification) -> Finalist:
        """Adds the verification of a candidate or the full schedule."""
        finalist = self.measured(key).becomes(Finalist, verification=verification)
        self.replace(finalist)
        return finalist

    @property
    def limits(self) -> Limits:
        """What schedules must keep; known once the full schedule has been measured."""
        latency = None if self.baseline is None else self.baseline.latency
        assert latency is not None
        return Limits(self.budget, latency.median_ms, self.metrics, self.space.floors, self.quality)

    @property
    def budget_ratio(self) -> float:
        """The budget as a share of the full schedule's latency."""
        return self.limits.budget_ratio

    def with_verdicts(self, candidate: Measured) -> Measured:
        """The candidate with a verdict per constraint from the point estimates."""
        limits, latency = self.limits, candidate.latency
        ratio = latency.against_full
        scale = latency.drift_corrected_ms / ratio.mean
        verdicts = [_point("latency", limits.budget_ms, "ms", latency.drift_corrected_ms, ratio.high * scale)]
        if self.quality:
            for limit in limited(limits.metrics):
                change = candidate.differences[limit.metric]
                verdicts.append(_point(limit.name, limit.allowed, limit.unit, -change.mean, -change.low))
            for metric, floor in limits.floors.items():
                mean = float(np.mean(candidate.values[metric]))
                state = "met" if mean >= floor else "broken"
                verdicts.append(Verdict(f"floor:{metric}", floor, metric, mean, mean, state))
        met = all(v.status == "met" for v in verdicts) and candidate.fully_evaluated
        return dataclasses.replace(candidate, verdicts=tuple(verdicts), feasible=met)

    def predicted(self, prediction: Prediction) -> LatencyStats:
        """Latency figures of a schedule that was not timed: no samples, and the prediction's error as the interval."""
        full_ms, ratio = self.measured_baseline.latency.median_ms, prediction.ratio
        low, high = (ratio * (1 + sign * 1.96 * prediction.error) for sign in (-1, 1))
        return LatencyStats(
            samples_ms=(),
            median_ms=ratio * full_ms,
            p90_ms=None,
            low_ms=low * full_ms,
            high_ms=high * full_ms,
            drift_corrected_ms=ratio * full_ms,
            ratio=Interval(ratio, low, high, 0),
            predicted=True,
        )

    # ------------------------------------------------------------------------------------------------ for the sampler

    def outcome(self, candidate: Measured) -> TrialOutcome:
        """A candidate's objectives and constraints for the sampler: as shares, so that all have the same scale.

        A pruned schedule has a shrunken estimate of its quality.
        """
        limits = self.limits
        latency_ms = candidate.latency.drift_corrected_ms
        constraints = {"latency": latency_ms / limits.budget_ms - 1}
        if not self.quality:
            return TrialOutcome(latency_ms, candidate.processed_tokens, constraints)
        difference = candidate.differences["quality"].mean if candidate.differences else 0.0
        if not candidate.fully_evaluated:
            difference = shrink_to_prior(self._paired(candidate), self._known_differences())
        for limit in limited(limits.metrics):
            constraints[limit.name] = -self._metric_change(candidate, limit) / limit.allowed - 1
        for metric, floor in limits.floors.items():
            constraints[f"floor:{metric}"] = (floor - float(np.mean(candidate.values[metric]))) / max(abs(floor), 1e-9)
        prompts = len(candidate.values.get("quality", ())) or None
        return TrialOutcome(latency_ms, difference, constraints, prompts)

    def outcome_of_dropped(self, key: str) -> TrialOutcome:
        """What the sampler is told about a schedule that was not judged: over the budget, its quality the prior's guess."""
        ratio = self.dropped[key]
        constraints = dict.fromkeys(self.constraint_names, 0.0) | {"latency": ratio / self.budget_ratio - 1}
        latency_ms = ratio * self.measured_baseline.latency.median_ms
        if not self.quality:
            tokens = sum(step.processed_tokens(self.facts.chunks) for step in self.steps[key])
            return TrialOutcome(latency_ms, float(tokens), constraints, 0)
        guess = shrink_to_prior((), self._known_differences())
        for limit in limited(self.metrics):
            constraints[limit.name] = -shrink_to_prior((), self._known_differences(limit.metric)) / limit.allowed - 1
        return TrialOutcome(latency_ms, guess, constraints, 0)

    def _metric_change(self, candidate: Measured, limit: MetricLimit) -> float:
        """Mean difference of a metric, shrunken for a pruned candidate."""
        if candidate.fully_evaluated or not candidate.differences:
            return candidate.differences[limit.metric].mean if candidate.differences else 0.0
        return shrink_to_prior(
            limit.sign * self._paired(candidate, limit.metric), self._known_differences(limit.metric)
        )

    def _paired(self, candidate: Measured, metric: str = "quality") -> np.ndarray:
        own = np.asarray(candidate.values[metric])
        return own - np.asarray(self.measured_baseline.values[metric])[: own.size]

    def _known_differences(self, metric: str = "quality") -> list[float]:
        # Including pruned ones: survivors alone would give a flattering prior.
        return [c.differences[metric].mean for c in self.candidates.values() if c.differences]

    # ------------------------------------------------------------------------------------------------ comparing

    def violation(self, candidate: Measured) -> float:
        """How far the point estimates are beyond the limits, in shares; 0 if all are kept."""
        return sum(max(0.0, value) for value in self.outcome(candidate).constraints.values())

    def front(self) -> list[str]:
        """Keys of the non-dominated candidates that keep the quality limits, including the full schedule."""
        if not isinstance(self.baseline, Measured):
            return []
        pool = [self.baseline, *(c for c in self.candidates.values() if keeps_quality(c))]
        points = [(c.final_latency.drift_corrected_ms, self._gain(c)) for c in pool]
        return [pool[i].key for i in pareto.front(points)]

    def hypervolume(self) -> float:
        """Area that feasible schedules dominate within the limits: latency in shares of the full schedule's, up to the
        budget, times quality above that of a schedule that uses up every allowance (tokens left, in shares, for random
        weights)."""
        points, floor = [], -sum(m.weight for m in limited(self.metrics)) if self.quality else 0.0
        for candidate in self.candidates.values():
            if candidate.feasible:
                tokens = candidate.processed_tokens / self.measured_baseline.processed_tokens
                gain = candidate.differences["quality"].mean if self.quality else tokens
                points.append((candidate.latency.share, gain))
        return pareto.hypervolume(points, (self.budget_ratio, floor))

    def _gain(self, candidate: Measured) -> float:
        if not self.quality:
            return candidate.processed_tokens
        return candidate.final_differences["quality"].mean if candidate.final_differences else 0.0

    def rivals(self) -> dict[str, tuple[float, Sequence[float]]]:
        """Schedules judged on the whole search set: latency ratio and quality per prompt, by key."""
        return {
            c.key: (c.latency.share, c.values["quality"])
            for c in self.candidates.values()
            if c.fully_evaluated and c.values
        }


def _point(name: str, limit: float, unit: str, value: float, bound: float) -> Verdict:
    return Verdict(name, limit, unit, value, bound, "met" if value <= limit else "broken")
