"""Paired statistics: bootstrap intervals over prompts, one-sided bounds that stay honest for few discordant pairs.

All of it is seeded numpy; the same data gives the same verdict. Differences are candidate minus full schedule, positive is
better; a drop is minus that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuner.result import Interval

RESAMPLES = 2000
ALPHA = 0.05


def mean_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of per-prompt values with a two-sided percentile bootstrap interval. One value gives an infinite interval."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("an interval needs at least one value")
    if sample.size == 1 or not np.isfinite(sample).all():
        return Interval(float(sample.mean()), -np.inf, np.inf, sample.size, level)
    means = sample[_draws(sample.size, seed)].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sample.mean()), float(low), float(high), sample.size, level)


def drop_bounds(
    differences_KN: np.ndarray, spread: float, alpha: float = ALPHA, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """One-sided bounds (upper, lower), each (K,), of K mean drops measured on the same N prompts.

    The upper bounds hold together with probability 1 - alpha whichever candidate is then chosen (max-t over a bootstrap of
    prompts, drawn jointly, so that candidates that fail on the same prompts cost little). The lower bounds are for giving
    up on a candidate and are not adjusted.

    spread: what one prompt can change by (range of the full schedule's values). Two pseudo-prompts of +-spread are added
        to every standard error, so that seeing no discordant pair does not prove there is none: with no difference in N
        prompts the bound is about 2.3 spread / N.

    Source: the adjustment is Agresti and Min's for matched pairs (2005), carried from cells to values; max-t is Westfall
    and Young's.
    """
    drops_KN = -np.asarray(differences_KN, dtype=np.float64)
    count = drops_KN.shape[1]
    mean_K = drops_KN.mean(axis=1)
    variance_K = (drops_KN.var(axis=1) * count + 2 * spread**2) / (count + 2)
    error_K = np.sqrt(variance_K / count)
    if not error_K.any():
        return mean_K, mean_K
    safe_K = np.where(error_K > 0, error_K, 1.0)
    draws = _draws(count, seed)
    deviations_RK = np.stack([row[draws].mean(axis=1) for row in drops_KN], axis=1) - mean_K
    # The pseudo-prompts' share of the error is drawn too, else rare discordance would make the quantile itself too small.
    extra_K = spread * np.sqrt(2 / (count + 2) / count)
    noise_R1 = np.random.default_rng([seed, 1]).standard_normal((RESAMPLES, 1))
    studentised_RK = (deviations_RK + extra_K * noise_R1) / safe_K
    one_sided = np.quantile(studentised_RK, 1 - alpha, axis=0)
    together = float(np.quantile(studentised_RK.max(axis=1), 1 - alpha))
    # A bootstrap quantile below the normal one is luck of a small sample, not evidence.
    upper_K = mean_K + np.maximum(together, 1.645) * error_K
    lower_K = mean_K - np.maximum(one_sided, 1.645) * error_K
    return upper_K, lower_K


def spread(baseline_values: Sequence[float], weight_total: float) -> float:
    """What one prompt can change the quality by: the range seen, but never less than the weights say for 0/1 metrics."""
    sample = np.asarray(baseline_values, dtype=np.float64)
    seen = float(sample.max() - sample.min()) if sample.size else 0.0
    return seen if seen > 0 else weight_total


def indistinguishable(first: Sequence[float], second: Sequence[float], level: float = 0.95, seed: int = 0) -> bool:
    """Whether the paired difference of two candidates on the same prompts may be zero."""
    interval = mean_interval(np.asarray(first) - np.asarray(second), level, seed)
    return interval.low <= 0 <= interval.high


def ratio_interval(
    samples_ms: Sequence[float], baseline_ms: Sequence[float], level: float = 0.95, seed: int = 0
) -> Interval:
    """Latency ratio of two schedules timed in the same rounds: median of paired log-ratios, bootstrapped over rounds."""
    logs = np.log(np.asarray(samples_ms, dtype=np.float64)) - np.log(np.asarray(baseline_ms, dtype=np.float64))
    medians = np.median(logs[_draws(logs.size, seed)], axis=1)
    low, high = np.exp(np.quantile(medians, [(1 - level) / 2, (1 + level) / 2]))
    ratio = float(np.exp(np.median(logs)))
    if logs.size < 2:
        return Interval(ratio, 0.0, np.inf, logs.size, level)
    return Interval(ratio, float(low), float(high), logs.size, level)


def median_interval(samples: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """Median with a two-sided bootstrap interval (`mean` holds the median)."""
    sample = np.asarray(samples, dtype=np.float64)
    medians = np.median(sample[_draws(sample.size, seed)], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(sample)), float(low), float(high), sample.size, level)


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, count]).integers(count, size=(RESAMPLES, count))
