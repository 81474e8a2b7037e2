"""Named schedules, carried to any model's scales: published settings, and the plain ones that they are compared with.

Source: StageVAR (arXiv 2512.16483), FastVAR (arXiv 2503.23367, csguoh/FastVAR), SkipVAR (arXiv 2506.08908,
fakerone-li/SkipVAR) and FocusVAR (aden9460/focusvar, no paper) for their settings, carried here by position in the schedule
instead of by grid width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from stagevar.schedule.grids import Grid
from stagevar.schedule.published import PublishedSettings
from stagevar.schedule.stage_schedule import StageSchedule, choose


def exact(scales: int) -> StageSchedule:
    """The full schedule: guidance and every token at every scale."""
    return StageSchedule(structure_end=scales)


def paper(grids: Sequence[Grid], published: PublishedSettings | None = None) -> StageSchedule:
    """StageVAR's setting: as published for the model's family at these scales, else carried over to them.

    Carried over, the scales wider than half the last one are accelerated (sides 40, 48, 64 of Infinity): null branch only,
    Gaussian projection per chunk, the mean ratios of the published table.
    """
    if published is not None and len(grids) == published.scales:
        return published.paper
    start = structure_boundary(grids)
    return StageSchedule(
        structure_end=start, semantic_end=min(len(grids) // 2, start), cfg_delay=0, rank_ratios=(0.177, 0.157, 0.049)
    )


def released(grids: Sequence[Grid], published: PublishedSettings | None = None) -> StageSchedule:
    """The released code's setting: as published, else `paper` without the last scales (two of ten or more, one of fewer)."""
    if published is not None and len(grids) == published.scales:
        return published.released
    count = 2 if len(grids) >= 10 else 1
    return dataclasses.replace(paper(grids), skip=tuple(range(len(grids) - count, len(grids))))


def fastvar(grids: Sequence[Grid], published: PublishedSettings | None = None) -> StageSchedule:
    """FastVAR's released setting: as published for the family, else Infinity's by position.

    That is 60 %, then 50 % of the tokens on the two scales before the skipped ones. The last two of 13 scales are
    skipped, or one of fewer than ten. On Infinity's square 1M grids these are the sides 32, 40 and 48, 64, with the
    cache at side 24.
    """
    scales = len(grids)
    if published is not None and published.fastvar is not None and scales == published.scales:
        return published.fastvar
    skipped = 2 if scales >= 10 else 1
    return StageSchedule(
        structure_end=max(1, scales - skipped - 2),
        accelerator="fastvar",
        rank_ratios=(0.6, 0.5),
        skip=tuple(range(scales - skipped, scales)),
    )


def skipvar(grids: Sequence[Grid], decision: str = "ssim-0.84") -> StageSchedule:
    """SkipVAR: everything in full up to the fourth to last scale, then one of seven continuations per image."""
    return StageSchedule(structure_end=len(grids), decision=decision)


def conditional(grids: Sequence[Grid]) -> StageSchedule:
    """Every token, but the null branch is dropped where the fidelity stage starts (what analysis proposes for nano)."""
    return StageSchedule(structure_end=structure_boundary(grids), cfg_delay=0, branch="cond")


def focusvar(grids: Sequence[Grid]) -> StageSchedule:
    """FocusVAR's setting on HART, by position: fused at the third to last scale after five layers, then conditional only."""
    return StageSchedule(structure_end=max(1, len(grids) - 3), cfg_delay=0, branch="cond", fuse_layer=5)


def skip_inner(grids: Sequence[Grid], conditional: int = 1) -> StageSchedule:
    """The second to last scale is not run; the conditional branch runs alone over the last `conditional` scales."""
    scales = len(grids)
    return StageSchedule(structure_end=max(1, scales - conditional), cfg_delay=0, branch="cond", skip=(scales - 2,))


def skip_only(grids: Sequence[Grid], count: int = 1) -> StageSchedule:
    """Full guidance and tokens, the last `count` scales not run."""
    scales = len(grids)
    return StageSchedule(structure_end=scales - count, skip=tuple(range(scales - count, scales)))


def structure_boundary(grids: Sequence[Grid]) -> int:
    """First scale wider than half of the last one, by area: where the paper's fidelity stage starts on Infinity."""
    final = grids[-1][0] * grids[-1][1]
    return next(s for s, (h, w) in enumerate(grids) if 4 * h * w > final)


#: Named schedules carried to any scales: what `bench --compare` and a study's first trials take. `preset` also knows what
#: was published for a model's family.
PRESETS: dict[str, Callable[[Sequence[Grid]], StageSchedule]] = {
    "exact": lambda grids: exact(len(grids)),
    "stagevar-paper": paper,
    "stagevar-released": released,
    "conditional": conditional,
    "conditional-1": lambda grids: StageSchedule(structure_end=len(grids) - 1, cfg_delay=0, branch="cond"),
    "conditional-3": lambda grids: StageSchedule(structure_end=max(1, len(grids) - 3), cfg_delay=0, branch="cond"),
    "fastvar": fastvar,
    "skipvar": skipvar,
    "focusvar": focusvar,
    "skip-inner": skip_inner,
    "skip-inner-3": lambda grids: skip_inner(grids, 3),
    "skip-1": skip_only,
    "skip-2": lambda grids: skip_only(grids, 2),
}


def preset(name: str, grids: Sequence[Grid], published: PublishedSettings | None = None) -> StageSchedule:
    """A named schedule for a model's grids, given what was published for its family (`stagevar.models.registry.published`).

    Raises:
        ScheduleError: for an unknown name; the message suggests the nearest preset.
    """
    choose("schedule", name, tuple(PRESETS))
    by_family = {"stagevar-paper": paper, "stagevar-released": released, "fastvar": fastvar}
    return by_family[name](grids, published) if name in by_family else PRESETS[name](grids)
