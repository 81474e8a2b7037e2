"""Where the time goes: milliseconds and token rows per scale."""

from __future__ import annotations

from collections.abc import Sequence

from stagevar.profile import StepData
from tuner.report.charts import paired_bars
from tuner.report.sections.marks import both_widths, legend_of, nearest_word
from tuner.report.words import (
    find,
    kept_share,
    side,
)
from tuner.results.candidate import Candidate, LatencyStats, Measured
from tuner.results.result import StudyResult


def scales_section(result: StudyResult) -> str:
    full = result.baseline
    other: Candidate | None = result.pick if result.pick is not None and result.pick.key != full.key else None
    if other is None:
        nearest = [c for key in result.nearest if (c := find(result, key)) is not None and c.key != full.key]
        other = nearest[0] if nearest else None
    shown: list[tuple[str, str, Candidate]] = [("full schedule", "bar baseline", full)]
    if other is not None:
        role = "pick" if result.pick is not None and other.key == result.pick.key else nearest_word(result)
        shown.append((role, "bar pick", other))
    latencies = [_timed_by_scale(c) for _, _, c in shown]
    timed = all(lat is not None and len(lat.scale_ms) == len(full.steps) for lat in latencies) and bool(full.steps)
    if not full.steps:
        return ""
    names = [side(step) for step in full.steps]
    series: list[tuple[str, str, Sequence[float]]]
    if timed:
        series = [(name, css, lat.scale_ms) for (name, css, _), lat in zip(shown, latencies, strict=True) if lat]
        unit, note = "ms", "Median time of each scale, by its side in tokens; text encoding and decoding are extra."
    else:
        series = [(name, css, [_token_table_rows(step) for step in c.steps]) for name, css, c in shown]
        unit = "token rows"
        note = "Scales were not timed one by one: these are the token rows that run through the model in both branches."
    saved = [""] * len(names)
    if len(series) == 2:
        for i, (before, after) in enumerate(zip(series[0][2], series[1][2], strict=True)):
            skipped = shown[1][2].steps[i].get("skipped")
            saved[i] = (
                "not run" if skipped else (f"−{1 - after / before:.0%}" if before and after < 0.98 * before else "")
            )
    legend = legend_of(*(("full" if c is full else "pick", name) for name, _, c in shown))
    chart = both_widths(
        lambda width: paired_bars(width, names, series, label=f"{unit} per scale", unit=unit, notes=saved), note
    )
    return legend + chart


def _timed_by_scale(candidate: Candidate) -> LatencyStats | None:
    """The latest measurement with times per scale; if none has them, the latest."""
    both = [candidate.final_latency, candidate.latency if isinstance(candidate, Measured) else None]
    return next((lat for lat in both if lat is not None and lat.scale_ms), candidate.final_latency)


def _token_table_rows(step: StepData) -> float:
    return (
        0.0
        if step.get("skipped")
        else kept_share(step) * step["grid"][0] * step["grid"][1] * len(step.get("branches", ()))
    )
