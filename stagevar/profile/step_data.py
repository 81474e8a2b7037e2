"""Expanded steps as plain data: how profiles and results write them."""

from __future__ import annotations

import dataclasses
from typing import Required, TypedDict, cast

from stagevar.schedule import LowRank, ScaleStep, Steps
from stagevar.sections import plain


class ReductionData(TypedDict, total=False):
    """How tokens are reduced: "kind", and the fields of that reduction."""

    kind: Required[str]
    ranks: list[int]
    kept: int


class DecisionData(TypedDict):
    """A decision point: its rule, and the names of its outcomes."""

    rule: str
    outcomes: list[str]


class StepData(TypedDict, total=False):
    """One scale of an expanded schedule; keys for what a step does not do are absent.

    Attributes:
        grid: [height, width] in tokens.
    """

    scale: Required[int]
    grid: Required[list[int]]
    stage: Required[str]
    skipped: bool
    branches: list[str]
    fuse_layer: int
    reduction: ReductionData
    precision: str
    decision: DecisionData


def steps_to_data(steps: Steps) -> list[StepData]:
    """Expanded steps as plain data: what a reader wants to see and what `expand` is checked against."""
    return [cast(StepData, plain(_step_data(step))) for step in steps]


def _step_data(step: ScaleStep) -> dict[str, object]:
    data: dict[str, object] = {"scale": step.scale, "grid": list(step.grid), "stage": step.stage}
    if step.skipped:
        return {**data, "skipped": True}
    data["branches"] = list(step.branches)
    if step.fuse_layer:
        data["fuse_layer"] = step.fuse_layer
    if step.reduction is not None:
        kind = "low_rank" if isinstance(step.reduction, LowRank) else type(step.reduction).__name__.lower()
        data["reduction"] = {"kind": kind, **dataclasses.asdict(step.reduction)}
    if step.precision != "model":
        data["precision"] = step.precision
    if step.decision is not None:
        data["decision"] = {"rule": step.decision.rule, "outcomes": [name for name, _ in step.decision.outcomes]}
    return data
