"""The tree of several schedules' steps, walked once: early scales are the same in nearly all of them.

One depth-first walk per micro-batch runs each distinct prefix of steps once and rewinds on the way back; rewinding is
resetting a length, so the values are bit for bit those of evaluating each schedule alone. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stagevar.schedule import ScaleStep, Steps

if TYPE_CHECKING:
    from stagevar.sampling.generation import Generation
    from stagevar.sampling.sampler import Sampler


def walk(
    sampler: Sampler,
    generation: Generation,
    schedules: Sequence[Steps],
    leaf: Callable[[list[int], np.ndarray], None] | None,
    advance: Callable[[Generation, ScaleStep], bool | None] | None = None,
) -> int:
    """Runs all schedules on one generation, each distinct prefix of steps once; returns the number of scales run.

    Args:
        sampler: runs the steps.
        generation: a new one, of the prompts.
        schedules: expansions.
        leaf: called once per distinct schedule with the indices that share it and its images (B, H, W, 3) uint8; None
            decodes nothing.
        advance: replaces the sampler's; returns True if it restored a scale instead of running it.
    """
    runs = 0
    advance = advance or sampler.advance

    def visit(members: list[int], depth: int) -> None:
        nonlocal runs
        if depth == len(sampler.model.grids):
            if leaf is not None:
                leaf(members, sampler.decode(generation))
            return
        children: dict[ScaleStep, list[int]] = {}
        for index in members:
            children.setdefault(schedules[index][depth], []).append(index)
        for step, group in children.items():
            sampler.rewind(generation, depth)
            if step.decision is not None:
                # All continuations are part of the step, so schedules that share it share the images.
                runs += len(sampler.model.grids) - depth
                images = sampler.finish(generation, schedules[group[0]])
                if leaf is not None:
                    leaf(group, images)
                continue
            taken_over = advance(generation, step)
            runs += not (step.skipped or taken_over)
            visit(group, depth + 1)

    visit(list(range(len(schedules))), generation.scale)
    return runs
