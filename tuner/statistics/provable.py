"""What a given number of held-out prompts can prove: known, and reported, before anything runs.

The figures follow from the same bounds (tuner.statistics.bounds) and looks (tuner.statistics.looks) as the verdicts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from tuner.config.quality import MetricLimit, limited
from tuner.metrics.registry import declaration_of
from tuner.statistics.bounds import ALPHA, LEAST_CONTINUOUS, binomial_upper, unseen_share
from tuner.statistics.looks import claims

#: Share of prompts on which a harmless schedule usually differs from the full one, half of them in either direction.
DISCORDANT = 0.05
_WHEN_SOME_DIFFER = f"four times out of five when {100 * DISCORDANT:.0f} % of prompts differ"
#: The most prompts that are considered.
MOST_PROMPTS = 1 << 17
#: Chance of a proof that counts as enough: for a harmless schedule, and for a further judgment if the results so far are
#: representative.
DECIDING = 0.8


def provable_drop(
    limit: MetricLimit, prompts: int, micro_batch: int, discordant: float = 0.0, error_share: float = 1.0
) -> float:
    """The smallest max_drop that this many held-out prompts can prove for a schedule that changes nothing on average.

    `discordant` is the share of prompts that differ, half of them by +change and half by -change; by chance more of them may
    lose than gain, so the drop is one that is proved with a chance of DECIDING. `error_share` is the share
    of the judgment's error that the schedule's claims may make. Infinite if the prompts prove nothing.
    """
    looks = claims(prompts, micro_batch).items()
    bounds = (_bound(limit, n, error_share * alpha, discordant) for n, alpha in looks)
    return min(bounds, default=math.inf)


def _bound(limit: MetricLimit, prompts: int, alpha: float, discordant: float) -> float:
    """What the bound of `drop_bounds` or `continuous_drop_bounds` stays below with a chance of DECIDING, for one finalist
    that loses nothing on average."""
    change, variance = limit.change, discordant * limit.change**2
    luck = float(special.ndtri(DECIDING)) * math.sqrt(variance / prompts)
    return luck + _expected_bound(limit, prompts, alpha, 0.0, variance, change if discordant else 0.0)


def _expected_bound(
    limit: MetricLimit, prompts: int, alpha: float, mean: float, variance: float, worst: float, skewness: float = 0.0
) -> float:
    """The upper bound for one finalist whose drops have this mean, variance, largest value and skewness."""
    change = limit.change
    if limit.kind == "continuous":
        if prompts < LEAST_CONTINUOUS:
            return math.inf
        t = float(special.stdtrit(prompts - 1, 1 - alpha))
        skewed = max(skewness, 0.0) / (6 * prompts) * (1 + 2 * t**2)
        width = math.sqrt(variance) * (t / math.sqrt(prompts) + skewed) + (worst - mean) / prompts
        return mean + max(width, change * unseen_share(alpha, prompts))
    if prompts < 2:
        return math.inf
    error = math.sqrt((variance * prompts + 2 * change**2) / (prompts + 2) / prompts)
    losses = np.clip(mean * prompts / change, 0, prompts)
    exact = change * float(binomial_upper(losses, prompts, alpha))
    return max(mean + float(special.ndtri(1 - alpha)) * error, exact)


def prompts_to_decide(
    limit: MetricLimit,
    drops_N: Sequence[float] | np.ndarray,
    bound: float,
    alphas: tuple[float, float],
    micro_batch: int,
) -> int | None:
    """Held-out prompts, including old ones, on which one more judgment decides a limit four times out of five.

    Deciding means proving the limit if the estimate is within it and refuting it otherwise, assuming that mean and spread
    stay the same. None if no number up to 131,072 does, or if the estimate equals the limit.

    Args:
        limit: of the metric.
        drops_N: what was seen, in the metric's unit.
        bound: what that proved.
        alphas: the errors of the claim behind `bound` and of the next one.
        micro_batch: prompts are counted in whole micro-batches.
    """
    seen_N = np.asarray(drops_N, dtype=np.float64)
    count, mean, sd = seen_N.size, float(seen_N.mean()), float(seen_N.std())
    skewness = float(((seen_N - mean) ** 3).mean()) / sd**3 if sd > 0 else 0.0
    shape = mean, sd**2, float(seen_N.max()), skewness
    alone = _expected_bound(limit, count, alphas[0], *shape)
    # The cost of bounds that hold for all finalists together; it stays about the same on more prompts.
    wider = max(1.0, (bound - mean) / (alone - mean)) if math.isfinite(bound) and alone > mean else 1.0
    luck = float(special.ndtri(DECIDING))
    prompts = count
    while prompts <= MOST_PROMPTS:
        prompts = micro_batch * (prompts // micro_batch + max(1, prompts // (256 * micro_batch)))
        error = sd / math.sqrt(prompts)
        if mean > limit.allowed:
            decided = mean - (luck + float(special.ndtri(1 - ALPHA))) * error > limit.allowed
        else:
            expected = mean + wider * (_expected_bound(limit, prompts, alphas[1], *shape) - mean)
            decided = expected + luck * error <= limit.allowed
        if decided:
            return prompts
    return None


def prompts_needed(
    limit: MetricLimit, micro_batch: int, discordant: float = 0.0, error_share: float = 1.0
) -> int | None:
    """Least number of held-out prompts, in whole micro-batches, that proves the limit (`provable_drop`); None if 131,072 do
    not.

    More prompts do not always prove more, since an additional look takes its error from the last one; hence the search.
    """
    prompts = micro_batch
    while prompts <= MOST_PROMPTS:
        proved = provable_drop(limit, prompts, micro_batch, discordant, error_share)
        if proved <= limit.allowed and math.isfinite(proved):
            return prompts
        prompts += micro_batch * max(1, prompts // (256 * micro_batch))
    return None


def shortfalls(limits: Sequence[MetricLimit], prompts: int, micro_batch: int, error_share: float = 1.0) -> list[str]:
    """One phrase per limit that this many held-out prompts could not prove even if no image changed."""
    found = []
    for limit in limited(limits):
        least = provable_drop(limit, prompts, micro_batch, error_share=error_share)
        if least > limit.allowed:
            needed = prompts_needed(limit, micro_batch, error_share=error_share)
            would = "no number of prompts would do" if needed is None else f"it takes {needed}"
            proves = "they prove nothing" if math.isinf(least) else f"the least they prove is {limit.amount(least)}"
            found.append(
                f"a {limit.metric} drop of at most {limit.amount(limit.allowed)} cannot be proved on {prompts} "
                f"held-out {'prompt' if prompts == 1 else 'prompts'} ({proves}; {would})"
            )
    return found


def floor_shortfalls(
    floors: Mapping[str, float], prompts: int, micro_batch: int, error_share: float = 1.0
) -> list[str]:
    """One phrase per floor that this many held-out prompts could not prove even if every image were perfect."""
    found = []
    for metric, floor in floors.items():
        declared = declaration_of(metric)
        room = math.inf if declared.kind == "continuous" else declared.change - floor
        limit = MetricLimit(metric, 1.0, room, declared.kind, declared.unit, declared.change)
        least = provable_drop(limit, prompts, micro_batch, error_share=error_share)
        if least > room or math.isinf(least):
            needed = prompts_needed(limit, micro_batch, error_share=error_share)
            would = "no number of prompts would do" if needed is None else f"it takes {needed}"
            found.append(f"a {metric} floor of {floor:g} cannot be proved on {prompts} held-out prompts ({would})")
    return found


def limits_table(
    limits: Sequence[MetricLimit], prompts: int, micro_batch: int, error_share: float = 1.0
) -> list[dict[str, Any]]:
    """Per metric, what is allowed and what this many held-out prompts can prove, as plain data for `--dry-run`.

    "provable_drop" is what they prove when nothing changes, "provable_drop_discordant" four times out of five when 5 % of
    prompts differ.
    "prompts_needed" and "prompts_needed_discordant" prove the limit. None means that nothing is proved, or that no number is
    enough. Metrics without a limit are left out.
    """
    rows = []
    for limit in limited(limits):
        row = dataclasses.asdict(limit)
        for suffix, discordant in (("", 0.0), ("_discordant", DISCORDANT)):
            drop = provable_drop(limit, prompts, micro_batch, discordant, error_share)
            row[f"provable_drop{suffix}"] = None if math.isinf(drop) else float(f"{drop:.4g}")
            row[f"prompts_needed{suffix}"] = prompts_needed(limit, micro_batch, discordant, error_share)
        rows.append(row)
    return rows


def limit_lines(
    limits: Sequence[MetricLimit], prompts: int, micro_batch: int, error_share: float = 1.0, judged: bool = True
) -> list[str]:
    """The same in words, a line per metric, those without a limit included; no proofs if no image is `judged`."""
    rows = {row["metric"]: row for row in limits_table(limits, prompts, micro_batch, error_share)}
    lines = []
    for limit in limits:
        if limit.max_drop is None:
            lines.append(f"{limit.metric}: none, it {'only ranks' if limit.weight else 'is only reported'}")
            continue
        if not judged:
            lines.append(f"{limit.metric}: at most {limit.amount(limit.allowed)}; not judged")
            continue
        row, words = rows[limit.metric], []
        for suffix, when in (("", "when nothing changes"), ("_discordant", _WHEN_SOME_DIFFER)):
            drop, needed = row[f"provable_drop{suffix}"], row[f"prompts_needed{suffix}"]
            proved = "nothing" if drop is None else limit.amount(drop)
            words.append(f"{proved} {when} ({'no number is enough' if needed is None else f'{needed} are enough'})")
        allowed = limit.amount(limit.allowed)
        lines.append(f"{limit.metric}: at most {allowed}; {prompts} held-out prompts prove {', '.join(words)}")
    return lines
