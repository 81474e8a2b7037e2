"""What a method's authors published for one family of models, as schedules. A registry row refers to one of these.

Source: StageVAR (arXiv 2512.16483) and sen-mao/FasterVAR, its Infinity and STAR folders (facts).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from stagevar.schedule.stage_schedule import StageSchedule


@dataclass(frozen=True)
class PublishedSettings:
    """StageVAR's setting for a family at the one resolution that it was published for.

    scales: of that resolution; at another one the setting is carried over by area (stagevar.schedule.paper). paper: the
    stages, branch and ranks of the paper. released: what the released code runs. rank_ratio: mean share of the tokens that
    `paper` keeps at its first reduced scale.
    """

    scales: int
    paper: StageSchedule
    released: StageSchedule
    rank_ratio: float

    @property
    def semantic_end(self) -> int:
        """First scale of the structure stage."""
        return self.paper.semantic_end


def _infinity() -> PublishedSettings:
    """1 Mpx: null branch alone from scale 10 (side 40), ranks for 96 % of the energy; the code skips two."""
    setting = StageSchedule(structure_end=10, semantic_end=7, cfg_delay=0, energy=0.96)
    return PublishedSettings(13, setting, dataclasses.replace(setting, skip=(11, 12)), rank_ratio=0.177)


def _star() -> PublishedSettings:
    """1024 px: null branch alone from side 48, side 64 alone reduced, to 5.3 % of its tokens; the code skips nothing."""
    setting = StageSchedule(12, semantic_end=7, cfg_delay=0, rank_delay=1, rank_ratios=(0.053,), rope="index")
    return PublishedSettings(14, setting, setting, rank_ratio=0.053)


INFINITY_SETTINGS, STAR_SETTINGS = _infinity(), _star()
