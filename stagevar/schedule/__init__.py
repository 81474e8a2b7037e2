"""Schedules as data: parameters, their expansion to one step per scale, presets, published settings, ranks, grids."""

from stagevar.schedule.presets import (
    PRESETS,
    exact,
    fastvar,
    paper,
    preset,
    released,
    skip_only,
    skipvar,
    structure_boundary,
)
from stagevar.schedule.stage_schedule import (
    ACCELERATORS,
    PLUGGED_ACCELERATORS,
    PRECISIONS,
    PROJECTIONS,
    UNDECIDED_SCALES,
    StageSchedule,
    accelerator_names,
    kept_tokens,
)
from stagevar.schedule.steps import BOTH, Branch, Decision, LowRank, Pivotal, Plugged, ScaleStep, Steps

__all__ = [
    "ACCELERATORS",
    "BOTH",
    "PLUGGED_ACCELERATORS",
    "PRECISIONS",
    "PRESETS",
    "PROJECTIONS",
    "UNDECIDED_SCALES",
    "Branch",
    "Decision",
    "LowRank",
    "Pivotal",
    "Plugged",
    "ScaleStep",
    "StageSchedule",
    "Steps",
    "accelerator_names",
    "exact",
    "fastvar",
    "kept_tokens",
    "paper",
    "preset",
    "released",
    "skip_only",
    "skipvar",
    "structure_boundary",
]
