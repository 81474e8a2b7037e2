"""From curves to a schedule: boundaries of stages, guidance cutoff and ranks as stated rules give them, each with its reason.

Source: see stagevar.analysis.measure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stagevar.errors import UsageError
from stagevar.models.base import LoadedModel
from stagevar.schedule import BOTH, Branch, StageSchedule
from stagevar.schedule.ranks import RankTable
from stagevar.statistics import resample_indices


@dataclass(frozen=True)
class Rules:
    """How curves become a schedule. Every limit is checked at an upper `confidence` bound, bootstrapped over prompts.

    The initial gap of a similarity m is its distance from 1 at scale 0, mean(1 - m). Its plateau is the first scale
    from which on it lacks at most a given share of its initial gap.

    Attributes:
        semantic: that share for semantic curves; semantic_end is the scale after the slowest curve's plateau.
        structure: that share for structure curves; structure_end is the scale after the slowest curve's plateau. If
            that leaves no scale, only the last one is accelerated.
        guidance: cfg_cutoff is the first scale from structure_end on after which one branch alone, at any single scale,
            moves the image by at most this share of SSIM's initial gap; the branch that allows the earlier cutoff is
            kept.
        ranks: ranks hold the smallest tabulated energy at which the whole acceleration costs at most this share of the
            SSIM that leaving out every scale from structure_end on would cost. A share of SSIM's whole initial gap
            would let the last scales be left out as well.
        confidence: of the bounds.
    """

    semantic: float = 0.15
    structure: float = 0.25
    guidance: float = 0.25
    ranks: float = 0.5
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not self.ranks > 0:
            raise UsageError(f"analysis rule ranks {self.ranks!r} must be above 0")
        for name in ("semantic", "structure", "guidance", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"analysis rule {name} {getattr(self, name)!r} must lie between 0 and 1")


def side_key(grid: tuple[int, int]) -> str:
    """A grid's key in a rank table: the side of the square with as many tokens."""
    return str(round(math.sqrt(grid[0] * grid[1])))


def scale_name(model: LoadedModel, scale: int) -> str:
    """A scale in words."""
    return f"scale {scale} (side {side_key(model.grids[scale])})"


def missing_upper(part_NK: np.ndarray, similarity_NK: np.ndarray, rules: Rules) -> tuple[float, ...]:
    """Upper confidence bound per scale of mean(part) over the mean of what `similarity` lacks at scale 0."""
    span_N1 = np.maximum(1 - similarity_NK[:, :1], 0)
    joint_NK = np.concatenate([part_NK, span_N1], axis=1)
    means_RK = joint_NK[resample_indices(len(joint_NK))].mean(axis=1)
    ratio_RK = means_RK[:, :-1] / np.maximum(means_RK[:, -1:], 1e-9)
    return tuple(round(float(v), 6) for v in np.quantile(ratio_RK, rules.confidence, axis=0))


def settled(upper: Sequence[float], limit: float) -> int:
    """First scale from which on every bound is within the limit (the number of scales if none is)."""
    return next((s for s in range(len(upper)) if all(v <= limit for v in upper[s:])), len(upper))


def propose_stages(
    model: LoadedModel,
    rules: Rules,
    measured: Mapping[str, np.ndarray],
    missing: Mapping[str, Sequence[float]],
    stage_of: Mapping[str, str],
) -> tuple[StageSchedule, dict[str, str]]:
    """Boundaries, cutoff and branch as the rules give them, and one sentence per decision."""
    last = len(model.grids) - 1
    ends: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for stage, limit in (("semantic", rules.semantic), ("structure", rules.structure)):
        plateaus = {name: settled(missing[name], limit) for name, own in stage_of.items() if own == stage}
        slowest = max(plateaus, key=lambda name: plateaus[name])
        plateau = plateaus[slowest]
        ends[stage] = max(1, min(plateau + 1, last))
        bound = f"upper {rules.confidence:.0%} bound {missing[slowest][min(plateau, last - 1)]:.3f}"
        lacking = f"{slowest} still lacks more than {limit:.0%} of its initial gap before the last scale"
        reasons[f"{stage}_end"] = (
            f"{slowest} lacks at most {limit:.0%} of its initial gap from {scale_name(model, plateau)} on ({bound})"
            if plateau < last
            else f"{lacking} ({bound} at {scale_name(model, last - 1)}): "
            "no plateau, so only the last scale is left to accelerate"
        )
    start = max(ends["structure"], ends["semantic"])

    effects = {b: missing_upper(measured[f"image:{b}"], measured["ssim"], rules) for b in BOTH}
    cutoffs = {b: max(settled(effects[b], rules.guidance), start) for b in BOTH}
    kept: Branch = min(BOTH, key=lambda b: (cutoffs[b], max(effects[b][start:])))
    cutoff = cutoffs[kept]
    if cutoff <= last:
        delay = cutoff - start
        reasons["cfg_cutoff"] = (
            f"from {scale_name(model, cutoff)} on the {kept} branch alone, at any one scale, moves the image by at most "
            f"{rules.guidance:.0%} of its initial gap (upper bound {max(effects[kept][cutoff:]):.3f})"
        )
    else:
        delay = None
        reasons["cfg_cutoff"] = (
            f"either branch alone moves the image by more than {rules.guidance:.0%} of its initial gap at the last scale "
            f"(upper bound {effects[kept][last]:.3f}): guidance stays"
        )
    return StageSchedule(start, ends["semantic"], cfg_delay=delay, branch=kept), reasons


