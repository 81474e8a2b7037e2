"""What measurements mean under the limits: what to verify, what to conclude, and what would settle it. Pure functions.

Nothing is run, read or written here. Quality is candidate minus full schedule, positive is better; the composite counts in
allowances of the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.config.costs import FINALISTS_PER_KIND
from tuner.config.limits import Budget
from tuner.config.quality import MetricLimit, limited
from tuner.config.space import PromptSource
from tuner.metrics.registry import declaration_of
from tuner.results import pareto
from tuner.results.candidate import OF_TIME, Finalist, Measured, Verdict
from tuner.statistics.bounds import ALPHA, indistinguishable
from tuner.statistics.looks import claims, judgement_alpha
from tuner.statistics.provable import MOST_PROMPTS, prompts_to_decide

#: A schedule above this ratio to the full one is not an acceleration.
LEAST_GAIN = 0.98


@dataclass(frozen=True)
class Limits:
    """What a schedule must keep.

    Attributes:
        budget: as typed.
        baseline_ms: the study's figure for the full schedule, to which a share refers.
        metrics: how far each may fall.
        floors: smallest mean per metric.
        quality: False for random weights, for which only latency is judged.
    """

    budget: Budget
    baseline_ms: float
    metrics: tuple[MetricLimit, ...]
    floors: Mapping[str, float] = field(default_factory=dict)
    quality: bool = True

    @property
    def budget_ms(self) -> float:
        return self.budget.resolve(self.baseline_ms)

    @property
    def budget_ratio(self) -> float:
        """The budget as a share of the full schedule's latency."""
        return self.budget_ms / self.baseline_ms


@dataclass(frozen=True)
class Heldout:
    """The held-out prompts of a study, in numbers.

    Attributes:
        source: as requested.
        count: how many there are.
        micro_batch: images drawn together.
        judgements: how often the study was judged before.
        available: gives how many there would be if this many were requested.
    """

    source: PromptSource
    count: int
    micro_batch: int
    judgements: int
    available: Callable[[int], int]


@dataclass(frozen=True)
class Conclusion:
    """How a study ends.

    Attributes:
        verdict: a key of results.result.EXIT_CODES.
        reason: one line.
        picks: key by name.
        smallest_budget_ms: if infeasible, the least budget that some schedule meets with its quality kept.
        nearest: keys, nearest to the limits first.
        settle_heldout: the --heldout with which one more judgment decides; None if prompts are not what is missing.
    """

    verdict: str
    reason: str
    picks: Mapping[str, str] = field(default_factory=dict)
    smallest_budget_ms: float | None = None
    nearest: tuple[str, ...] = ()
    settle_heldout: str | None = None


def decide(limit: float, lower: float, upper: float) -> str:
    """ "met", "broken" or "open" for a value that must stay at or below a limit."""
    return "met" if upper <= limit else "broken" if lower > limit else "open"


def status_of(verdicts: Sequence[Verdict]) -> str:
    """The status of several verdicts together: "broken" if any is, else "open" if any is, else "met"."""
    states = {verdict.status for verdict in verdicts}
    return "broken" if "broken" in states else "open" if "open" in states else "met"


# ------------------------------------------------------------------------------------------------ comparing


def preference(candidate: Measured) -> tuple[float, float]:
    """A sort key, larger is better: quality, then less acceleration."""
    quality = candidate.differences["quality"].mean if candidate.differences else 0.0
    return (round(quality, 9), candidate.processed_tokens)


def keeps_quality(candidate: Measured) -> bool:
    """Whether no limit except latency's is broken, as far as is known."""
    found = [v for v in candidate.final_verdicts if v.name not in OF_TIME]
    # A finalist that was only timed is known from the search.
    found = found or [v for v in candidate.verdicts if v.name not in OF_TIME]
    return candidate.fully_evaluated and all(v.status != "broken" for v in found)


def may_be_feasible(candidate: Measured, limits: Limits) -> bool:
    """Whether, by the intervals, every limit may be kept."""
    fast = candidate.latency.against_full.low <= min(limits.budget_ratio, LEAST_GAIN)
    good = not limits.quality or all(
        -candidate.differences[m.metric].high <= m.allowed for m in limited(limits.metrics)
    )
    floors = all(v.status == "met" for v in candidate.verdicts if v.name.startswith("floor:"))
    return candidate.fully_evaluated and fast and good and floors


