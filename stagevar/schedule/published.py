"""What a method's authors published for one family of models, as schedules. A registry row refers to one of these.

Source: StageVAR (arXiv 2512.16483) and sen-mao/FasterVAR, its Infinity, STAR and hart folders; for HART also FastVAR's fork of
it (csguoh/FastVAR, HART folder). Facts only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from stagevar.schedule.stage_schedule import StageSchedule


@dataclass(frozen=True)
class PublishedSettings:
    """Settings published for a model family, all at one resolution.

    Attributes:
        scales: number of scales at that resolution. At other resolutions the settings are carried over by area
            (stagevar.schedule.paper).
        paper: the paper's stages, branch and ranks.
        released: what the released code runs.
        rank_ratio: mean share of the tokens that `paper` keeps at its first reduced scale.
        fastvar: FastVAR's setting, if it has one for this family.
        chunks: of the model whose chunks have ratios of their own.
    """

    scales: int
    paper: StageSchedule
    released: StageSchedule
    rank_ratio: float
    fastvar: StageSchedule | None = None
    chunks: int = 1

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


#: Tokens that FasterVAR keeps of HART's 4,096 at side 64 in each block, for 96 % of the energy: its ratios of the model's
#: width, 1,536, rounded as in its code.
_HART_RANKS = (
    29, 36, 68, 152, 244, 319, 357, 364, 389, 415, 451, 504, 553, 606, 615, 630, 641, 656, 654, 602, 535, 424, 412, 477,
)  # fmt: skip


def _hart() -> PublishedSettings:
    """1024 px: null branch alone from side 48, side 64 alone reduced, each block by its own rank; nothing is skipped.

    FastVAR keeps guidance, half of side 48 and a quarter of side 64 in every layer.
    """
    ratios = tuple((kept - 0.5) / 64**2 for kept in _HART_RANKS)
    setting = StageSchedule(12, semantic_end=7, cfg_delay=0, rank_delay=1, rank_ratios=(ratios,), rope="index")
    pruned = StageSchedule(
        12, semantic_end=7, accelerator="fastvar", rank_ratios=(0.5, 0.25), layers=(0, len(_HART_RANKS))
    )
    return PublishedSettings(14, setting, setting, rank_ratio=0.103, fastvar=pruned, chunks=len(_HART_RANKS))


INFINITY_SETTINGS, STAR_SETTINGS, HART_SETTINGS = _infinity(), _star(), _hart()
