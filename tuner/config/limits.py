"""What a user types for a latency budget, a tuning time or a share: `2s`, `800ms`, `60%`; `10m`, `1h30m`; `3%`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from stagevar.errors import UsageError
from stagevar.sections import shown

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_BUDGET = re.compile(rf"\s*{_NUMBER}\s*(ms|s|%)\s*", re.ASCII)
_TIME = re.compile(rf"\s*(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m(?:in)?)?\s*(?:{_NUMBER}\s*s)?\s*", re.ASCII)
_SHARE = re.compile(rf"\s*{_NUMBER}\s*(%?)\s*", re.ASCII)
_LONGEST_MS = 3.6e6


@dataclass(frozen=True)
class Budget:
    """Latency allowed for one image: `ms`, or `fraction` of the measured full schedule; the other is None."""

    text: str
    ms: float | None = None
    fraction: float | None = None

    def resolve(self, baseline_ms: float) -> float:
        """The budget in milliseconds if the full schedule takes `baseline_ms`."""
        if self.fraction is not None:
            return self.fraction * baseline_ms
        if self.ms is None:
            raise ValueError(f"budget {self.text!r} has neither ms nor a fraction")
        return self.ms

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str) -> Budget:
    """`2s`, `800ms` or `60%`. Raises UsageError for anything else, for zero, and for more than an hour or 1000 %."""
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise UsageError(f"budget {shown(text)} is not a time per image or a share; write 2s, 800ms or 60%")
    number, unit = float(match[1]), match[2]
    limit = {"ms": _LONGEST_MS, "s": _LONGEST_MS / 1e3, "%": 1000.0}[unit]
    if not 0 < number <= limit:
        raise UsageError(f"budget {shown(text)} must be above 0 and at most {limit:g}{unit}")
    compact = f"{match[1]}{unit}"
    if unit == "%":
        return Budget(compact, fraction=number / 100)
    return Budget(compact, ms=number * (1e3 if unit == "s" else 1.0))


def parse_time(text: str) -> float:
    """Seconds of `90s`, `10m`, `1h30m`. Raises UsageError for anything else and for zero."""
    match = _TIME.fullmatch(text)
    seconds = 0.0
    if match is not None:
        seconds = sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True) if part)
    if not 0 < seconds < math.inf:
        raise UsageError(f"tuning time {shown(text)} is not a time above 0; write 90s, 10m or 1h30m")
    return seconds


def parse_share(text: str, what: str) -> float:
    """`3%` or `0.03` as 0.03. Raises UsageError for anything else and outside 0 to 1."""
    match = _SHARE.fullmatch(text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"{what} {shown(text)} is not a share from 0 to 1; write 3% or 0.03")
    return value
