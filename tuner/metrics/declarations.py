"""What each metric measures, as plain data: kind, unit, direction, and how far one image can move it.

Limits, bounds and `--dry-run` read it; nothing here imports a model library. A test compares it with the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["binary", "bounded", "continuous"]


@dataclass(frozen=True)
class Declaration:
    """One metric.

    kind: "binary" (0 or 1 per image), "bounded" (any value from 0 to `change`) or "continuous" (no range that bounds would
    profit from). unit: of its mean and of its max_drop. change: what one image can lose at most (binary, bounded) or what a
    ruined image usually loses (continuous); 0 where that is not known. max_drop: of a metric that comes first in a space and
    states none. higher_is_better: direction.
    """

    kind: Kind
    unit: str
    change: float
    max_drop: float
    higher_is_better: bool = True

    @property
    def is_share(self) -> bool:
        """Whether its mean is a share, so that a limit in per cent makes sense."""
        return self.kind != "continuous" and self.change == 1.0


_SHARE = "share of prompts"
#: Metric -> declaration. The changes of the continuous ones are orders of magnitude, for planning and for failures so rare
#: that none was seen: the CLIP score of an unrelated image is about 10 points lower, its CLIP cosine to the full
#: schedule's image about 0.5, and so on.
DECLARATIONS: dict[str, Declaration] = {
    "clip_score": Declaration("continuous", "CLIP points", 10.0, 0.3),
    "clip_image_similarity": Declaration("continuous", "cosine", 0.5, 0.05),
    "hpsv2": Declaration("continuous", "HPS", 0.1, 0.005),
    "geneval": Declaration("binary", _SHARE, 1.0, 0.02),
    "geneval_nano": Declaration("binary", _SHARE, 1.0, 0.05),
    "dpg": Declaration("bounded", "share of questions", 1.0, 0.05),
    "psnr": Declaration("continuous", "dB", 90.0, 3.0),
    "ssim": Declaration("continuous", "SSIM", 1.0, 0.05),
    "lpips": Declaration("continuous", "LPIPS", 0.7, 0.1, higher_is_better=False),
    "dists": Declaration("continuous", "DISTS", 0.4, 0.05, higher_is_better=False),
    "dino": Declaration("continuous", "cosine", 1.0, 0.1),
    "fid": Declaration("continuous", "FID", 0.0, 1.0, higher_is_better=False),
    "kid": Declaration("continuous", "KID", 0.0, 0.001, higher_is_better=False),
    "is": Declaration("continuous", "IS", 0.0, 1.0),
    "fid_dinov2": Declaration("continuous", "FD", 0.0, 5.0, higher_is_better=False),
    "cmmd": Declaration("continuous", "CMMD", 0.0, 0.05, higher_is_better=False),
}
