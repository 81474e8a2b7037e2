"""What each single change to the full schedule costs, and what sums of these costs say of every other schedule.

A schedule is the full one with changes: guidance that ends at a scale, fewer tokens at a scale, a scale left out, another
precision at a scale. Each change alone is a schedule, too, and shares the full one's scales up to its own, so a few dozen of
them are cheap to evaluate as one prefix tree. The difference to the full schedule's image, summed over the changes of any
other schedule, predicts that schedule's. Differences are added per prompt, so a prediction has the standard error of a
paired difference. Where changes need each other to do harm the sum is wrong, and `Agreement` says how wrong.

Pure: nothing is run here.

Source: sensitivity tables of mixed-precision quantization, e.g. HAWQ-V3 (arXiv 2011.10680), which choose bits per layer by
sums; ours are paired per prompt and of image metrics, where theirs are of the loss's curvature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from stagevar.schedule import BOTH, Branch, LowRank, Pivotal, ScaleStep, Steps
from stagevar.schedule.steps import Reduction


@dataclass(frozen=True)
class GuidanceEnds:
    """From `scale` on only `branch` runs; above 0, the layers before `fuse_layer` still run both at that scale."""

    scale: int
    branch: Branch
    fuse_layer: int = 0


@dataclass(frozen=True)
class FewerTokens:
    """The tokens of `scale` are reduced, guidance as it is in the full schedule."""

    scale: int
    reduction: Reduction
    tokens: int

    @property
    def share(self) -> float:
        """Kept tokens over all tokens, averaged over chunks."""
        if isinstance(self.reduction, LowRank):
            return sum(self.reduction.ranks) / len(self.reduction.ranks) / self.tokens
        return self.reduction.kept / self.tokens

    @property
    def kind(self) -> tuple[int, Reduction]:
        """The scale and what all amounts of this reduction have in common: costs are interpolated within a kind."""
        if isinstance(self.reduction, LowRank):
            return self.scale, dataclasses.replace(self.reduction, ranks=())
        return self.scale, dataclasses.replace(self.reduction, kept=0)


@dataclass(frozen=True)
class LeftOut:
    """A scale that is not run."""

    scale: int


@dataclass(frozen=True)
class Precision:
    """The products of a scale's blocks are taken in another precision."""

    scale: int
    precision: str


Change = GuidanceEnds | FewerTokens | LeftOut | Precision


def changes_of(steps: Steps) -> tuple[Change, ...]:
    """How a schedule differs from the full one. Raises ValueError for one that decides per image."""
    found: list[Change] = []
    guided = True
    for step in steps:
        if step.decision is not None:
            raise ValueError(f"scale {step.scale} decides per image: no sum of changes predicts what it chooses")
        if step.skipped:
            found.append(LeftOut(step.scale))
            continue
        if guided and (step.branches != BOTH or step.fuse_layer):
            branch = BOTH[0] if step.fuse_layer else step.branches[0]
            found.append(GuidanceEnds(step.scale, branch, step.fuse_layer))
            guided = False
        if step.reduction is not None:
            found.append(FewerTokens(step.scale, step.reduction, step.tokens))
        if step.precision != "model":
            found.append(Precision(step.scale, step.precision))
    return tuple(found)


def alone(change: Change, full: Steps) -> Steps:
    """The full schedule with this one change."""

    def changed(step: ScaleStep) -> ScaleStep:
        match change:
            case GuidanceEnds(scale, branch, fuse_layer) if step.scale > scale or (
                step.scale == scale and not fuse_layer
            ):
                return dataclasses.replace(step, branches=(branch,))
            case GuidanceEnds(scale, _, fuse_layer) if step.scale == scale:
                return dataclasses.replace(step, fuse_layer=fuse_layer)
            case FewerTokens(scale, reduction, _) if step.scale == scale:
                return dataclasses.replace(step, reduction=reduction)
            case FewerTokens(_, Pivotal() as reduction, _) if step.scale == reduction.cache_scale:
                return dataclasses.replace(step, keeps=reduction.layers)
            case LeftOut(scale) if step.scale == scale:
                return dataclasses.replace(step, skipped=True, branches=())
            case Precision(scale, precision) if step.scale == scale:
                return dataclasses.replace(step, precision=precision)
        return step

    return tuple(changed(step) for step in full)


