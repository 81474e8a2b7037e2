"""What steps cost, measured once: predicts the latency ratio of any schedule, and how far to trust the prediction.

A step's cost depends on its scale, on the tokens and branches that it runs and on the cache that it attends to. Timed walks
over a few schedules fill the table, in shares of the full schedule's scales in the same round, so that clock drift cancels
out. A step that was timed with the same cache length is looked up; any other is interpolated by ridge regression on the
arithmetic of a transformer layer (launches, linear layers, attention, reductions), corrected by the nearest timed steps of
its kind. Whole schedules timed end to end correct the sum and give the error that every run reports.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stagevar.schedule import LowRank, Pivotal, Plugged, ScaleStep, Steps

#: Root mean square error of predicted ratios above which schedules are timed instead.
TOLERANCE = 0.05
#: Whole schedules to time before the error is trusted.
LEAST_CHECKS = 4
#: Ridge, relative to the scaled features: prevents wild slopes when there are few timings.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Prediction:
    """A latency over the full schedule's.

    Attributes:
        ratio: the prediction.
        error: relative, one standard deviation.
        interpolated: number of steps that were not in the table.
    """

    ratio: float
    error: float
    interpolated: int


@dataclass(frozen=True)
class _Entry:
    step: ScaleStep
    cached: float
    share: float


class StepCosts:
    """The table of one study.

    Args:
        full: the full schedule's steps.
        chunks: of the model.
    """

    def __init__(self, full: Steps, chunks: int):
        self.full, self.chunks = full, chunks
        self.fixed_share = 0.0
        self._entries: dict[tuple[ScaleStep, float], _Entry] = {}
        self._scale = np.ones(1)
        self._weights = np.zeros(1)
        self._checks: dict[Steps, float] = {}
        self._kin: dict[tuple[object, ...], list[_Entry]] = {}
        self._costs: dict[tuple[ScaleStep, float], float] = {}

    # ------------------------------------------------------------------------------------------------ filling

    def observe(self, samples_ms: Mapping[Steps, Sequence[float]]) -> None:
        """Adds timed walks: for each prefix of steps, the milliseconds of its last step, a sample per round.

        The empty prefix holds the fixed cost of an image (text, start, decoding). Raises ValueError unless the full
        schedule's prefixes are included.
        """
        prefixes = [self.full[: depth + 1] for depth in range(len(self.full))]
        if any(prefix not in samples_ms for prefix in prefixes):
            raise ValueError("the full schedule was not among the timed ones")
        unit_R = np.sum([samples_ms[prefix] for prefix in prefixes], axis=0)
        if () in samples_ms:
            self.fixed_share = float(np.median(np.asarray(samples_ms[()]) / unit_R))
        for prefix, values in samples_ms.items():
            if not prefix or prefix[-1].skipped:
                continue
            step, cached = prefix[-1], self._cached(prefix, len(prefix) - 1)
            share = float(np.median(np.asarray(values) / unit_R))
            self._entries[step, cached] = _Entry(step, cached, share)
        self._fit()
        self._forget_errors()

    def check(self, steps: Steps, ratio: float) -> None:
        """Adds a schedule's ratio as timed end to end; ignores schedules with a decision point."""
        if self.covers(steps) and ratio > 0:
            self._checks[steps] = float(ratio)
            self._forget_errors()

    # ------------------------------------------------------------------------------------------------ asking

    def covers(self, steps: Steps) -> bool:
        """Whether the steps have no decision point, so that there is one latency to predict."""
        return all(step.decision is None for step in steps)

    @property
    def filled(self) -> bool:
        """Whether steps were timed, so that predictions exist, trusted or not."""
        return bool(self._entries)

    @property
    def checks(self) -> int:
        """Number of schedules timed end to end."""
        return len(self._checks)

    @property
    def error(self) -> float:
        """Root mean square relative error of predicted ratios, each schedule left out of its own correction.

        Infinite before steps and `LEAST_CHECKS` whole schedules were timed.
        """
        if not self._entries or len(self._checks) < LEAST_CHECKS:
            return np.inf
        logs = self._log_errors
        left_out = np.array([logs[i] - np.median(np.delete(logs, i)) for i in range(len(logs))])
        return float(np.sqrt(np.mean(np.expm1(left_out) ** 2)))

    @functools.cached_property
    def _log_errors(self) -> np.ndarray:
        """Logarithm of timed over predicted ratio of every schedule timed end to end; reset when timings are added."""
        return np.array([np.log(ratio / self._raw(steps)[0]) for steps, ratio in self._checks.items()])

    def _forget_errors(self) -> None:
        self.__dict__.pop("_log_errors", None)

    @property
    def trusted(self) -> bool:
        """Whether predictions may replace timings."""
        return self.error <= TOLERANCE

    def predict(self, steps: Steps) -> Prediction:
        """Latency ratio of a schedule. Raises ValueError for one with a decision point, or before anything was timed."""
        if not self._entries or not self.covers(steps):
            raise ValueError("no timings to predict from" if not self._entries else "a decision has no single latency")
        ratio, interpolated = self._raw(steps)
        if self._checks:
            ratio *= float(np.exp(np.median(self._log_errors)))
        return Prediction(ratio, self.error, interpolated)

    def scale_shares(self, steps: Steps) -> list[float]:
        """Predicted cost per scale in shares of the full schedule's scales, 0 where skipped."""
        return [
            0.0 if step.skipped else self._cost(step, self._cached(steps, index))[0] for index, step in enumerate(steps)
        ]

    # ------------------------------------------------------------------------------------------------ inside

    def _raw(self, steps: Steps) -> tuple[float, int]:
        total, interpolated = self.fixed_share, 0
        for index, step in enumerate(steps):
            if step.skipped:
                continue
            cost, known = self._cost(step, self._cached(steps, index))
            total += cost
            interpolated += not known
        return total / (1 + self.fixed_share), interpolated

    def _cached(self, steps: Steps, index: int) -> float:
        """Cache entries per branch and layer, averaged over chunks, that step `index` finds."""
        branches = steps[index].branches
        return sum(
            step.processed_tokens(self.chunks) / len(step.branches)
            for step in steps[:index]
            if not step.skipped and set(branches) <= set(step.branches)
        )

    def _cost(self, step: ScaleStep, cached: float) -> tuple[float, bool]:
        entry = self._entries.get((step, cached))
        if entry is not None:
            return entry.share, True
        known = self._costs.get((step, cached))
        if known is None:
            known = self._costs[step, cached] = self._interpolated(step, cached)
        return known, False

    def _interpolated(self, step: ScaleStep, cached: float) -> float:
        own = float(self._features(step, cached) / self._scale @ self._weights)
        kin = self._kin.get(_kind(step), [])
        if kin:
            point = np.array([step.processed_tokens(self.chunks), cached])
            span = max(1.0, step.tokens * len(step.branches))
            distance = np.array(
                [np.abs(np.array([e.step.processed_tokens(self.chunks), e.cached]) - point).sum() / span for e in kin]
            )
            weight = 1 / (distance + 0.05)
            off = [e.share - float(self._features(e.step, e.cached) / self._scale @ self._weights) for e in kin]
            own += float(weight @ off / weight.sum())
        floor = 0.25 * min(e.share for e in self._entries.values())
        return max(own, floor)

    def _features(self, step: ScaleStep, cached: float) -> np.ndarray:
        scale = np.zeros(len(self.full))
        scale[step.scale] = 1
        branches = len(step.branches)
        rows = step.processed_tokens(self.chunks)
        kept = rows / branches
        reduction = step.reduction
        mixing = sites = pivotal = 0.0
        if isinstance(reduction, LowRank):
            sites = branches * step.tokens * (self.chunks if reduction.site == "chunk" else 1)
            mixing = sites * kept if reduction.projection == "gaussian" else 0.0
        elif isinstance(reduction, Pivotal):
            pivotal = branches * step.tokens
        keeps = float(step.keeps is not None) * branches * step.tokens
        attended = rows * (cached + kept)
        return np.array([*scale, branches, rows, attended, sites, mixing, pivotal, float(reduction is not None), keeps])

    def _fit(self) -> None:
        entries = list(self._entries.values())
        matrix = np.stack([self._features(e.step, e.cached) for e in entries])
        self._scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
        shares = np.array([e.share for e in entries])
        # Relative residuals: a large scale's error must not drown out a small one's.
        weight = 1 / np.maximum(shares, 0.05 * shares.max())
        scaled = matrix / self._scale * weight[:, None]
        gram = scaled.T @ scaled + _RIDGE * np.eye(scaled.shape[1])
        self._weights = np.linalg.solve(gram, scaled.T @ (shares * weight))
        self._kin, self._costs = {}, {}
        for entry in entries:
            self._kin.setdefault(_kind(entry.step), []).append(entry)


def _kind(step: ScaleStep) -> tuple[object, ...]:
    """Steps of one kind differ in numbers only."""
    reduction = step.reduction
    how: tuple[object, ...] = (type(reduction),)
    if isinstance(reduction, LowRank):
        how += (reduction.site, reduction.projection, reduction.rope)
    elif isinstance(reduction, Pivotal):
        how += (reduction.layers, *([reduction.accelerator] if isinstance(reduction, Plugged) else []))
    return (dataclasses.replace(step, reduction=None), *how)
