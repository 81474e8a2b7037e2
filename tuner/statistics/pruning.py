"""Rungs of prompts: a schedule is pruned as soon as its quality is clearly worse than what is already known.

Schedules are judged on a quarter of the search prompts first, then on half, then on all; prompts are stratified, so every
rung has all tasks. A pruned schedule is told with an estimate shrunk toward what schedules usually lose, because few prompts
exaggerate; it never becomes a finalist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tuner.config.quality import MetricLimit, composite_change, limited
from tuner.results import pareto
from tuner.statistics.bounds import continuous_drop_bounds, drop_bounds, spread

#: Shares of the search set.
SHARES = (0.25, 0.5, 1.0)
#: Share of the schedules that continue, by non-dominated rank, among those that are not clearly worse; see `top_by_rank`.
PROMOTED = 0.75


def rungs(batches: int) -> list[int]:
    """Micro-batches after which schedules are compared, the whole set last."""
    return sorted({max(1, round(share * batches)) for share in SHARES} | {batches})


def prune_reason(
    own: Mapping[str, Sequence[float]],
    ratio: float,
    baseline: Mapping[str, Sequence[float]],
    limits: Sequence[MetricLimit],
    rivals: Mapping[str, tuple[float, Sequence[float]]],
) -> str | None:
    """Why a schedule needs no more prompts, or None.

    Args:
        own: its values per metric, and "quality", on the first n prompts.
        ratio: its latency over the full schedule's.
        baseline: the full schedule's values, at least n each.
        limits: how far each metric may fall.
        rivals: key -> (latency ratio, quality per prompt) of schedules judged on the whole set.

    Uses one-sided 95 % bounds of paired differences that account for how few prompts there are, so that a handful of prompts
    on which others happened to do well does not condemn a schedule.
    """
    values = np.asarray(own["quality"], dtype=np.float64)
    count = len(values)
    for limit in limited(limits):
        differences_1N = _paired(own[limit.metric], baseline[limit.metric])[None] * limit.sign
        bounds = continuous_drop_bounds if limit.kind == "continuous" else drop_bounds
        _, lower = bounds(differences_1N, limit.change)
        if lower[0] > limit.allowed:
            return (
                f"{limit.metric} falls by {limit.amount(-differences_1N.mean())} on {count} prompts, at least "
                f"{limit.amount(lower[0])} (allowed {limit.amount(limit.allowed)})"
            )
    faster = {key: np.asarray(theirs[:count]) for key, (other, theirs) in rivals.items() if other <= ratio}
    if faster:
        width = spread(baseline["quality"][:count], composite_change(limits))
        _, lowers = drop_bounds(np.stack([values - theirs for theirs in faster.values()]), width)
        best = int(np.argmax(lowers))
        if lowers[best] > 0:
            return (
                f"worse on {count} prompts than {list(faster)[best]}, which is as fast, by at least {lowers[best]:.3f}"
            )
    return None


def _paired(own: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    return np.asarray(own, dtype=np.float64) - np.asarray(baseline[: len(own)], dtype=np.float64)


def top_by_rank(points: Sequence[tuple[float, float]], share: float = PROMOTED) -> list[int]:
    """Indices of the (latency, quality) points to continue with, best non-dominated ranks first: at least one; within the
    last rank, the fastest."""
    left, order = list(range(len(points))), []
    while left:
        rank = [left[i] for i in pareto.front([points[i] for i in left])]
        order += rank
        left = [i for i in left if i not in rank]
    return order[: max(1, int(np.ceil(share * len(points))))]


def shrink_to_prior(differences: Sequence[float] | np.ndarray, known: Sequence[float]) -> float:
    """Posterior mean of a schedule's quality difference, from a few prompts and the results of other schedules.

    Normal prior with mean and variance of `known` (mean differences of all schedules so far). No prompts give the prior's
    mean, fewer than three known schedules the plain mean.

    Source: empirical Bayes for a normal mean (Efron and Morris 1975), with the variance of the mean taken from the prompts.
    """
    own = np.asarray(differences, dtype=np.float64)
    if len(known) < 3:
        return float(own.mean()) if own.size else float(np.mean(known)) if len(known) else 0.0
    center, between = float(np.mean(known)), float(np.var(known, ddof=1))
    if not own.size:
        return center
    # Two pseudo-prompts' worth of the spread among schedules: a few equal differences do not prove certainty.
    within = (own.var() * own.size + 2 * max(between, 1e-12)) / (own.size + 2) / own.size
    trust = between / (between + within) if between > 0 else 0.0
    return center + trust * (float(own.mean()) - center)
