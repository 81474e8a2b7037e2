"""How far each metric may fall: a weight and a largest drop per metric, in the metric's own unit. No torch.

The first metric of a space is the primary one and always has a limit. A metric without a limit only ranks, and its weight
is per unit, as in `{geneval_nano: 1.0, clip_score: 0.0005}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagevar.errors import UsageError, hint
from tuner.metrics.declarations import DECLARATIONS, Declaration
from tuner.metrics.quality_spec import QualitySpec
from tuner.metrics.registry import declaration_of

#: The composite in results that were written before each metric had its own limit.
COMPOSITE = "quality"
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?\s*(%?)\s*", re.ASCII)


@dataclass(frozen=True)
class MetricLimit:
    """One metric of the quality.

    Attributes:
        metric: name.
        weight: in the composite.
        max_drop: largest allowed mean paired drop in `unit`, None for a metric that only ranks or is only reported.
        kind, unit, change, higher_is_better: as declared (tuner.metrics.declarations).
    """

    metric: str
    weight: float
    max_drop: float | None
    kind: str
    unit: str
    change: float
    higher_is_better: bool = True

    @property
    def sign(self) -> float:
        return 1.0 if self.higher_is_better else -1.0

    @property
    def allowed(self) -> float:
        """The largest allowed drop. Raises ValueError for a metric that only ranks or is only reported."""
        if self.max_drop is None:
            raise ValueError(f"{self.metric} has no max_drop")
        return self.max_drop

    @property
    def name(self) -> str:
        """The name of its verdict and its constraint."""
        return f"drop:{self.metric}"

    def amount(self, value: float) -> str:
        """A drop in words: "2 % of prompts", "0.3 CLIP points"."""
        share = self.unit.removeprefix("share of ")
        return f"{value:.3g} {self.unit}" if share == self.unit else f"{100 * value:.3g} % of {share}"


def quality_limits(
    quality: Mapping[str, QualitySpec], asked: float | Mapping[str, float] | None = None
) -> tuple[MetricLimit, ...]:
    """The limits of a space's metrics, in the space's order.

    Args:
        quality: of a space, by metric.
        asked: limits that take precedence; a single number is for the primary metric.

    Raises:
        UsageError: for a limit on a metric that the space does not have, or one that `check_max_drop` rejects.
    """
    primary = next(iter(quality))
    given = dict(asked) if isinstance(asked, Mapping) else {} if asked is None else {primary: float(asked)}
    for metric, value in given.items():
        if metric not in quality:
            raise UsageError(_no_metric(f"max-drop {value!r:.40}", metric, quality))
        check_max_drop(metric, value, f"max-drop {value!r:.40}")
    found = []
    for metric, spec in quality.items():
        declared = declaration_of(metric)
        max_drop = given.get(metric, spec.max_drop)
        if max_drop is None and metric == primary:
            max_drop = declared.max_drop
        found.append(
            MetricLimit(
                metric,
                spec.weight,
                None if max_drop is None else float(max_drop),
                declared.kind,
                declared.unit,
                declared.change,
                declared.higher_is_better,
            )
        )
    return tuple(found)


def old_limits(weights: Mapping[str, float], max_drop: float) -> tuple[MetricLimit, ...]:
    """The limits of a result of schema 1: one for the composite, none for its metrics."""
    if not weights:
        return ()
    parts = [
        MetricLimit(metric, weight, None, d.kind, d.unit, d.change, d.higher_is_better)
        for metric, weight in weights.items()
        for d in (DECLARATIONS.get(metric, Declaration("continuous", metric, 0.0, 0.0)),)
    ]
    return (MetricLimit(COMPOSITE, 1.0, max_drop, "continuous", "of the composite", 0.0), *parts)


def limited(limits: Sequence[MetricLimit]) -> list[MetricLimit]:
    """The limits that a schedule must meet."""
    return [limit for limit in limits if limit.max_drop is not None]


def factors(limits: Sequence[MetricLimit]) -> dict[str, float]:
    """What one unit of each metric adds to the composite, which counts in allowances: -1 is one max_drop used up.

    A metric without a limit counts by its weight per unit, in allowances of the primary metric.
    """
    return {m.metric: m.weight / (limits[0].allowed if m.max_drop is None else m.max_drop) for m in limits}


def composite(values: Mapping[str, Sequence[float] | np.ndarray], limits: Sequence[MetricLimit]) -> np.ndarray:
    """The composite (N,) of N values per metric, in allowances of these limits."""
    per_unit = factors(limits)
    rows = [m.sign * per_unit[m.metric] * np.asarray(values[m.metric], dtype=np.float64) for m in limits]
    total_N: np.ndarray = np.sum(rows, axis=0)
    return total_N


def composite_change(limits: Sequence[MetricLimit]) -> float:
    """The most that one image can change the composite, in allowances."""
    return sum(limit.change * factor for limit, factor in zip(limits, factors(limits).values(), strict=True))


def composite_specs(quality: Mapping[str, QualitySpec], limits: Sequence[MetricLimit]) -> dict[str, QualitySpec]:
    """The metrics of a space for `create_composite`: their options, weighted by `factors`."""
    scale = factors(limits)
    return {metric: QualitySpec(scale[metric], options=spec.options) for metric, spec in quality.items()}


# ------------------------------------------------------------------------------------------------------------- reading


def parse_max_drops(texts: Sequence[str], quality: Mapping[str, object]) -> dict[str, float]:
    """Limits typed as `2%` or `0.3` (for the primary metric) and `clip_score=0.3`, separate or joined by commas.

    Raises UsageError for an unknown or repeated metric, anything but a number above 0, a percentage for a metric that is
    not a share, and more than a metric can fall.
    """
    primary = next(iter(quality))
    found: dict[str, float] = {}
    for text in (part for given in texts for part in str(given).split(",")):
        name, equals, value = text.rpartition("=")
        metric = name.strip() if equals else primary
        if metric not in quality:
            raise UsageError(_no_metric(f"max-drop {_shown(text)}", metric, quality))
        max_drop = _max_drop(metric, value, f"max-drop {_shown(text)}")
        if metric in found:
            raise UsageError(f"max-drop {_shown(text)}: {metric} already has a limit; give one limit per metric")
        found[metric] = max_drop
    return found


def _no_metric(what: str, metric: str, quality: Mapping[str, object]) -> str:
    return f"{what}: the search space has no metric {_shown(metric)}{hint(metric, quality)}"


def _max_drop(metric: str, text: str, what: str) -> float:
    declared = declaration_of(metric)
    example = "2% or 0.02" if declared.is_share else f"{metric}={declared.max_drop:g}"
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UsageError(f"{what} is not a drop of {metric} in {declared.unit}; write {example}")
    if match[3] and not declared.is_share:
        raise UsageError(f"{what}: {metric} is in {declared.unit}, not a percentage; write {example}")
    return check_max_drop(metric, float(f"{match[1]}e{match[2] or 0}") / (100 if match[3] else 1), what)


def check_max_drop(metric: str, value: Any, what: str) -> float:
    """A largest drop as a number. Raises UsageError that begins with `what`."""
    declared = declaration_of(metric)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{what} must be a number above 0, in {declared.unit}")
    if declared.kind != "continuous" and value > declared.change:
        most = "1; write a share, such as 0.02 for 2 %" if declared.is_share else f"{declared.change:g} {declared.unit}"
        raise UsageError(f"{what} allows {metric} to fall by more than it can: at most {most}")
    return float(value)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
