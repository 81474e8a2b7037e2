"""Words and numbers that the report and the exported files share: names, units, intervals, what a schedule does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stagevar.profile import StepData
from tuner.config.quality import limited
from tuner.results.candidate import Candidate, Interval, LatencyStats
from tuner.results.result import StudyResult

PICK_ORDER = ("pick", "fastest", "balanced", "best_quality", "no_skip")


def ms(value: float) -> str:
    """Milliseconds with a nonbreaking space before the unit."""
    return f"{value:,.0f}\u00a0ms" if value >= 100 else f"{value:.1f}\u00a0ms"


def budget_text(result: StudyResult) -> str:
    """The budget as a time; as typed if it is a share and nothing was measured."""
    return ms(result.budget_ms) if math.isfinite(result.budget_ms) else f"{result.budget} of the full schedule"


def ms_span(low: float, high: float) -> str:
    return " to ".join(ms(v).removesuffix("\u00a0ms") for v in (low, high))


def signed(value: float, digits: int = 3) -> str:
    digits = max(0, digits - (abs(value) >= 1) - (abs(value) >= 10))
    shown = f"{value:+.{digits}f}".replace("-", "−")
    return shown[1:] if float(f"{value:.{digits}f}") == 0 else shown


def interval_text(interval: Interval) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return f"no interval from {interval.n} {'sample' if interval.n == 1 else 'samples'}"
    return f"{signed(interval.low)} to {signed(interval.high)}"


def speedup(latency: LatencyStats) -> tuple[float, float, float] | None:
    """Speed-up over the full schedule with its interval (the ratio is inverted, so its ends swap)."""
    gain = latency.speedup
    return None if gain is None or not math.isfinite(gain.high) else (gain.mean, gain.low, gain.high)


def latency_span_ms(latency: LatencyStats) -> tuple[float, float]:
    """Interval of the drift-corrected latency, ms."""
    if latency.ratio is None or latency.ratio.mean <= 0:
        return latency.low_ms, latency.high_ms
    unit = latency.drift_corrected_ms / latency.ratio.mean
    return latency.ratio.low * unit, latency.ratio.high * unit


def latency_of(result: StudyResult, candidate: Candidate) -> LatencyStats | None:
    """The figure to show. For the full schedule this is the study's reference, which all ratios refer to: a later
    measurement may have drifted, and a schedule must not look slower or faster because of that.
    """
    if candidate.key == result.baseline.key:
        return result.baseline.latency
    return candidate.final_latency


def shown_ms(result: StudyResult, candidate: Candidate) -> float:
    """Milliseconds of `latency_of`, infinite if nothing was measured."""
    latency = latency_of(result, candidate)
    return math.inf if latency is None else latency.drift_corrected_ms


def quality_change(candidate: Candidate) -> Interval | None:
    return candidate.final_differences.get("quality")


def limits_text(result: StudyResult) -> str:
    """ "a geneval drop of at most 2 % of prompts and a clip_score drop of at most 0.3 CLIP points" """
    parts = [f"a {m.metric} drop of at most {m.amount(m.allowed)}" for m in limited(result.limits)]
    return " and ".join(parts) if parts else "no quality limit"


def has_quality(result: StudyResult) -> bool:
    return not result.random_weights and any("quality" in c.final_differences for c in result.candidates)


def find(result: StudyResult, key: str) -> Candidate | None:
    return next((c for c in (result.baseline, *result.candidates) if c.key == key), None)


def name_of(result: StudyResult, candidate: Candidate) -> str:
    """What a reader calls a candidate: full schedule, the preset it came from, or its trial."""
    if candidate.key == result.baseline.key:
        return "full schedule"
    if candidate.source.startswith("enqueued"):
        return candidate.source.partition(":")[2].strip().replace("_", " ") or "preset"
    return f"trial {candidate.trial}"


def roles_of(result: StudyResult, key: str) -> list[str]:
    return [role.replace("_", " ") for role in PICK_ORDER if result.picks.get(role) == key]


def describe(steps: Sequence[StepData]) -> str:
    """What a schedule does, from its expanded steps; scales go by their side in tokens, as in the paper."""
    parts = []
    fused = next((s for s in steps if s.get("fuse_layer")), None)
    if fused is not None:
        parts.append(f"guidance ends inside side {side(fused)}, its branches fused before layer {fused['fuse_layer']}")
    alone = next((s for s in steps if not s.get("skipped") and len(s.get("branches", ())) == 1), None)
    if alone is not None:
        branch = "conditional" if alone["branches"][0] == "cond" else "unconditional"
        parts.append(f"only the {branch} branch from side {side(alone)} on")
    reduced = [s for s in steps if s.get("reduction")]
    if reduced:
        shares = [kept_share(s) for s in reduced]
        span = f"{min(shares):.0%}" if max(shares) - min(shares) < 0.005 else f"{min(shares):.0%} to {max(shares):.0%}"
        parts.append(f"{span} of the tokens at {sides(reduced)}")
    coarse = [s for s in steps if s.get("precision")]
    if coarse:
        parts.append(f"products in {coarse[0]['precision']} at {sides(coarse)}")
    skipped = [s for s in steps if s.get("skipped")]
    if skipped:
        parts.append(f"{sides(skipped)} not run")
    decided = next((s for s in steps if s.get("decision")), None)
    if decided is not None:
        parts.append(f"each image decides after side {side(decided)} how to continue ({decided['decision']['rule']})")
    return "; ".join(parts) or "guidance and every token at every scale"


def kept_share(step: StepData) -> float:
    """Share of a step's tokens that run, averaged over chunks."""
    if step.get("skipped"):
        return 0.0
    tokens = step["grid"][0] * step["grid"][1]
    reduction = step.get("reduction")
    if reduction is None:
        return 1.0
    if "ranks" in reduction:
        return min(1.0, sum(reduction["ranks"]) / len(reduction["ranks"]) / tokens)
    if "kept" in reduction:
        return min(1.0, reduction["kept"] / tokens)
    return 1.0


def side(step: StepData) -> str:
    h, w = step["grid"]
    return str(h) if h == w else f"{h}×{w}"


def sides(steps: Sequence[StepData]) -> str:
    """Words for scales: "side 64", "sides 40 to 64" for neighbors, "sides 24, 48" otherwise."""
    names = [side(step) for step in steps]
    if len(names) == 1:
        return f"side {names[0]}"
    neighbors = steps[-1]["scale"] - steps[0]["scale"] == len(steps) - 1
    return f"sides {names[0]} to {names[-1]}" if neighbors and len(names) > 2 else f"sides {', '.join(names)}"