def changes_to_measure(schedules: Iterable[Steps], levels: int = 2) -> list[Change]:
    """The changes that the sums of these schedules need: all of them, but of each kind of reduction only `levels` amounts.

    The amounts are those nearest to evenly spaced shares between the smallest and the largest that occur. Ordered by scale,
    latest first: neighbors share most of their work. Schedules that decide per image are passed over.
    """
    single: set[Change] = set()
    kinds: dict[tuple[int, Reduction], set[FewerTokens]] = {}
    for steps in schedules:
        if any(step.decision is not None for step in steps):
            continue
        for change in changes_of(steps):
            if isinstance(change, FewerTokens):
                kinds.setdefault(change.kind, set()).add(change)
            else:
                single.add(change)
    for found in kinds.values():
        shares = sorted(change.share for change in found)
        for wanted in np.linspace(shares[0], shares[-1], levels):
            single.add(min(found, key=lambda change: (abs(change.share - wanted), repr(change))))
    return sorted(single, key=lambda change: (-change.scale, repr(change)))


@dataclass(frozen=True)
class Predicted:
    """Mean difference to the full schedule (positive is better) and its standard error over prompts."""

    mean: float
    standard_error: float


class SumModel:
    """Differences of schedules as sums of the differences that single changes make.

    Args:
        differences: per change, (N,) paired differences of one metric on the same prompts, candidate minus full schedule,
            positive is better. At least two prompts.

    Raises ValueError for rows of unequal length.
    """

    def __init__(self, differences: Mapping[Change, Sequence[float]]):
        self._rows = {change: np.asarray(row, dtype=np.float64) for change, row in differences.items()}
        lengths = {row.size for row in self._rows.values()}
        if len(lengths) > 1 or lengths == {0}:
            raise ValueError(f"every change needs the same prompts, not {sorted(lengths)} of them")
        self.prompts = lengths.pop() if lengths else 0
        self._levels: dict[tuple[int, Reduction], list[FewerTokens]] = {}
        for change in self._rows:
            if isinstance(change, FewerTokens):
                self._levels.setdefault(change.kind, []).append(change)
        for found in self._levels.values():
            found.sort(key=lambda change: change.share)

    def predict(self, steps: Steps) -> Predicted | None:
        """None where a change was not measured, in any amount."""
        total_N = np.zeros(self.prompts)
        for change in changes_of(steps):
            row_N = self._row(change)
            if row_N is None:
                return None
            total_N = total_N + row_N
        error = float(total_N.std(ddof=1) / np.sqrt(self.prompts)) if self.prompts > 1 else float("inf")
        return Predicted(float(total_N.mean()) if self.prompts else 0.0, error)

    def _row(self, change: Change) -> np.ndarray | None:
        if change in self._rows or not isinstance(change, FewerTokens):
            return self._rows.get(change)
        levels = self._levels.get(change.kind)
        if not levels:
            return None
        # All tokens cost nothing; below the smallest measured amount nothing is known, so it costs as much as that.
        shares = [level.share for level in levels] + [1.0]
        rows_LN = np.stack([*(self._rows[level] for level in levels), np.zeros(self.prompts)])
        above = int(np.searchsorted(shares, change.share))
        if above == 0:
            return rows_LN[0]
        low, high = shares[above - 1], shares[above]
        part = (change.share - low) / (high - low)
        row_N: np.ndarray = (1 - part) * rows_LN[above - 1] + part * rows_LN[above]
        return row_N


@dataclass(frozen=True)
class Agreement:
    """How well sums predict what was measured.

    rank_correlation: Spearman's, None where it is not defined. coverage: share of the schedules whose measured mean is
    within 1.96 standard errors of the difference between the two. bias: mean of measured minus predicted. count: schedules.
    """

    rank_correlation: float | None
    coverage: float
    bias: float
    count: int


def agreement(predicted: Sequence[Predicted], measured: Sequence[Sequence[float]]) -> Agreement:
    """measured: per schedule, paired differences on prompts of their own. Raises ValueError for fewer than two schedules."""
    if len(predicted) != len(measured) or len(predicted) < 2:
        raise ValueError(f"agreement needs two schedules or more, not {len(predicted)} predicted and {len(measured)}")
    means = np.array([np.mean(row) for row in measured])
    errors = np.array([np.std(row, ddof=1) / np.sqrt(len(row)) for row in measured])
    expected = np.array([p.mean for p in predicted])
    spread = 1.96 * np.hypot(errors, [p.standard_error for p in predicted])
    varied = np.ptp(means) > 0 and np.ptp(expected) > 0
    correlation = float(stats.spearmanr(expected, means).statistic) if varied else None
    within = np.abs(means - expected) <= spread + 1e-12
    return Agreement(correlation, float(within.mean()), float((means - expected).mean()), len(means))
