"""Schedules timed separately, on several GPUs or one group after another, as if they had been timed together.

Each group times the full schedule in the same rounds, as its sentinel. A group's samples are scaled, round by round, by the
sentinel's time in the first group over its time in this one: the ratio to the full schedule stays exactly as measured, and
milliseconds become those of the first group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stagevar.schedule import Steps

if TYPE_CHECKING:
    from stagevar.timing import Timing


def deal(schedules: Mapping[str, Steps], sentinel: str | None, shares: int) -> list[dict[str, Steps]]:
    """Schedules in at most `shares` groups, each with the sentinel first; in one group if there is no sentinel."""
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
    """A timing as in the group of `reference`: each sample times the full schedule's time there over its time here.

    All have the same rounds. CUDA events are left out, since they belong to this group.
    """
    from stagevar.timing import Timing

    factors = np.asarray(reference.samples_ms) / np.asarray(sentinel.samples_ms)
    samples = tuple(float(ms) for ms in np.asarray(timing.samples_ms) * factors)
    return Timing(samples, (), timing.warm_up_runs, timing.warmed, timing.card, timing.disturbed)
