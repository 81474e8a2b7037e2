"""How much of its space a search has seen: size, schedules, what was tried of each parameter, what the budget excludes.

Pure. Schedules are counted on all settings of a small space, on random draws from a larger one: many settings expand to the
same schedule, and enumerating half a million is not worth the time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stagevar.schedule import Steps
from stagevar.schedule.grids import Grid
from tuner.config.parameters import Parameter, Value
from tuner.config.space import SearchSpace, all_or_drawn_settings, expanded, steps_key

#: Settings on which schedules and what the budget excludes are counted; all of them if the space holds no more.
DRAWS = 1000
#: Bins of a continuous parameter.
BINS = 5


@dataclass(frozen=True)
class ParameterCoverage:
    """One parameter, with the number of schedules tried at each of its values, or in each bin, in order."""

    name: str
    tried: tuple[tuple[str, int], ...]

    @property
    def untried(self) -> tuple[str, ...]:
        """Values that no schedule was evaluated at."""
        return tuple(value for value, count in self.tried if not count)


@dataclass(frozen=True)
class SpaceCoverage:
    """What a search has seen of its space.

    Attributes:
        settings: how many the space holds, None if a parameter is continuous.
        draws: settings drawn to count on, or all of them.
        unfit: how many of these have no schedule.
        distinct: distinct schedules among the others.
        priced: how many of these have a predicted latency.
        excluded: how many of the priced ones are over the budget.
        evaluated: number of evaluated schedules.
    """

    settings: int | None
    draws: int
    unfit: int
    distinct: int
    priced: int
    excluded: int
    evaluated: int
    parameters: tuple[ParameterCoverage, ...]

    @property
    def excluded_share(self) -> float | None:
        """Share of the schedules over the budget, None if no latency can be predicted."""
        return self.excluded / self.priced if self.priced else None


def coverage(
    space: SearchSpace,
    grids: Sequence[Grid],
    chunks: int,
    tried: Sequence[Mapping[str, Value]],
    ratio: Callable[[Steps], float | None] = lambda steps: None,
    budget_ratio: float = 1.0,
    seed: int = 0,
) -> SpaceCoverage:
    """Counts what was tried.

    Args:
        space: the search space.
        grids, chunks: of the model.
        tried: values of each evaluated schedule; for presets, the nearest ones.
        ratio: predicts latency as a share of the full schedule's; None where it cannot.
        budget_ratio: the budget as such a share.
        seed: of the draws.
    """
    counted = [steps for _, steps in expanded(space, grids, chunks, all_or_drawn_settings(space, seed, DRAWS))]
    found = {steps_key(steps): steps for steps in counted if steps is not None}
    ratios = [value for value in map(ratio, found.values()) if value is not None]
    return SpaceCoverage(
        settings=space.settings,
        draws=len(counted),
        unfit=counted.count(None),
        distinct=len(found),
        priced=len(ratios),
        excluded=sum(value > budget_ratio for value in ratios),
        evaluated=len(tried),
        parameters=tuple(_of_parameter(parameter, tried) for parameter in space.parameters),
    )


def _of_parameter(parameter: Parameter, tried: Sequence[Mapping[str, Value]]) -> ParameterCoverage:
    values = [values[parameter.name] for values in tried if parameter.name in values]
    if parameter.values:
        counts = Counter(values)
        return ParameterCoverage(parameter.name, tuple((_text(value), counts[value]) for value in parameter.values))
    low, high = parameter.low, parameter.high
    if parameter.kind == "int" and high - low < 2 * BINS:
        counts = Counter(int(value) for value in values)
        return ParameterCoverage(parameter.name, tuple((f"{v}", counts[v]) for v in range(int(low), int(high) + 1)))
    if parameter.log:
        edges = [low * (high / low) ** (k / BINS) for k in range(BINS + 1)]
    else:
        edges = [low + (high - low) * k / BINS for k in range(BINS + 1)]
    bins = [0] * BINS
    for value in values:
        bins[sum(float(value) > edge for edge in edges[1:-1])] += 1
    names = (f"{first:.3g} to {last:.3g}" for first, last in itertools.pairwise(edges))
    return ParameterCoverage(parameter.name, tuple(zip(names, bins, strict=True)))


def _text(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"
