"""The runtime: next-scale image models, stage-aware schedules, and the profiles that deploy them.

    from stagevar import Profile

    pipeline = Profile.load("profile.yaml").pipeline()
    pipeline.generate(["a photo of a red circle"])[0].save("x.png")

Names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

__version__ = "0.2.0"

_EXPORTS = {
    "Profile": "stagevar.profile",
    "Pipeline": "stagevar.profile.pipeline",
    "Sampler": "stagevar.sampling.sampler",
    "ScaleStep": "stagevar.schedule",
    "StageSchedule": "stagevar.schedule",
    "StagevarError": "stagevar.errors",
    "UsageError": "stagevar.errors",
    "load_model": "stagevar.models.registry",
}
__all__ = ["__version__", *_EXPORTS]


logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'stagevar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
