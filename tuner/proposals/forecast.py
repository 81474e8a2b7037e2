"""What is predicted for a schedule that nobody measured yet, and in which order such schedules are worth trying. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tuner.config.parameters import Value
from tuner.results import pareto

#: Number of schedules of the predicted fronts to keep, best fronts first.
MOST_FORECASTS = 100


@dataclass(frozen=True)
class Forecast:
    """A schedule of the space before it was measured.

    Attributes:
        values: of the parameters.
        ratio: predicted latency over the full schedule's.
        quality: predicted composite, in allowances.
        kept: whether every limit may be kept, within one standard error.
    """

    values: dict[str, Value]
    key: str
    ratio: float
    quality: float
    kept: bool


def layers(forecasts: Iterable[Forecast]) -> list[Forecast]:
    """Forecasts by non-dominated fronts of predicted ratio and quality, each ordered to spread over latency."""
    left, ordered = list(forecasts), list[Forecast]()
    while left and len(ordered) < MOST_FORECASTS:
        front = pareto.front([(one.ratio, one.quality) for one in left])
        ordered += [left[index] for index in _spread(sorted(front, key=lambda index: left[index].ratio))]
        members = set(front)
        left = [one for index, one in enumerate(left) if index not in members]
    return ordered


def _spread(items: Sequence[int]) -> list[int]:
    """The last, the first, the middle, the middles of the halves, and so on: any prefix is spread over all."""
    ends = dict.fromkeys([*items[-1:], *items[:1]])
    spans = [(0, len(items) - 1)]
    while spans:
        low, high = spans.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            ends[items[middle]] = None
            spans += [(low, middle), (middle, high)]
    return [*ends, *(item for item in items if item not in ends)]
