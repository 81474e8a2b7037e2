"""What each lasting change to the full schedule costs, and what that says about every other schedule.

A schedule is the full one with changes that last: guidance ends at a scale for good, every scale from some scale on keeps a
share of its tokens, scales are left out, products are computed in another precision from a scale on. Each change alone is
also a schedule, and shares the full one's scales up to its own, so a few dozen are cheap to evaluate as one prefix tree.

A schedule's prediction: kept shares that differ from scale to scale are telescoped (the cost of scale i's share from i on,
minus its cost from the next scale on), and the worst kind of change counts, prompt by prompt. Both rules were chosen by
measurement (benchmarks/RESULTS.md): a change of one scale alone is repaired by the scales after it and predicts nothing, and
summing over kinds counts an image that breaks twice.

Pure: nothing is run here.

Source: sensitivity tables of mixed-precision quantization, e.g. HAWQ-V3 (arXiv 2011.10680), which choose bits per layer by
sums; ours are paired per prompt and use image metrics, theirs the loss's curvature.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

from stagevar.schedule import BOTH, Branch, LowRank, Pivotal, Plugged, ScaleStep, Steps
from stagevar.schedule.ranks import rank
from stagevar.schedule.stage_schedule import kept_tokens
from stagevar.schedule.steps import Reduction

#: Smallest kept share that is measured: below it there is next to nothing left to lose.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class GuidanceEnds:
    """From `scale` on only `branch` runs; if `fuse_layer` > 0, the layers before it still run both at that scale."""

    scale: int
    branch: Branch
    fuse_layer: int = 0


@dataclass(frozen=True)
class FewerTokens:
    """From `scale` on every scale keeps `share` of its tokens; `kind` is how they are reduced, with its numbers set to 0."""

    scale: int
    kind: Reduction
    share: float


@dataclass(frozen=True)
class LeftOut:
    """Scales that are not run."""

    scales: tuple[int, ...]


@dataclass(frozen=True)
class Precision:
    """From `scale` on the products of the blocks are computed in another precision."""

    scale: int
    precision: str


Change = GuidanceEnds | FewerTokens | LeftOut | Precision
#: Values of one schedule per prompt.
Rows: TypeAlias = Sequence[float] | np.ndarray


def kind_of(reduction: Reduction) -> Reduction:
    """A reduction without its numbers: what all its amounts have in common."""
    if isinstance(reduction, LowRank):
        return dataclasses.replace(reduction, ranks=(0,) * len(reduction.ranks))
    return dataclasses.replace(reduction, kept=0, cache_scale=0)


def kept_share(step: ScaleStep) -> float:
    """Kept tokens over all tokens, averaged over chunks."""
    return step.processed_tokens(len(getattr(step.reduction, "ranks", (0,)))) / len(step.branches) / step.tokens


def changes_of(steps: Steps) -> tuple[Change, ...]:
    """How a schedule differs from the full one, with one FewerTokens per scale.

    A change at a scale that is left out takes effect at the next one that is run. Raises ValueError for a schedule that
    decides per image.
    """
    found: list[Change] = []
    left_out = tuple(step.scale for step in steps if step.skipped)
    if left_out:
        found.append(LeftOut(left_out))
    guided, precision = True, "model"
    for step in steps:
        if step.decision is not None:
            raise ValueError(f"scale {step.scale} decides per image: no table predicts what it chooses")
        if step.skipped:
            continue
        if guided and (step.branches != BOTH or step.fuse_layer):
            found.append(GuidanceEnds(step.scale, BOTH[0] if step.fuse_layer else step.branches[0], step.fuse_layer))
            guided = False
        if step.reduction is not None:
            found.append(FewerTokens(step.scale, kind_of(step.reduction), kept_share(step)))
        if step.precision != precision:
            precision = step.precision
            found.append(Precision(step.scale, precision))
    return tuple(found)


def alone(change: Change, full: Steps) -> Steps:
    """The full schedule with this one change."""

    def changed(step: ScaleStep) -> ScaleStep:
        match change:
            case GuidanceEnds(scale, branch, fuse_layer) if step.scale > scale or (
                step.scale == scale and not fuse_layer
            ):
                return dataclasses.replace(step, branches=(branch,))
            case GuidanceEnds(scale, _, fuse_layer) if step.scale == scale:
                return dataclasses.replace(step, fuse_layer=fuse_layer)
            case FewerTokens(scale, kind, share) if step.scale >= scale:
                return dataclasses.replace(step, reduction=_amount(kind, share, step.tokens, scale - 1))
            case FewerTokens(scale, Pivotal() as kind, _) if step.scale == scale - 1:
                return dataclasses.replace(step, keeps=kind.layers)
            case LeftOut(scales) if step.scale in scales:
                return dataclasses.replace(step, skipped=True, branches=())
            case Precision(scale, precision) if step.scale >= scale:
                return dataclasses.replace(step, precision=precision)
        return step

    return tuple(changed(step) for step in full)


def _amount(kind: Reduction, share: float, tokens: int, cache_scale: int) -> Reduction:
    if isinstance(kind, LowRank):
        return dataclasses.replace(kind, ranks=(rank(share, tokens),) * len(kind.ranks))
    return dataclasses.replace(kind, kept=kept_tokens(share, tokens), cache_scale=cache_scale)


def changes_to_measure(schedules: Iterable[Steps], levels: int = 2, every_kind: bool = False) -> list[Change]:
    """The changes that predictions of these schedules need, latest first: neighbors share most of their work.

    Kept shares are measured at `levels` evenly spaced amounts from the smallest that occurs up to all tokens, which cost
    nothing. An accelerator's most frequent kind stands for its others, unless `every_kind`. A fused end of guidance is
    predicted by the plain one. Schedules that decide per image are ignored.
    """
    single: set[Change] = set()
    kinds: dict[object, Counter[Reduction]] = {}
    scales: set[int] = set()
    least = 1.0
    for steps in schedules:
        if any(step.decision is not None for step in steps):
            continue
        for change in changes_of(steps):
            if isinstance(change, FewerTokens):
                group = change.kind if every_kind else _accelerator(change.kind)
                kinds.setdefault(group, Counter())[change.kind] += 1
                scales.add(change.scale)
                least = min(least, change.share)
            elif isinstance(change, GuidanceEnds):
                single.add(dataclasses.replace(change, fuse_layer=0))
            else:
                single.add(change)
    shares = np.linspace(max(least, LEAST_SHARE), 1, levels + 1)[:-1]
    for counts in kinds.values():
        kind = min(counts, key=lambda kind: (-counts[kind], repr(kind)))
        single |= {FewerTokens(scale, kind, float(share)) for scale in scales for share in shares}
    return sorted(single, key=lambda change: (-_first(change), repr(change)))


def _first(change: Change) -> int:
    return change.scales[0] if isinstance(change, LeftOut) else change.scale


def _accelerator(kind: Reduction) -> str:
    return kind.accelerator if isinstance(kind, Plugged) else type(kind).__name__


@dataclass(frozen=True)
class Predicted:
    """Mean difference from the full schedule (positive is better) and its standard error over prompts."""

    mean: float
    standard_error: float


class Sensitivities:
    """The table: differences that lasting changes make, and what they predict.

    Args:
        metrics: M names.
        differences: per change, (M, N) paired differences on the same N >= 1 prompts, candidate minus full schedule,
            positive is better.

    Raises:
        ValueError: for rows of unequal shape.
    """

    def __init__(self, metrics: Sequence[str], differences: Mapping[Change, Any]):
        self.metrics = tuple(metrics)
        self.rows = {change: np.asarray(row, dtype=np.float64) for change, row in differences.items()}
        shapes = {row.shape for row in self.rows.values()}
        if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != len(self.metrics) or not shape[1] for shape in shapes):
            raise ValueError(f"every change needs the same metrics and prompts, not rows of {sorted(shapes)}")
        self.prompts = shapes.pop()[1] if shapes else 0
        self._zero_MN = np.zeros((len(self.metrics), self.prompts))
        self._levels: dict[tuple[int, Reduction], list[FewerTokens]] = {}
        for change in self.rows:
            if isinstance(change, FewerTokens):
                self._levels.setdefault((change.scale, change.kind), []).append(change)
        for found in self._levels.values():
            found.sort(key=lambda change: change.share)

    def differences(self, steps: Steps) -> np.ndarray | None:
        """Predicted differences (M, N) per metric and prompt; None if the table lacks a change."""
        if any(step.decision is not None for step in steps):
            return None
        changes = changes_of(steps)
        tokens = [change for change in changes if isinstance(change, FewerTokens)]
        kinds = [self.change_row(change) for change in changes if not isinstance(change, FewerTokens)]
        if tokens:
            kinds.append(self.telescoped(tokens, [step.scale for step in steps if not step.skipped]))
        kinds_KMN = [row_MN for row_MN in kinds if row_MN is not None]
        if len(kinds_KMN) < len(kinds):
            return None
        worst_MN: np.ndarray = np.min(kinds_KMN, axis=0) if kinds_KMN else self._zero_MN
        return worst_MN

    def predict(self, steps: Steps) -> dict[str, Predicted] | None:
        """Predictions by metric; None if the table lacks a change."""
        found_MN = self.differences(steps)
        if found_MN is None:
            return None
        return {metric: predicted(row_N) for metric, row_N in zip(self.metrics, found_MN, strict=True)}

    def telescoped(self, tokens: Sequence[FewerTokens], run: Sequence[int]) -> np.ndarray | None:
        """Paired differences (M, N) of fewer tokens at several scales, each net of its cost from the next run scale on.

        `run` lists all scales that are run, in order. None if one of the changes has no row.
        """
        following = dict(itertools.pairwise(run))
        total_MN = self._zero_MN
        for change in tokens:
            here = self.change_row(change)
            after = following.get(change.scale)
            later = self._zero_MN if after is None else self.change_row(dataclasses.replace(change, scale=after))
            if here is None or later is None:
                return None
            total_MN = total_MN + here - later
        return total_MN

    def change_row(self, change: Change) -> np.ndarray | None:
        """Paired differences (M, N) of one change, measured or interpolated between measured shares of tokens.

        Below the smallest measured share, that share's row. None if nothing like the change was measured.
        """
        if change in self.rows:
            return self.rows[change]
        if isinstance(change, GuidanceEnds):  # fusing keeps guidance a little longer, so it costs no more
            return self.rows.get(dataclasses.replace(change, fuse_layer=0))
        if not isinstance(change, FewerTokens):
            return None
        levels = self._levels.get((change.scale, change.kind)) or self._kin(change)
        if not levels:
            return None
        # Keeping all tokens costs nothing; below the smallest measured share nothing is known, so that share's cost is used.
        shares = [level.share for level in levels] + [1.0]
        rows_LMN = np.stack([*(self.rows[level] for level in levels), self._zero_MN])
        above = int(np.searchsorted(shares, change.share))
        if above == 0:
            return rows_LMN[0]
        low, high = shares[above - 1], shares[above]
        part = (change.share - low) / (high - low)
        row_MN: np.ndarray = (1 - part) * rows_LMN[above - 1] + part * rows_LMN[above]
        return row_MN

    def _kin(self, change: FewerTokens) -> list[FewerTokens]:
        """The levels of another kind of the same accelerator at the same scale."""
        name = _accelerator(change.kind)
        kin = [k for scale, k in self._levels if scale == change.scale and _accelerator(k) == name]
        return self._levels[change.scale, min(kin, key=repr)] if kin else []

    # ------------------------------------------------------------------------------------------------ as plain data

    def to_data(self) -> dict[str, object]:
        """The table as a run directory keeps it."""
        changes = [{**_to_data(change), "differences": row_MN.tolist()} for change, row_MN in self.rows.items()]
        return {"metrics": list(self.metrics), "changes": changes}

    @classmethod
    def from_data(cls, data: Any) -> Sensitivities:
        """The inverse of `to_data`. Raises ValueError for any other data."""
        try:
            return cls(data["metrics"], {_from_data(entry): entry["differences"] for entry in data["changes"]})
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a table of sensitivities: {error}") from None


_CHANGES = {"guidance ends": GuidanceEnds, "fewer tokens": FewerTokens, "left out": LeftOut, "precision": Precision}
_KINDS = {"low rank": LowRank, "pivotal": Pivotal, "plugged": Plugged}


def _to_data(change: Change) -> dict[str, object]:
    what = next(name for name, cls in _CHANGES.items() if type(change) is cls)
    data = {"change": what, **dataclasses.asdict(change)}
    if isinstance(change, FewerTokens):
        kind = next(name for name, cls in _KINDS.items() if type(change.kind) is cls)
        data["kind"] = {"reduction": kind, **dataclasses.asdict(change.kind)}
    return data


def _from_data(entry: Any) -> Change:
    given = {name: _tuples(value) for name, value in entry.items() if name not in ("change", "differences")}
    if "kind" in given:
        kind = {name: _tuples(value) for name, value in given["kind"].items()}
        given["kind"] = _KINDS[kind.pop("reduction")](**kind)
    change: Change = _CHANGES[entry["change"]](**given)
    return change


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------ how well it predicts


def predicted(row_N: np.ndarray) -> Predicted:
    """Mean and standard error of predicted differences per prompt; the error is infinite for one prompt."""
    error = float(row_N.std(ddof=1) / np.sqrt(row_N.size)) if row_N.size > 1 else float("inf")
    return Predicted(float(row_N.mean()), error)


@dataclass(frozen=True)
class Agreement:
    """How well predictions match what was measured.

    Attributes:
        rank_correlation: Spearman's, None if undefined.
        coverage: share of the schedules whose measured mean is within 1.96 standard errors of the predicted one.
        bias: mean of measured minus predicted.
        count: number of schedules.
    """

    rank_correlation: float | None
    coverage: float
    bias: float
    count: int


def agreement(expected: Sequence[Predicted], measured: Sequence[Rows]) -> Agreement:
    """How well predictions match measured paired differences, per schedule. Raises ValueError for fewer than two schedules."""
    if len(expected) != len(measured) or len(expected) < 2:
        raise ValueError(f"agreement needs at least two schedules, not {len(expected)} predicted and {len(measured)}")
    means = np.array([np.mean(row) for row in measured])
    errors = np.array([np.std(row, ddof=1) / np.sqrt(len(row)) for row in measured])
    guesses = np.array([p.mean for p in expected])
    spread = 1.96 * np.hypot(errors, [p.standard_error for p in expected])
    varied = np.ptp(means) > 0 and np.ptp(guesses) > 0
    correlation = float(stats.spearmanr(guesses, means).statistic) if varied else None
    within = np.abs(means - guesses) <= spread + 1e-12
    return Agreement(correlation, float(within.mean()), float((means - guesses).mean()), len(means))


def noise_ceiling(measured: Sequence[Rows], splits: int = 50, seed: int = 0) -> float | None:
    """The rank correlation that a perfect prediction would have with these measured means, from halves of the prompts.

    The square root of the split-half reliability (Spearman-Brown); None if schedules do not differ.
    """
    rows_SN = np.asarray(measured, dtype=np.float64)
    rng, found = np.random.default_rng(seed), []
    for _ in range(splits):
        order = rng.permutation(rows_SN.shape[1])
        half = len(order) // 2
        one, other = rows_SN[:, order[:half]].mean(axis=1), rows_SN[:, order[half:]].mean(axis=1)
        if np.ptp(one) and np.ptp(other):
            correlation = max(0.0, float(stats.spearmanr(one, other).statistic))
            found.append(2 * correlation / (1 + correlation))
    return float(np.sqrt(np.mean(found))) if found else None
