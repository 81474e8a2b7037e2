"""The search: finds, proves and writes down the schedule with the best quality within a latency budget.

    from tuner import tune

    result = tune("nano", budget="75%")
    print(result)
    result.profile.pipeline().generate(["a photo of a red circle"])[0].save("x.png")

Names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

_EXPORTS = {"Tuned": "tuner.api", "open_run": "tuner.api", "tune": "tuner.api"}
__all__ = list(_EXPORTS)


logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tuner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
