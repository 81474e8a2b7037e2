"""What each metric measures, as plain data: kind, unit, direction, and how far one image can move it.

Limits, bounds and `--dry-run` read it; nothing here imports a model library. A test compares it with the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["binary", "bounded", "continuous"]
#: What an image is compared with: nothing, its prompt's text, GenEval's clauses, the questions of a benchmark's file, the full
#: schedule's image of the same prompt and seed, or a set of images.
Compares = Literal["", "prompt", "prompt metadata", "prompt's questions", "reference", "reference set"]


@dataclass(frozen=True)
class Declaration:
    """What one metric measures.

    Attributes:
        kind: "binary" (0 or 1 per image), "bounded" (any value from 0 to `change`) or "continuous" (no range that bounds
            would profit from).
        unit: of its mean and of its max_drop.
        change: the most that one image can lose (binary, bounded) or what a ruined image usually loses (continuous); 0 if
            unknown.
        max_drop: the default for a metric that comes first in a space and states none.
        higher_is_better: direction.
        compares: what an image is compared with.
        verification_only: whether it is too slow for a search.
    """

    kind: Kind
    unit: str
    change: float
    max_drop: float
    higher_is_better: bool = True
    compares: Compares = ""
    verification_only: bool = False

    @property
    def is_share(self) -> bool:
        """Whether its mean is a share, so that a limit in percent makes sense."""
        return self.kind != "continuous" and self.change == 1.0


_SHARE = "share of prompts"
#: Metric -> declaration. The changes of continuous metrics are orders of magnitude, for planning and for failures so rare
#: that none was seen: the CLIP score of an unrelated image is about 10 points lower, its CLIP cosine to the full
#: schedule's image about 0.5, and so on.
DECLARATIONS: dict[str, Declaration] = {
    "clip_score": Declaration("continuous", "CLIP points", 10.0, 0.3, compares="prompt"),
    "clip_image_similarity": Declaration("continuous", "cosine", 0.5, 0.05, compares="reference"),
    "hpsv2": Declaration("continuous", "HPS", 0.1, 0.005, compares="prompt"),
    "image_reward": Declaration("continuous", "ImageReward", 2.0, 0.05, compares="prompt"),
    "pickscore": Declaration("continuous", "PickScore", 4.0, 0.2, compares="prompt"),
    "hpsv3": Declaration("continuous", "HPSv3", 8.0, 0.3, compares="prompt", verification_only=True),
    "geneval": Declaration("binary", _SHARE, 1.0, 0.02, compares="prompt metadata"),
    "geneval_nano": Declaration("binary", _SHARE, 1.0, 0.05, compares="prompt metadata"),
    "geneval2": Declaration("bounded", _SHARE, 1.0, 0.03, compares="prompt's questions"),
    "dpg": Declaration("bounded", "share of questions", 1.0, 0.05, compares="prompt's questions"),
    "psnr": Declaration("continuous", "dB", 90.0, 3.0, compares="reference"),
    "ssim": Declaration("continuous", "SSIM", 1.0, 0.05, compares="reference"),
    "lpips": Declaration("continuous", "LPIPS", 0.7, 0.1, higher_is_better=False, compares="reference"),
    "dists": Declaration("continuous", "DISTS", 0.4, 0.05, higher_is_better=False, compares="reference"),
    "dino": Declaration("continuous", "cosine", 1.0, 0.1, compares="reference"),
    "fid": Declaration("continuous", "FID", 0.0, 1.0, higher_is_better=False, compares="reference set"),
    "kid": Declaration("continuous", "KID", 0.0, 0.001, higher_is_better=False, compares="reference set"),
    "is": Declaration("continuous", "IS", 0.0, 1.0),
    "fid_dinov2": Declaration("continuous", "FD", 0.0, 5.0, higher_is_better=False, compares="reference set"),
    "cmmd": Declaration("continuous", "CMMD", 0.0, 0.05, higher_is_better=False, compares="reference set"),
}
