"""Where the time of one image goes: the share of every scale, for schedules timed in turn.

Synchronizing after each scale keeps a GPU from running ahead, so the shares add up to a little more than the latency of a
whole image: they explain a figure, they do not replace it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from stagevar.sampling.sampler import Sampler
from stagevar.schedule import Steps
from stagevar.timing import time_once


def time_scales(
    sampler: Sampler, schedules: Mapping[str, Steps], prompt: str, seed: int, rounds: int = 5
) -> dict[str, tuple[float, ...]]:
    """Median milliseconds per scale (0 where skipped), one tuple per schedule; a first, unmeasured round warms up.

    A schedule with a decision gets an empty tuple: what follows its decision differs from image to image.

    Raises:
        ValueError: for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    decided = [name for name, steps in schedules.items() if any(step.decision is not None for step in steps)]
    fixed = {name: steps for name, steps in schedules.items() if name not in decided}
    samples = {name: np.zeros((rounds, len(steps))) for name, steps in fixed.items()}
    device = sampler.model.device
    for round_ in range(-1, rounds):
        for name, steps in fixed.items():
            generation = sampler.begin([prompt], [seed], steps=steps)
            for index, step in enumerate(steps):
                elapsed_ms = time_once(partial(sampler.advance, generation, step), device)[0]
                if round_ >= 0 and not step.skipped:
                    samples[name][round_, index] = elapsed_ms
    medians = {name: tuple(float(v) for v in np.median(rows, axis=0)) for name, rows in samples.items()}
    return {name: medians.get(name, ()) for name in schedules}
