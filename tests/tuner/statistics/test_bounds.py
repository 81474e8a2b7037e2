"""The bounds behind "verified": coverage where it matters, honesty about few discordant pairs."""

import numpy as np
import pytest

from tuner.results.pareto import balanced, front, hypervolume
from tuner.statistics.bounds import (
    drop_bounds,
    indistinguishable,
    mean_interval,
    median_interval,
    ratio_interval,
    spread,
)


def paired_drops(rng, prompts, drop, discordance, candidates=1):
    """Differences of 0/1 metrics: a share of prompts lost, and some flipping either way on prompts common to all."""
    common = rng.random(prompts)
    flips = np.where(common < discordance / 2, 1.0, np.where(common < discordance, -1.0, 0.0))
    own = rng.random((candidates, prompts))
    return np.where(own < drop, -1.0, flips)


def test_a_drop_at_the_limit_is_verified_in_one_study_of_twenty_at_most():
    rng = np.random.default_rng(0)
    runs, wrong = 200, 0
    for _ in range(runs):
        upper, _ = drop_bounds(paired_drops(rng, 256, 0.05, 0.06, candidates=4), spread=1.0)
        wrong += bool((upper <= 0.05 * 0.97).any())
    # 5 % plus three standard errors of 200 runs.
    assert wrong / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_no_loss_is_verified_at_the_stated_number_of_prompts():
    rng = np.random.default_rng(1)
    met = [drop_bounds(paired_drops(rng, 256, 0.0, 0.10), spread=1.0)[0][0] <= 0.05 for _ in range(40)]
    assert np.mean(met) >= 0.7


def test_no_discordant_pair_does_not_prove_there_is_none():
    for prompts in (16, 64, 256):
        upper, _ = drop_bounds(np.zeros((1, prompts)), spread=1.0)
        assert upper[0] >= 2.0 / prompts


def test_more_candidates_need_a_wider_bound():
    rng = np.random.default_rng(2)
    drops = paired_drops(rng, 256, 0.03, 0.0, candidates=6)
    alone = [drop_bounds(drops[i : i + 1], 1.0)[0][0] for i in range(6)]
    together = drop_bounds(drops, 1.0)[0]
    assert (together >= np.array(alone) - 1e-9).all() and together.max() > max(alone)


def test_bounds_lie_on_their_sides():
    differences = paired_drops(np.random.default_rng(3), 128, 0.1, 0.1, candidates=3)
    upper, lower = drop_bounds(differences, 1.0)
    mean = -differences.mean(axis=1)
    assert (lower < mean).all() and (mean < upper).all()


def test_spread_is_what_is_declared_or_the_range_seen_where_that_is_larger():
    assert spread([0.0, 1.0, 0.3], 0.5) == 1.0
    assert spread([0.0, 1.0, 0.3], 5.0) == 5.0
    assert spread([1.0, 1.0], 5.0) == 5.0


def test_intervals_contain_their_estimate_and_shrink():
    rng = np.random.default_rng(4)
    small, large = mean_interval(rng.normal(size=20)), mean_interval(rng.normal(size=2000))
    assert small.low < small.mean < small.high
    assert large.high - large.low < small.high - small.low
    assert mean_interval([3.0]).high == np.inf


def test_ratio_interval_cancels_drift():
    rng = np.random.default_rng(5)
    drift = np.exp(rng.normal(0, 0.5, 40))
    ratio = ratio_interval(60 * drift, 100 * drift)
    assert ratio.mean == pytest.approx(0.6) and ratio.high - ratio.low < 1e-9
    assert median_interval(60 * drift).high - median_interval(60 * drift).low > 5


def test_indistinguishable():
    rng = np.random.default_rng(6)
    base = rng.random(200)
    assert indistinguishable(base, base)
    assert indistinguishable(base, base + rng.normal(0, 0.1, 200) * np.where(np.arange(200) % 2, 1, -1))
    assert not indistinguishable(base, base + 0.2)


def test_front_keeps_the_non_dominated_fastest_first():
    points = [(3.0, 0.0), (1.0, -0.5), (2.0, -0.6), (2.0, -0.1), (1.0, -0.5), (3.5, -0.05)]
    assert front(points) == [1, 3, 0]


def test_hypervolume_of_rectangles():
    assert hypervolume([(1.0, 1.0)], (3.0, 0.0)) == pytest.approx(2.0)
    assert hypervolume([(1.0, 1.0), (2.0, 2.0), (5.0, 9.0), (1.5, 0.5)], (3.0, 0.0)) == pytest.approx(3.0)
    assert hypervolume([], (3.0, 0.0)) == 0


def test_balanced_is_the_knee():
    assert balanced([(0.0, 0.0), (1.0, 0.9), (10.0, 1.0), (9.0, 0.2)]) == 1
