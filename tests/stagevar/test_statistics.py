"""Bootstrap bounds of stagevar.statistics, which the tuner's intervals are made of."""

import numpy as np
import pytest

from stagevar.statistics import mean_bounds, median_bounds, ratio_bounds
from tuner.statistics.bounds import mean_interval, median_interval, ratio_interval

SAMPLES = (10.0, 11.0, 12.0, 30.0)


@pytest.mark.parametrize(("bounds", "centre"), [(mean_bounds, np.mean), (median_bounds, np.median)])
def test_bounds_contain_the_estimate_and_shrink(bounds, centre):
    widths = []
    for samples in (SAMPLES, SAMPLES * 30):
        low, high = bounds(samples)
        assert low <= centre(samples) <= high
        widths.append(high - low)
    assert widths[1] < widths[0]
    narrow, wide = bounds(SAMPLES, level=0.5), bounds(SAMPLES, level=0.95)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1] and wide != narrow


def test_the_tuners_intervals_are_these_bounds():
    halves = [ms / 2 for ms in SAMPLES]
    for interval, bounds in (
        (mean_interval(SAMPLES, 0.9, 3), mean_bounds(SAMPLES, 0.9, 3)),
        (median_interval(SAMPLES, 0.9, 3), median_bounds(SAMPLES, 0.9, 3)),
        (ratio_interval(SAMPLES, halves[::-1], 0.9, 3), ratio_bounds(SAMPLES, halves[::-1], 0.9, 3)[1:]),
    ):
        assert (interval.low, interval.high) == bounds