def with_ranks(
    schedule: StageSchedule, model: LoadedModel, table: RankTable, energy: str, projection: str
) -> StageSchedule:
    """The schedule with ranks that hold this energy, a ratio per chunk at every scale of the model."""
    ratios = tuple(tuple(table[energy][side_key(grid)]) for grid in model.grids[schedule.structure_end :])
    rope = "first" if projection == "gaussian" else "index"  # a kept row has its own position, a mixture has none
    return dataclasses.replace(schedule, rank_ratios=ratios, projection=projection, rope=rope)


def propose_ranks(
    model: LoadedModel,
    rules: Rules,
    ssim_NK: np.ndarray,
    trials: Mapping[tuple[str, str], list[np.ndarray]],
    schedule: StageSchedule,
    table: RankTable,
) -> tuple[StageSchedule, str]:
    """The schedule with the ranks that the rule allows, and why."""
    if not trials:
        return schedule, "not tried: every token is kept"
    unfinished_NK = ssim_NK[:, schedule.structure_end - 1 :]  # its first column: nothing run from structure_end on
    bounds = {}
    for choice, parts in trials.items():
        part_N1 = np.concatenate(parts)[:, None]
        bounds[choice] = missing_upper(part_N1, unfinished_NK[: len(part_N1)], rules)[0]
    fine = [choice for choice in trials if bounds[choice] <= rules.ranks]
    first = scale_name(model, schedule.structure_end)
    allowed = f"at most {rules.ranks:.0%} of what leaving out all scales from {first} on costs"
    if not fine:
        energy, projection = min(bounds, key=lambda choice: bounds[choice])
        return schedule, (
            f"no tabulated energy costs {allowed} (best: energy {energy}, {projection}, upper bound "
            f"{bounds[energy, projection]:.3f}): every token is kept"
        )
    energy, projection = min(fine, key=lambda choice: (float(choice[0]), bounds[choice]))
    proposed = with_ranks(schedule, model, table, energy, projection)
    assert proposed.rank_ratios is not None
    means = ", ".join(f"{np.mean(ratio):.0%}" for ratio in proposed.rank_ratios)
    return proposed, (
        f"energy {energy} with projection {projection} costs {allowed} (upper bound "
        f"{bounds[energy, projection]:.3f}); share of tokens per scale: {means}"
    )


def is_idle(schedule: StageSchedule) -> bool:
    """Whether a proposal accelerates nothing."""
    return schedule.cfg_delay is None and schedule.rank_ratios is None


def begun_at(proposal: StageSchedule, start: int, model: LoadedModel) -> StageSchedule:
    """The proposal's kind of acceleration started at another scale; earlier scales get the ratios of its first one.

    A proposal that accelerates nothing is ablated by dropping a branch at once, to show what that would cost.
    """
    scales, ratios = len(model.grids), proposal.rank_ratios
    if ratios is not None:
        shift = start - proposal.structure_end
        ratios = ratios[shift:] if shift >= 0 else (ratios[0],) * -shift + ratios
    delay = 0 if is_idle(proposal) else proposal.cfg_delay
    delay = None if delay is None else min(delay, scales - start)
    return dataclasses.replace(
        proposal,
        structure_end=start,
        semantic_end=min(proposal.semantic_end, start),
        cfg_delay=delay,
        rank_ratios=ratios,
    )
