"""Image comparisons that an analysis may use beyond its own, and those that installed packages offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stagevar import plugins
from stagevar.errors import UsageError

#: Group of entry points in which packages offer image comparisons.
SIMILARITIES = "stagevar.similarities"


@dataclass(frozen=True)
class Similarity:
    """How alike two images are, beyond the built-in SSIM and low-frequency match.

    Attributes:
        score: (images, finals) -> (B,), both uint8 (B, H, W, 3); 1 for identical images (a distance d enters as 1 - d).
        stage: which boundary it may decide, "semantic" (CLIP, DINO) or "structure" (LPIPS, DISTS).
    """

    name: str
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    stage: str = "semantic"


def find_similarity(text: str, device: str = "cpu") -> Similarity:
    """A similarity that an installed package offers under the entry-point group SIMILARITIES.

    Args:
        text: a name, with options after a colon: "clip:model=nano", "lpips:weights=alexnet.pth,net=alex".

    Raises:
        UsageError: for an unknown name or option, unavailable weights, or a plug-in that cannot be used.
    """
    name, _, options = text.partition(":")
    plugin = plugins.find(SIMILARITIES, name)
    if plugin is None:
        offered = plugins.offered(SIMILARITIES)
        hint = f"known: {', '.join(sorted(offered))}" if offered else "none is installed; install stagevar-tune in full"
        raise UsageError(f"unknown similarity {name!r} ({hint})")
    pairs = [part.partition("=") for part in options.split(",") if part]
    if any(not equals for _, equals, _ in pairs):
        raise UsageError(f"similarity options {options!r} must be comma-separated name=value pairs")
    try:
        similarity = plugin.load()(device=device, **{key.strip(): value.strip() for key, _, value in pairs})
    except TypeError as error:
        raise plugin.wrong(f"cannot be called with these options: {error}") from error
    if not isinstance(similarity, Similarity):
        raise plugin.wrong("must be a function that returns a stagevar.analysis.Similarity")
    return similarity
