"""The tuner's image comparisons offered to `stagevar analyze`, by entry point, so that the runtime never imports them.

The group `stagevar.similarities` maps a name to a function of options that makes a `stagevar.analysis.Similarity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stagevar.analysis import Similarity
from tuner.metrics.registry import create


def clip(**options: Any) -> Similarity:
    """Cosine of CLIP image features; `model="nano"` is the one shipped for nano's scenes."""
    return _similarity("clip", "clip_image_similarity", "semantic", options)


def dino(**options: Any) -> Similarity:
    """Cosine of DINO features."""
    return _similarity("dino", "dino", "semantic", options)


def lpips(**options: Any) -> Similarity:
    """1 - LPIPS."""
    return _similarity("lpips", "lpips", "structure", options)


def dists(**options: Any) -> Similarity:
    """1 - DISTS."""
    return _similarity("dists", "dists", "structure", options)


def _similarity(name: str, metric_name: str, stage: str, options: dict[str, Any]) -> Similarity:
    """A metric against a reference as a similarity; a distance d enters as 1 - d. Raises UsageError as the metric does."""
    metric = create(metric_name, **options)

    def score(images_BHW3: np.ndarray, finals_BHW3: np.ndarray) -> np.ndarray:
        prompts: Sequence[str] = [""] * len(images_BHW3)
        values_B = metric.score(images_BHW3, prompts, finals_BHW3)
        return values_B if metric.higher_is_better else 1 - values_B

    return Similarity(name, score, stage)