def choose_finalists(
    candidates: Sequence[Measured], limits: Limits, violation: Callable[[Measured], float]
) -> list[Measured]:
    """What to verify: the best within the limits by point estimate, with and without skipped scales; if there are none,
    those nearest to the limits whose intervals still reach them.

    `violation` gives how far point estimates are beyond the limits, in shares.
    """
    pool = [c for c in candidates if c.feasible and c.latency.share <= LEAST_GAIN]
    if pool:
        # First those whose whole interval meets the budget: a borderline one would only be undecided.
        ranked = sorted(pool, key=lambda c: (c.verdicts[0].bound <= c.verdicts[0].limit, preference(c)), reverse=True)
    else:
        ranked = sorted((c for c in candidates if may_be_feasible(c, limits)), key=violation)
    kinds = ([c for c in ranked if (c.skipped_scales > 0) == skips] for skips in (False, True))
    return [candidate for kind in kinds for candidate in kind[:FINALISTS_PER_KIND]]


def in_turn(candidates: Sequence[Measured], limits: Limits, violation: Callable[[Measured], float]) -> list[Measured]:
    """What to verify one after another until one is verified, in this order. Arguments as for `choose_finalists`.

    Each next one is what would be picked from those left if held-out prompts said what the search prompts did. Places left
    go to those that only may be within the limits: timing them costs little, and images are drawn only on their turn.
    """
    left = choose_finalists(candidates, limits, violation)
    spare = sorted((c for c in candidates if may_be_feasible(c, limits) and c not in left), key=violation)
    spare = spare[: max(0, 2 * FINALISTS_PER_KIND - len(left))]
    # Borderline in time alone, which is about to be measured better.
    left += [c for c in spare if all(v.status == "met" for v in c.verdicts if v.name not in OF_TIME)]
    spare = [c for c in spare if c not in left]
    order: list[Measured] = []
    while left:
        key = least_accelerated(
            {c.key: c.values["quality"] for c in left},
            {c.key: c.differences["quality"].mean for c in left},
            {c.key: c.processed_tokens for c in left},
        )
        order += [c for c in left if c.key == key]
        left = [c for c in left if c.key != key]
    return [*order, *spare]


def named_picks(verified: Sequence[Finalist], quality: bool) -> dict[str, str]:
    """Named picks among the verified finalists.

    The pick is the least accelerated of those whose quality is indistinguishable from the best.
    """
    fastest = min(verified, key=lambda c: c.verification.latency.share)
    if not quality:
        return {"pick": max(verified, key=lambda c: c.processed_tokens).key, "fastest": fastest.key}
    pick = least_accelerated(
        {c.key: c.verification.values["quality"] for c in verified},
        {c.key: c.verification.differences["quality"].mean for c in verified},
        {c.key: c.processed_tokens for c in verified},
    )
    picks = {"pick": pick, "fastest": fastest.key}
    points = [(c.verification.latency.share, c.verification.differences["quality"].mean) for c in verified]
    picks["balanced"] = verified[pareto.balanced(points)].key
    picks["best_quality"] = max(verified, key=lambda c: c.verification.differences["quality"].mean).key
    without_skips = [c for c in verified if not c.skipped_scales]
    if without_skips:
        picks["no_skip"] = min(without_skips, key=lambda c: c.verification.latency.share).key
    return picks


def least_accelerated(
    qualities: Mapping[str, Sequence[float]], means: Mapping[str, float], processed_tokens: Mapping[str, float]
) -> str:
    """The key with most tokens left among those whose quality is indistinguishable from the best.

    Args:
        qualities: per key, the composite per held-out prompt in order.
        means: per key, its mean difference from the full schedule.
        processed_tokens: per key.
    """
    best = max(means, key=lambda key: means[key])

    def equal(key: str) -> bool:
        count = min(len(qualities[key]), len(qualities[best]))
        return indistinguishable(qualities[key][:count], qualities[best][:count])

    return max((k for k in means if k == best or equal(k)), key=lambda k: (processed_tokens[k], k))


