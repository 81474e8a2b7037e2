"""The table of step costs: exact where it was timed, close where it interpolates, honest about its error."""

import random

import numpy as np
import pytest

from stagevar.schedule import exact, skipvar
from tests.fakes.studies import CHUNKS, GRIDS, SPACE
from tuner.config.space import draw
from tuner.config.space_file import parse_space
from tuner.evaluation.step_costs import LEAST_CHECKS, StepCosts

FULL = exact(len(GRIDS)).expand(GRIDS, CHUNKS)


def schedules(count, seed=0):
    space, rng, found = parse_space(SPACE), random.Random(seed), {}
    while len(found) < count:
        steps = space.schedule(draw(space, rng), GRIDS).expand(GRIDS, CHUNKS)
        found.setdefault(steps)
    return list(found)


def cost_ms(prefix):
    """Launches, linear layers, attention over what is cached."""
    if not prefix:
        return 4.0
    step = prefix[-1]
    if step.skipped:
        return 0.0
    rows = step.processed_tokens(CHUNKS)
    cached = sum(
        s.processed_tokens(CHUNKS) / len(s.branches)
        for s in prefix[:-1]
        if not s.skipped and set(step.branches) <= set(s.branches)
    )
    return 1.0 + 0.4 * len(step.branches) + 0.05 * rows + 0.0005 * rows * (cached + rows / len(step.branches))


def timed(listed, noise=0.0, rounds=3, seed=0):
    rng = np.random.default_rng(seed)
    prefixes = {s[:d] for s in [FULL, *listed] for d in range(len(s) + 1)}
    drift = 1 + 0.3 * rng.random(rounds)
    return {
        p: tuple(cost_ms(p) * drift * (1 + noise * rng.standard_normal(rounds)))
        for p in prefixes
        if not (p and p[-1].skipped)
    }


def whole_ms(steps):
    return sum(cost_ms(steps[:d]) for d in range(len(steps) + 1))


def ratio(steps):
    return whole_ms(steps) / whole_ms(FULL)


@pytest.fixture
def table():
    found = StepCosts(FULL, CHUNKS)
    found.observe(timed(schedules(20)))
    for steps in schedules(6):
        found.check(steps, ratio(steps))
    return found


def test_timed_steps_are_looked_up_and_drift_cancels(table):
    for steps in [FULL, *schedules(20)]:
        prediction = table.predict(steps)
        assert prediction.interpolated == 0 and prediction.ratio == pytest.approx(ratio(steps), rel=1e-6)


def test_steps_that_were_not_timed_are_interpolated(table):
    others = [s for s in schedules(60, seed=5) if s not in schedules(20)]
    found = [table.predict(steps) for steps in others]
    assert sum(p.interpolated > 0 for p in found) > 10
    errors = [p.ratio / ratio(s) - 1 for p, s in zip(found, others, strict=True)]
    assert np.sqrt(np.mean(np.square(errors))) < 0.03
    assert np.corrcoef([p.ratio for p in found], [ratio(s) for s in others])[0, 1] > 0.98


def test_the_error_is_that_of_whole_schedules_left_out_of_the_correction(table):
    assert table.error < 1e-6 and table.trusted
    for index, steps in enumerate(schedules(6)):
        table.check(steps, ratio(steps) * (1.15 if index % 2 else 0.9))
    assert 0.08 < table.error < 0.25 and not table.trusted


def test_a_common_bias_is_corrected_and_is_no_error(table):
    for steps in schedules(6):
        table.check(steps, 1.2 * ratio(steps))
    other = schedules(20)[10]
    assert table.trusted and table.predict(other).ratio == pytest.approx(1.2 * ratio(other), rel=1e-6)


def test_few_checks_prove_nothing():
    table = StepCosts(FULL, CHUNKS)
    table.observe(timed(schedules(5)))
    for steps in schedules(LEAST_CHECKS - 1):
        table.check(steps, ratio(steps))
    assert table.error == np.inf and not table.trusted


def test_noise_shows_in_the_error():
    table = StepCosts(FULL, CHUNKS)
    table.observe(timed(schedules(20), noise=0.02, rounds=5))
    rng = np.random.default_rng(1)
    for steps in schedules(12):
        table.check(steps, ratio(steps) * (1 + 0.03 * rng.standard_normal()))
    assert 0.01 < table.error < 0.08


def test_a_decision_has_no_single_latency(table):
    steps = skipvar(GRIDS, "ssim-0.84").expand(GRIDS, CHUNKS)
    assert not table.covers(steps)
    before = table.checks
    table.check(steps, 0.5)
    assert table.checks == before
    with pytest.raises(ValueError, match="single latency"):
        table.predict(steps)


def test_the_full_schedule_must_be_among_the_timed_ones():
    with pytest.raises(ValueError, match="full schedule"):
        StepCosts(FULL, CHUNKS).observe({(): (1.0,)})
    with pytest.raises(ValueError, match="no timings"):
        StepCosts(FULL, CHUNKS).predict(FULL)


def test_skipped_scales_cost_nothing(table):
    skipping = next(s for s in schedules(60) if s[-1].skipped)
    shares = table.scale_shares(skipping)
    assert shares[-1] == 0 and all(share > 0 for share in shares[:-1])
