"""Every schedule with its figures."""

from __future__ import annotations

from html import escape

from tuner.report.sections.marks import table_rows
from tuner.report.words import (
    PICK_ORDER,
    describe,
    find,
    has_quality,
    interval_text,
    latency_of,
    latency_span_ms,
    ms,
    ms_span,
    name_of,
    roles_of,
    shown_ms,
    signed,
    speedup,
)
from tuner.results.candidate import Candidate, Pruned, Verdict, Verification, verification_of
from tuner.results.result import StudyResult


def table_section(result: StudyResult) -> str:
    keys = [
        result.baseline.key,
        *(result.picks[r] for r in PICK_ORDER if r in result.picks),
        *result.front,
        *result.nearest,
    ]
    keys += [c.key for c in result.measured if c.source.startswith("enqueued")]
    chosen = [
        c for key in dict.fromkeys(keys) if (c := find(result, key)) is not None and latency_of(result, c) is not None
    ]
    if not chosen:
        return ""
    chosen.sort(key=lambda c: shown_ms(result, c))
    metrics = [] if result.random_weights else [m for m in result.quality_weights if m != "quality"]
    with_quality = has_quality(result)
    header = ["Schedule", "Latency", "Speed-up"]
    header += ["Composite", *(escape(m) for m in metrics)] if with_quality else []
    header += ["Limits", "Status"]
    rows = []
    for candidate in chosen:
        latency = latency_of(result, candidate)
        assert latency is not None
        low, high = latency_span_ms(latency)
        speed = speedup(latency)
        roles = "".join(f' <span class="tag">{role}</span>' for role in roles_of(result, candidate.key))
        row = [
            f"<b>{escape(name_of(result, candidate))}</b>{roles}<small>{escape(describe(candidate.steps))}</small>",
            f"{'≈ ' if latency.predicted else ''}{ms(latency.drift_corrected_ms)}<small>{ms_span(low, high)}</small>",
            f"{speed[0]:.2f}×<small>{speed[1]:.2f} to {speed[2]:.2f}</small>" if speed else "1×",
        ]
        if with_quality:
            for metric in ("quality", *metrics):
                d = candidate.final_differences.get(metric)
                row.append(
                    f"{signed(d.mean)}<small>{interval_text(d)}</small>"
                    if d
                    else "0"
                    if candidate is result.baseline
                    else ""
                )
        check, verdicts = verification_of(candidate), candidate.final_verdicts
        row.append(" ".join(f'<span class="dot {_dot(v)}">{escape(v.name)}</span>' for v in verdicts))
        row.append(_verified_status(check) if check else _search_status(candidate))
        rows.append(row)
    others = len(result.measured) + 1 - len(chosen)
    note = (
        f"{others} more schedules are in trials.csv."
        if others > 0
        else "These are all the schedules that were measured."
    )
    numeric = range(1, len(header) - 2)
    intro = (
        '<p class="note">Differences are from the full schedule on the same prompts and seeds; above zero is '
        f"better, whatever the metric's own direction. Intervals: 95 %. ≈: predicted from steps, not timed. {note}</p>"
    )
    return table_rows(header, rows, list(numeric)) + intro


def _verified_status(check: Verification) -> str:
    if check.passed_over:
        return '<span title="another one was verified first">not judged</span>'
    if check.proved_by:
        return f'<span title="quality: by the study in {escape(check.proved_by)}">{escape(check.status)}</span>'
    return escape(check.status)


def _search_status(candidate: Candidate) -> str:
    """What the search knows about a schedule that was not verified."""
    if not isinstance(candidate, Pruned):
        return "search only"
    prompts = len(next(iter(candidate.values.values()), ()))
    return f'stopped<small title="{escape(candidate.stopped_early)}">after {prompts} prompts</small>'


def _dot(verdict: Verdict) -> str:
    return {"met": "good", "broken": "poor"}.get(verdict.status, "fair")
