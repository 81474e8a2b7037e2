"""Schedules that are timed apart, on several GPUs or one group after the other, as if they had been timed together.

Each group times the full schedule in the same rounds, as its sentinel. Samples of a group are scaled, round by round, by
what the sentinel took in the first group over what it took here: the ratio to the full schedule is exactly the one
measured beside it, and milliseconds are those of the first group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stagevar.schedule import Steps

if TYPE_CHECKING:
    from stagevar.timing import Timing


def deal(schedules: Mapping[str, Steps], sentinel: str | None, shares: int) -> list[dict[str, Steps]]:
    """Schedules in at most `shares` groups, each with the sentinel first; in one group where there is no sentinel."""
    if sentinel is None:
        return [dict(schedules)]
    others = [name for name in schedules if name != sentinel]
    groups = [others[i::shares] for i in range(min(shares, len(others)))] or [[]]
    return [{name: schedules[name] for name in (sentinel, *group)} for group in groups]


def merged(parts: Sequence[Mapping[str, Timing]], sentinel: str | None) -> dict[str, Timing]:
    """All timings as in the first group; without a sentinel there is one group."""
    first, *others = parts
    found = dict(first)
    if sentinel is None:
        return found
    for timings in others:
        for name in timings.keys() - {sentinel}:
            found[name] = scaled(timings[name], timings[sentinel], first[sentinel])
    return found


def scaled(timing: Timing, sentinel: Timing, reference: Timing) -> Timing:
    """A timing as in the group of `reference`: each sample times what the full schedule took there over what it took here.

    All have the same rounds. CUDA events are left out: they are this group's.
    """
    from stagevar.timing import Timing

    factors = np.asarray(reference.samples_ms) / np.asarray(sentinel.samples_ms)
    samples = tuple(float(ms) for ms in np.asarray(timing.samples_ms) * factors)
    return Timing(samples, (), timing.warm_up_runs, timing.warmed, timing.card, timing.disturbed)
