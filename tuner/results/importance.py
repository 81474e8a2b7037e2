"""Which searched parameter moved the outcome: a rank statistic simple enough to understand, with its chance level.

For one parameter: the outcome is ranked, the trials are grouped by the parameter's value (numbers with many values by
quartile), and the share of rank variance between groups is corrected for what random grouping gives (permutations). It
takes one parameter at a time, so it misses interactions, and a sampler that settles on good regions narrows what it can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST = 10
_PERMUTATIONS = 999


@dataclass(frozen=True)
class Importance:
    """How much one parameter moved the outcome.

    Attributes:
        share: variance of the outcome's rank that it explains above chance, 0 to 1.
        p: permutation p-value.
        n: number of trials.
    """

    parameter: str
    share: float
    p: float
    n: int


def importance(parameter: str, values: Sequence[Any], outcome: Sequence[float]) -> Importance:
    """The share of `outcome` (one number per trial) that one parameter's `values` explain.

    Raises ValueError if their numbers differ.
    """
    if len(values) != len(outcome):
        raise ValueError(f"{len(values)} values of {parameter} but {len(outcome)} outcomes")
    group_N = _groups(values)
    rank_N = _ranks(np.asarray(outcome, dtype=np.float64))
    total = float(((rank_N - rank_N.mean()) ** 2).sum())
    if group_N.max() == 0 or total == 0:
        return Importance(parameter, 0.0, 1.0, len(values))
    rng = np.random.default_rng(0)
    observed = _between(group_N, rank_N) / total
    chance = np.array([_between(group_N, rng.permutation(rank_N)) / total for _ in range(_PERMUTATIONS)])
    expected = float(chance.mean())
    share = 0.0 if expected >= 1 else max(0.0, (observed - expected) / (1 - expected))
    p = (1 + int((chance >= observed - 1e-12).sum())) / (1 + _PERMUTATIONS)
    return Importance(parameter, share, p, len(values))


def _groups(values: Sequence[Any]) -> np.ndarray:
    """Group number per trial: one group per value, or quartiles if a number takes more than six values."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numeric and len(set(values)) > 6:
        numbers = np.asarray(values, dtype=np.float64)
        edges = np.unique(np.quantile(numbers, [0.25, 0.5, 0.75]))
        return np.unique(np.searchsorted(edges, numbers, side="left"), return_inverse=True)[1]
    return np.unique([repr(v) for v in values], return_inverse=True)[1]


def _ranks(outcome_N: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(outcome_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _between(group_N: np.ndarray, rank_N: np.ndarray) -> float:
    counts = np.bincount(group_N)
    means = np.bincount(group_N, weights=rank_N) / counts
    return float((counts * (means - rank_N.mean()) ** 2).sum())
