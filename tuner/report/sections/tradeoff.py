"""Latency against quality: every schedule that was evaluated, and the front."""

from __future__ import annotations

import math

from tuner.config.quality import factors, limited
from tuner.report.charts import bars
from tuner.report.scatter import Point, Rule, scatter
from tuner.report.sections.marks import both_widths, legend_of, mark_of, title_of
from tuner.report.words import (
    find,
    has_quality,
    latency_of,
    latency_span_ms,
    ms,
    ms_span,
    name_of,
    quality_change,
    roles_of,
    shown_ms,
    speedup,
)
from tuner.results import published
from tuner.results.candidate import Candidate, verification_of
from tuner.results.result import StudyResult

_SPEEDS = (
    1,
    2,
    1.5,
    1.2,
    3,
    1.3,
    1.1,
    1.7,
    2.5,
    4,
    1.4,
    1.6,
    1.8,
    5,
    6,
    8,
    10,
)  # labels of the upper axis, most important first


def _label(result: StudyResult, candidate: Candidate) -> str:
    roles = roles_of(result, candidate.key)
    if candidate.key == result.baseline.key or candidate.source.startswith("enqueued"):
        return ", ".join([name_of(result, candidate), *roles])
    return ", ".join(roles)


def _points(result: StudyResult) -> list[Point]:
    points = []
    for candidate in (*result.measured, result.baseline):
        latency, difference = latency_of(result, candidate), quality_change(candidate)
        if latency is None or (difference is None and candidate is not result.baseline):
            continue
        kind, shape = mark_of(result, candidate)
        points.append(
            Point(
                latency.drift_corrected_ms,
                difference.mean if difference else 0.0,
                kind,
                shape,
                _finite(latency_span_ms(latency)),
                _finite((difference.low, difference.high)) if difference else None,
                _label(result, candidate),
                title_of(result, candidate),
            )
        )
    return points


def _finite(span: tuple[float, float]) -> tuple[float, float] | None:
    """The span if it can be drawn; a single sample has none."""
    return span if all(map(math.isfinite, span)) else None


