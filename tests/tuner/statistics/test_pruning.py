"""Rungs of prompts: what is stopped, what never is, and what the sampler hears of it."""

import numpy as np
import pytest

from tuner.config.prompts import in_turn
from tuner.config.quality import quality_limits
from tuner.metrics.quality_spec import QualitySpec
from tuner.statistics.pruning import prune_reason, rungs, shrink_to_prior, top_by_rank


@pytest.mark.parametrize(
    ("batches", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (10, [2, 5, 10]), (16, [4, 8, 16])]
)
def test_rungs_are_a_quarter_a_half_and_all(batches, expected):
    assert rungs(batches) == expected


BASE = {"geneval_nano": np.ones(64), "quality": np.ones(64)}


def worse(own, ratio, max_drop, rivals):
    limits = quality_limits({"geneval_nano": QualitySpec()}, max_drop)
    return prune_reason({"geneval_nano": own, "quality": own / max_drop}, ratio, BASE, limits, rivals)


def values(drop, count, seed=0):
    return (np.random.default_rng(seed).random(count) >= drop).astype(float)


def test_a_large_loss_is_stopped_on_few_prompts_and_a_small_one_never():
    assert "at least" in worse(values(0.6, 16), 0.5, 0.05, {})
    for seed in range(50):
        assert worse(values(0.04, 16, seed), 0.5, 0.05, {}) is None


def test_a_schedule_at_the_limit_is_stopped_in_few_cases():
    """One-sided 95 % bounds, two looks: at most about one in ten of those that just keep the limit."""
    stopped = sum(any(worse(values(0.2, 64, seed)[:n], 0.5, 0.2, {}) for n in (16, 32)) for seed in range(400))
    assert 0 < stopped < 60


def test_only_a_rival_that_is_as_fast_stops():
    own, rival = values(0.5, 32, 1), np.ones(64)
    assert "rival" in worse(own, 0.6, 1.0, {"rival": (0.6, rival)})
    assert worse(own, 0.6, 1.0, {"rival": (0.61, rival)}) is None


def test_comparison_with_a_rival_is_paired():
    """Both fail on the same prompts: nothing tells them apart, however bad they are."""
    own = values(0.5, 32, 2)
    assert worse(own, 0.6, 1.0, {"rival": (0.5, np.concatenate([own, own]))}) is None


def test_promotion_goes_by_non_dominated_rank():
    points = [(0.5, 0.9), (0.6, 1.0), (0.7, 0.2), (0.55, 0.1)]
    assert set(top_by_rank(points, 0.5)) == {0, 1}
    assert len(top_by_rank(points, 0.75)) == 3
    assert top_by_rank([(1.0, 0.0)], 0.1) == [0]


def test_few_prompts_shrink_towards_what_schedules_usually_lose():
    known = [-0.1, -0.2, -0.3, -0.15, -0.25]
    few = shrink_to_prior([-1.0, 0.0, -1.0, 0.0], known)
    many = shrink_to_prior([-1.0, 0.0] * 200, known)
    assert -0.5 < few < -0.2 and abs(few + 0.2) < abs(many + 0.2) and many == pytest.approx(-0.5, abs=0.05)
    assert shrink_to_prior((), known) == pytest.approx(-0.2)
    assert shrink_to_prior([-0.4, -0.6], []) == pytest.approx(-0.5) and shrink_to_prior((), ()) == 0.0


def test_shrinking_lowers_the_error_of_few_prompts():
    rng = np.random.default_rng(0)
    true = -0.3 + 0.1 * rng.standard_normal(300)
    draws = [(rng.random(16) < -t).astype(float) * -1 for t in true]
    known = list(true[:50])
    plain = np.sqrt(np.mean([(d.mean() - t) ** 2 for d, t in zip(draws, true, strict=True)]))
    ours = np.sqrt(np.mean([(shrink_to_prior(d, known) - t) ** 2 for d, t in zip(draws, true, strict=True)]))
    assert ours < 0.85 * plain


def test_prompts_of_a_file_take_turns_by_task():
    items = [{"prompt": f"p{i}", "tag": "a" if i < 60 else "b"} for i in range(80)]
    ordered = in_turn(items)
    assert sorted(i["prompt"] for i in ordered) == sorted(i["prompt"] for i in items)
    for first in range(0, 80, 16):
        assert sum(item["tag"] == "b" for item in ordered[first : first + 16]) == 4
    assert in_turn(["one", "two", "three"]) == ["one", "two", "three"]