def is_settled(
    verified: Sequence[str],
    undecided: Sequence[str],
    qualities: Mapping[str, Sequence[float]],
    baseline: Sequence[float],
    processed_tokens: Mapping[str, float],
) -> bool:
    """Whether the pick stays the same even if one of the undecided were verified after all.

    Args:
        verified, undecided: keys.
        qualities: per key, the composite per held-out prompt in order.
        baseline: the full schedule's.
        processed_tokens: per key.
    """
    if not verified:
        return False
    means = {
        k: float(np.mean(np.subtract(qualities[k], baseline[: len(qualities[k])]))) for k in (*verified, *undecided)
    }

    def pick_of(keys: Sequence[str]) -> str:
        return least_accelerated(qualities, {key: means[key] for key in keys}, processed_tokens)

    pick = pick_of(verified)
    return all(pick_of((*verified, key)) == pick for key in undecided)


# ------------------------------------------------------------------------------------------------ concluding


def conclude(
    finalists: Sequence[Finalist],
    candidates: Sequence[Measured],
    baseline: Finalist,
    limits: Limits,
    heldout: Heldout,
    violation: Callable[[Measured], float],
) -> Conclusion:
    """The verdict of a study.

    Args:
        finalists: with their verifications.
        candidates: all that were evaluated, finalists included.
        baseline: the full schedule, verified.
        limits: what schedules must keep.
        heldout: the held-out prompts.
        violation: gives how far point estimates are beyond the limits, in shares.
    """
    verified = [c for c in finalists if c.verification.status == "verified"]
    undecided = [c for c in finalists if c.verification.status == "open"]
    picks = named_picks(verified, limits.quality) if verified else {}
    if baseline.verification.verdicts[0].status == "met":
        full_ms = baseline.verification.latency.median_ms
        reason = f"the full schedule already meets the budget of {limits.budget}: {full_ms:.1f} ms; it is the pick"
        return Conclusion("baseline_meets_budget", reason, {**picks, "pick": baseline.key})
    if verified:
        pick = next(c for c in verified if c.key == picks["pick"])
        if not limits.quality:
            reason = (
                f"random weights: {pick.final_latency.speedup_text} within the budget, quality not measured; "
                "the least accelerated schedule under the budget"
            )
            return Conclusion("latency_only", reason, picks)
        return Conclusion("verified", _proof(pick, limits), picks)
    if undecided:
        return _inconclusive(undecided, baseline, limits, heldout)
    return _infeasible(candidates, baseline, limits, violation)


def _proof(pick: Finalist, limits: Limits) -> str:
    proved = ", ".join(
        f"{m.metric} {pick.final_differences[m.metric].signed_text}, drop at most {m.amount(v.bound)} (allowed "
        f"{m.amount(v.limit)})"
        for m in limited(limits.metrics)
        for v in pick.verification.verdicts
        if v.name == m.name
    )
    on = f"on {pick.verification.prompts} held-out prompts"
    return f"{pick.final_latency.speedup_text} within {limits.budget} {on}: {proved}"


def _inconclusive(undecided: Sequence[Finalist], baseline: Finalist, limits: Limits, heldout: Heldout) -> Conclusion:
    needed = {c.key: needed_prompts(c, baseline, limits, heldout) for c in undecided}

    def easiest(c: Finalist) -> tuple[bool, bool, float, str]:
        # First those that only need more prompts, then those that seem to keep their limits.
        beyond = any(v.value > v.limit for v in c.verification.verdicts if v.name.startswith("drop:"))
        return c.verification.times_open, beyond, needed[c.key] or math.inf, c.key

    ranked = sorted(undecided, key=easiest)
    best = ranked[0]
    texts = ", ".join(
        f"{v.name} {v.value:.4g} (95 % bound {v.bound:.4g}) is too close to the limit {v.limit:.4g}"
        for v in best.verification.verdicts
        if v.status == "open"
    )
    advice, settle = "measure again on a quieter machine or loosen --budget", None
    if not best.verification.times_open:
        advice, settle = prompts_advice(needed[best.key], heldout)
    reason = f"{texts}; {advice}"
    return Conclusion("inconclusive", reason, nearest=tuple(c.key for c in ranked), settle_heldout=settle)