def tradeoff_section(result: StudyResult) -> str:
    if latency_of(result, result.baseline) is None or not result.measured:
        return ""
    if not has_quality(result):
        return _latency_bars(result)
    points = _points(result)
    full_ms = shown_ms(result, result.baseline)
    reference = published.methods_for(result.model)
    speeds = [full_ms / row.speedup for row in reference[1:] if row.speedup]
    xs = [v for p in points for v in (p.x_span or (p.x, p.x))] + [result.budget_ms, *speeds]
    x_pad = 0.06 * (max(xs) - min(xs) or full_ms)
    x_range = (max(0.0, min(xs) - x_pad), max(xs) + x_pad)
    # The chart is about the trade-off near the limit: one terrible schedule must not flatten everything else.
    core = [v for p in points if p.kind != "infeasible" or p.label for v in (p.y_span or (p.y, p.y))]
    core += [1.6 * result.composite_floor, -0.25 * result.composite_floor]
    spread = max(core) - min(core)
    rest = [v for p in points for v in (p.y_span or (p.y, p.y)) if v > min(core) - spread]
    y_pad = 0.05 * spread
    y_range = (min(core + rest) - y_pad, max(core + rest) + y_pad)
    on_front = [c for key in result.front if (c := find(result, key)) is not None and latency_of(result, c) is not None]
    # Finalists are drawn at their held-out figures, so a point of the search's front may turn out to be dominated.
    path: list[tuple[float, float]] = []
    for candidate in sorted(on_front, key=lambda c: shown_ms(result, c)):
        difference = quality_change(candidate)
        height = difference.mean if difference else 0.0
        if not path or height > path[-1][1]:
            path.append((shown_ms(result, candidate), height))
    failed = [f"trial {f.trial}: {f.error}" for f in result.failures]
    several = len(limited(result.limits)) > 1
    comparable = set(result.quality_weights) == {"geneval"}
    unit = factors(result.limits)["geneval"] if comparable else 0.0
    lane = y_range[1] + 0.08 * (y_range[1] - y_range[0])
    if reference and not comparable:
        y_range = (y_range[0], lane + 0.05 * (y_range[1] - y_range[0]))
    for row in reference[1:]:
        if row.speedup is None or row.geneval is None or reference[0].geneval is None:
            continue
        height = (row.geneval - reference[0].geneval) * unit if comparable else lane
        title = f"{row.name} as published: {row.speedup:g}×, GenEval {row.geneval:.2f} vs. {reference[0].geneval:.2f}"
        points.append(
            Point(full_ms / row.speedup, height, "published", "diamond", label=f"{row.name}, paper", title=title)
        )
    chart = both_widths(
        lambda width: scatter(
            width,
            points,
            label="Quality change over latency of every schedule tried",
            x_title="latency of one image, ms",
            y_title="quality change from the full schedule, in allowed drops",
            x_range=x_range,
            y_range=y_range,
            x_rule=Rule(result.budget_ms, "budget", "right"),
            y_rule=Rule(result.composite_floor, "allowed drops" if several else "allowed drop", "below"),
            path=path,
            top=("speed-up", [(full_ms / times, f"{times:g}×") for times in _SPEEDS]),
            gutter=(f"{len(failed)} failed", failed) if failed else None,
        ),
        f"Each mark is one distinct schedule: mean paired difference on {_prompt_words(result)}, with 95 % intervals. "
        "The line connects schedules that none beats on both axes. Shaded: outside the limits. Hover over a mark to read it.",
    )
    words = {
        "pick": "pick",
        "baseline": "full schedule",
        "feasible": "within both limits",
        "infeasible": "outside a limit",
        "published": "published: GenEval and speed-up"
        if comparable
        else "published speed-up, shown at the top: its quality is on another scale",
        "failed": "failed",
    }
    kinds = {p.kind for p in points} | ({"failed"} if failed else set())
    entries = [(kind, word) for kind, word in words.items() if kind in kinds]
    if any(p.shape == "diamond" and p.kind != "published" for p in points):
        entries.append(("preset", "diamond: an enqueued preset"))
    return legend_of(*entries) + chart


def _prompt_words(result: StudyResult) -> str:
    search = len(result.search_prompts)
    checks = [check for c in result.candidates if (check := verification_of(c)) is not None and check.values]
    held = checks[0].prompts if checks else 0
    return f"{search} search prompts" + (f" (finalists: {held} held-out prompts)" if held else "")


def _latency_bars(result: StudyResult) -> str:
    shown = sorted(result.measured, key=lambda c: shown_ms(result, c))
    kept = [c for i, c in enumerate(shown) if i < 12 or _label(result, c)]
    rows = []
    for candidate in (*kept, result.baseline):
        latency = latency_of(result, candidate)
        if latency is None:
            continue
        low, high = latency_span_ms(latency)
        speed = speedup(latency)
        after = f"{ms(latency.drift_corrected_ms)} ({ms_span(low, high)})" + (f"  {speed[0]:.2f}×" if speed else "")
        name = ", ".join([name_of(result, candidate), *roles_of(result, candidate.key)])
        rows.append((name, latency.drift_corrected_ms, f"bar {mark_of(result, candidate)[0]}", after))
    left_out = len(shown) - len(kept)
    note = f" {left_out} slower ones are in trials.csv." if left_out else ""
    words = {"pick": "pick", "baseline": "full schedule", "feasible": "within the budget", "infeasible": "over it"}
    kinds = {row[2].split()[1] for row in rows}
    return legend_of(*((kind, word) for kind, word in words.items() if kind in kinds)) + both_widths(
        lambda width: bars(width, rows, label="Latency of the fastest schedules"),
        "No quality was measured, so there is no trade-off to draw: latency of one image with 95 % intervals, "
        f"fastest first.{note}",
    )
