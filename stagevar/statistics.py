"""Bootstrap bounds of means and medians: seeded numpy, so the same data gives the same bounds.

The tuner's one-sided bounds and verdicts (tuner.statistics.bounds) resample with the same draws.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
#: Samples whose resamples are kept, 16 MB for 1024; more would hold memory that models want.
_KEPT = 1024


def resample_indices(count: int, seed: int = 0) -> np.ndarray:
    """Indices (RESAMPLES, count) of resampled values; a few are cached, since studies ask for the same ones again and again."""
    return _kept_indices(count, seed) if count <= _KEPT else _kept_indices.__wrapped__(count, seed)


@functools.lru_cache(maxsize=2)
def _kept_indices(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, count]).integers(count, size=(RESAMPLES, count))


def mean_bounds(values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Two-sided percentile bootstrap bounds of the mean, with coverage `level`."""
    sample = np.asarray(values, dtype=np.float64)
    means = sample[resample_indices(sample.size, seed)].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def median_bounds(values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Two-sided percentile bootstrap bounds of the median, with coverage `level`."""
    sample = np.asarray(values, dtype=np.float64)
    medians, tail = np.median(sample[resample_indices(sample.size, seed)], axis=1), (1 - level) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


def ratio_bounds(
    samples_ms: Sequence[float], baseline_ms: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of two schedules timed in the same rounds: (median of the paired ratios, low, high), bootstrapped over rounds."""
    logs = paired_logs(samples_ms, baseline_ms)
    low, high = median_bounds(logs, level, seed)
    return float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high))


def paired_logs(samples_ms: Sequence[float], baseline_ms: Sequence[float]) -> np.ndarray:
    """Logarithm (R,) of each round's time over the baseline's time in that round."""
    logs: np.ndarray = np.log(np.asarray(samples_ms, dtype=np.float64)) - np.log(
        np.asarray(baseline_ms, dtype=np.float64)
    )
    return logs
