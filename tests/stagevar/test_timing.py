"""Latency logic on a fake clock: nothing here depends on how fast this machine is."""

import os

import pytest
import torch

from stagevar import timing as latency
from stagevar.errors import UsageError
from stagevar.statistics import ratio_bounds


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a run says so."""

    class Clock:
        now = 0.0

        def spend(self, milliseconds):
            self.now += milliseconds / 1e3

    fake = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: fake.now)
    return fake


def test_runs_are_interleaved_back_and_forth(clock):
    order = []
    runs = {name: lambda name=name: (order.append(name), clock.spend(5)) for name in "ab"}
    timings = latency.measure(runs, rounds=4)
    assert "".join(order) == "aaabbb" + "abbaabba"
    assert timings["a"].samples_ms == pytest.approx((5.0,) * 4)
    assert timings["a"].warm_up_runs == 3 and timings["a"].warmed


def test_warm_up_waits_until_three_runs_agree(clock):
    times = iter([50, 30, 20, 10.3, 10.1, 10.2, 99])
    assert latency.warm_up(lambda: clock.spend(next(times))) == (6, True)
    never = iter(range(1, 100))
    assert latency.warm_up(lambda: clock.spend(2 ** next(never)), at_most=5) == (5, False)


def test_linear_drift_cancels_in_the_paired_ratio(clock):
    slowness = iter(range(1000))

    def run(cost):
        clock.spend(cost * (1 + 0.002 * next(slowness)))

    timings = latency.measure({"a": lambda: run(30), "b": lambda: run(60)}, rounds=10)
    ratio, low, high = ratio_bounds(timings["a"].samples_ms, timings["b"].samples_ms)
    assert ratio == pytest.approx(0.5, rel=0.01) and low <= ratio <= high
    assert low > 0.49 and high < 0.51


def test_the_slow_tail_of_a_timing_is_above_its_median():
    few = latency.Timing((10.0, 11.0, 12.0, 30.0))
    assert few.p90_ms > few.median_ms


def test_rounds_have_inputs_of_their_own_and_a_clock_of_the_processor(clock, monkeypatch):
    monkeypatch.setattr(latency.time, "process_time", lambda: clock.now / 2)
    given = []
    runs = {name: lambda index, name=name: (given.append((name, index)), clock.spend(8)) for name in "ab"}
    timings = latency.measure_rounds(runs, rounds=2, warm_up_at_most=1)
    assert given == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert timings["b"].samples_ms == pytest.approx((8.0, 8.0))
    assert timings["b"].processor_ms == pytest.approx((4.0, 4.0))


def test_pinning_is_undone():
    threads, processors = torch.get_num_threads(), os.sched_getaffinity(0)
    with latency.pinned(1):
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
    assert torch.get_num_threads() == threads and os.sched_getaffinity(0) == processors
    with pytest.raises(UsageError, match="threads 1000"), latency.pinned(1000):
        pass
    with pytest.raises(UsageError, match="rounds 0"):
        latency.measure({}, rounds=0)
