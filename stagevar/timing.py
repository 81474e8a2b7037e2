"""Latency that can be believed: warmed per schedule, interleaved, raw samples kept.

One measurement is the wall time of one whole generation with the device synchronized at both ends; on CUDA the event time
of the same span is kept as well. Schedules are never timed one after the other but in turn, so that a drifting clock or a
busy neighbor hits all of them, and comparisons are paired by round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from stagevar.card_state import CardState, disturbed_by, read_card
from stagevar.choices import check_threads, processors
from stagevar.errors import UsageError

#: Relative spread of the last three warm-up runs below which a schedule counts as warm.
WARM_TOLERANCE = 0.02
#: How often a disturbed measurement is made.
ATTEMPTS = 2
Run = Callable[[], object]
Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Timing:
    """Raw samples of one schedule, in milliseconds, in the order of the rounds.

    Attributes:
        samples_ms: by the host's clock.
        device_ms: by CUDA events over the same span; empty on CPU.
        warm_up_runs: runs before the first sample.
        warmed: whether the last three of those agreed within WARM_TOLERANCE.
        card: its state before and after, if known.
        disturbed: why the samples may be wrong even after a repeat, in words.
        processor_ms: processor time of this process over the same spans, which other processes on the machine hardly
            change.
    """

    samples_ms: tuple[float, ...]
    device_ms: tuple[float, ...] = ()
    warm_up_runs: int = 0
    warmed: bool = True
    card: tuple[CardState, ...] = ()
    disturbed: tuple[str, ...] = ()
    processor_ms: tuple[float, ...] = ()

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    @property
    def p90_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 90))


def time_once(run: Run, device: torch.device | str = "cpu") -> tuple[float, float | None]:
    """(host milliseconds, CUDA event milliseconds or None) of one call."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3, None
    with torch.cuda.device(device):  # events are recorded where they are made, on the current device
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3, first.elapsed_time(last)


def warm_up(run: Run, device: torch.device | str = "cpu", at_most: int = 12) -> tuple[int, bool]:
    """Runs until three runs in a row agree within WARM_TOLERANCE: (runs made, whether they agreed)."""
    recent: list[float] = []
    for count in range(1, at_most + 1):
        recent = [*recent[-2:], time_once(run, device)[0]]
        if len(recent) == 3 and max(recent) <= min(recent) * (1 + WARM_TOLERANCE):
            return count, True
    return at_most, False


def measure(
    runs: Mapping[str, Run], rounds: int, device: torch.device | str = "cpu", warm_up_at_most: int = 12
) -> dict[str, Timing]:
    """Times several schedules in turn, `rounds` times each; every other round runs backwards, which cancels linear drift.

    If the card was throttled or used by other processes meanwhile, everything is timed once more, and marked as
    disturbed if that is no better.

    Args:
        runs: name -> one whole generation.
        rounds: samples per name, at least 1.
    """
    return measure_rounds(
        {name: partial(_in_any_round, run) for name, run in runs.items()}, rounds, device, warm_up_at_most
    )


def measure_rounds(
    runs: Mapping[str, Callable[[int], object]],
    rounds: int,
    device: torch.device | str = "cpu",
    warm_up_at_most: int = 12,
) -> dict[str, Timing]:
    """Like `measure`, but each run gets the number of its round, so that each round can use another prompt.

    They are warmed up as for round 0.
    """
    if rounds < 1:
        raise UsageError(f"rounds {rounds} must be at least 1")
    warmth = {name: warm_up(partial(run, 0), device, warm_up_at_most) for name, run in runs.items()}
    samples, card, disturbed = undisturbed(lambda: _rounds(runs, rounds, device), device)
    return {
        name: Timing(tuple(s.host), tuple(s.events), *warmth[name], card, disturbed, tuple(s.processor))
        for name, s in samples.items()
    }


def _in_any_round(run: Run, index: int) -> object:
    return run()


def undisturbed(
    take: Callable[[], Taken], device: torch.device | str
) -> tuple[Taken, tuple[CardState, ...], tuple[str, ...]]:
    """The result of `take`, which is called once more if the card was disturbed meanwhile.

    Returns:
        That result, the card's states before and after (empty if unknown), and what disturbs the result nevertheless.
    """
    for _ in range(ATTEMPTS):
        before = read_card(device)
        taken = take()
        after = read_card(device)
        disturbed = disturbed_by(before, after)
        if not disturbed:
            break
    return taken, () if before is None or after is None else (before, after), disturbed


@dataclass
class _Samples:
    """Milliseconds of one name as the rounds add them: host clock, CUDA events, processor time."""

    host: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def _rounds(
    runs: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device | str
) -> dict[str, _Samples]:
    samples = {name: _Samples() for name in runs}
    for index in range(rounds):
        for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
            began_s = time.process_time()
            host_ms, event_ms = time_once(partial(runs[name], index), device)
            samples[name].processor.append((time.process_time() - began_s) * 1e3)
            samples[name].host.append(host_ms)
            if event_ms is not None:
                samples[name].events.append(event_ms)
    return samples


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Runs torch on `count` CPU threads, then on as many as before; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def pinned(threads: int = 1) -> Iterator[int]:
    """Runs torch on `threads` threads pinned to as many processors, then restores both. Yields the thread count.

    A second busy process makes unpinned multi-threaded timings several times worse; one pinned thread is the default for
    CPU figures. If the system has no affinity calls, only the thread count is set.
    """
    check_threads(threads)
    available = processors()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if available:
        os.sched_setaffinity(0, available[-threads:])
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
        if available:
            os.sched_setaffinity(0, available)