def _infeasible(
    candidates: Sequence[Measured], baseline: Measured, limits: Limits, violation: Callable[[Measured], float]
) -> Conclusion:
    budget, full_ms, number = limits.budget, baseline.latency.median_ms, len(candidates)
    latencies = [c.final_latency for c in candidates if keeps_quality(c)]
    fastest = min(latencies, key=lambda latency: latency.drift_corrected_ms, default=None)
    smallest = None
    if fastest is None:
        reason = f"no schedule of {number} keeps the quality; raise --max-drop"
    elif fastest.drift_corrected_ms > limits.budget_ms:
        smallest = fastest.drift_corrected_ms
        reason = (
            f"no schedule of {number} meets {budget} ({limits.budget_ms:.1f} ms); the smallest "
            f"reachable budget is {smallest:.1f} ms ({100 * smallest / full_ms:.0f}% of the full schedule"
            f"{', predicted from its steps' if fastest.predicted else ''})"
        )
    elif limits.quality:
        reason = f"no schedule within {budget} kept the quality on the held-out prompts; raise --budget or --max-drop"
    else:
        smallest = fastest.drift_corrected_ms
        reason = f"no schedule of {number} is within {budget} by its upper bound; raise --budget"
    nearest = sorted(candidates, key=violation)[:3]
    return Conclusion("infeasible", reason, smallest_budget_ms=smallest, nearest=tuple(c.key for c in nearest))


# ------------------------------------------------------------------------------------------------ what would settle it


def needed_prompts(candidate: Finalist, baseline: Finalist, limits: Limits, heldout: Heldout) -> int | None:
    """Held-out prompts on which the next judgment would decide everything open about a finalist's quality."""
    check = candidate.verification
    share = check.error_share or 1.0
    seen = claims(heldout.count, heldout.micro_batch, heldout.judgements).get(check.prompts)
    alphas = ALPHA if seen is None else share * seen, share * judgement_alpha(heldout.judgements + 1)
    counts: list[int | None] = []
    for verdict in check.verdicts:
        if verdict.status == "open" and verdict.name not in OF_TIME and check.prompts:
            limit, drops_N, bound = _open_drop(candidate, baseline, limits, verdict)
            counts.append(prompts_to_decide(limit, drops_N, bound, alphas, heldout.micro_batch))
    decided = [count for count in counts if count is not None]
    return max(decided) if counts and len(decided) == len(counts) else None


def _open_drop(
    candidate: Finalist, baseline: Finalist, limits: Limits, verdict: Verdict
) -> tuple[MetricLimit, np.ndarray, float]:
    """The limit behind a verdict on quality, drops per prompt, and their bound; a floor limits the drop from the top."""
    values, metric = candidate.verification.values, verdict.name.partition(":")[2]
    own = np.asarray(values[metric])
    if verdict.name.startswith("floor:"):
        declared = declaration_of(metric)
        top = 0.0 if declared.kind == "continuous" else declared.change
        room = MetricLimit(
            metric, 1.0, top - verdict.limit, declared.kind, declared.unit, declared.change, declared.higher_is_better
        )
        return room, top - own, top - verdict.bound
    limit = next(m for m in limited(limits.metrics) if m.metric == metric)
    full = np.asarray(baseline.verification.values[metric])[: own.size]
    return limit, (full - own) * limit.sign, verdict.bound


def prompts_advice(needed: int | None, heldout: Heldout) -> tuple[str, str | None]:
    """What would decide an undecided quality, in words and as a value of --heldout."""
    source = heldout.source
    if needed is None:
        none = f"not even {MOST_PROMPTS:,} held-out prompts would be enough if the estimates hold: loosen the limit"
        return none, None
    there = heldout.available(needed)
    if there < needed:
        return (
            f"about {needed} held-out prompts would be enough if the estimates hold, but {source.source:.200} leaves only "
            f"{there}: add prompts and start over, or loosen the limit"
        ), None
    # The order of geneval's prompts depends on how many there are of each task (tuner.config.prompts).
    parts = heldout.count - sum(source.added), *source.added, needed - heldout.count
    text = "+".join(map(str, parts)) if source.source == "geneval" else str(needed)
    return f"raise --heldout (about {needed} prompts should be enough if the estimates hold) or loosen the limit", text
