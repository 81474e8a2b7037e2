"""How the search went, and what it saved."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from tuner.report.scatter import Point, Rule, scatter
from tuner.report.sections.marks import both_widths, mark_of, title_of
from tuner.report.words import (
    latency_of,
    shown_ms,
)
from tuner.results.result import StudyResult


def history_section(result: StudyResult) -> str:
    done = [c for c in result.measured if c.trial is not None]
    if not done or latency_of(result, result.baseline) is None:
        return ""
    done.sort(key=lambda c: c.trial_number)
    sampled = _counted(result.sampled, "distinct schedule", "distinct schedules")
    told = f"{_counted(result.trials, 'trial', 'trials')}, {sampled} beyond the enqueued ones"
    stop = f"{told}. Ended: {escape(result.stop_reason)}.{_savings(result)}"
    if len(done) < 2:
        return f'<p class="note">{stop} There is no history to draw with a single measured trial.</p>'
    points, staircase, best = [], [], math.inf
    for candidate in done:
        kind, shape = mark_of(result, candidate)
        value = candidate.latency.drift_corrected_ms
        points.append(Point(candidate.trial_number, value, kind, shape, title=title_of(result, candidate)))
        if candidate.feasible and value < best:
            best = value
            staircase.append((float(candidate.trial_number), value))
    last = max(p.x for p in points)
    if staircase:
        staircase.append((last, best))
    full_ms = shown_ms(result, result.baseline)
    values = [p.y for p in points] + [result.budget_ms, full_ms]
    pad = 0.06 * (max(values) - min(values) or 1)
    failed = [f"trial {f.trial}: {f.error}" for f in result.failures]
    chart = both_widths(
        lambda width: scatter(
            width,
            points,
            label="Latency of the trials in the order they were tried",
            x_title="trial",
            y_title="latency, ms",
            x_range=(-0.5, last + 0.5),
            y_range=(max(0.0, min(values) - pad), max(values) + pad),
            y_rule=Rule(result.budget_ms, "budget", "above"),
            step_path=staircase,
            gutter=(f"{len(failed)} failed", failed) if failed else None,
            height=300,
        ),
        f"{stop} The line is the fastest schedule within both limits so far."
        if staircase
        else f"{stop} No trial kept both limits.",
    )
    return chart


def _savings(result: StudyResult) -> str:
    """What the search saved, in sentences."""
    facts, found = result.search, []
    if facts.get("stopped_early"):
        found.append(
            f"{_counted(facts['stopped_early'], 'was', 'were')} clearly worse and stopped after some of the search prompts."
        )
    if facts.get("dropped"):
        proposals = _counted(facts["dropped"], "more proposal was", "more proposals were")
        found.append(f"{proposals} predicted to be over the budget and not tried.")
    if facts.get("predicted"):
        line = f"Latency of {facts['predicted']} was predicted from the costs of their steps"
        error = facts.get("table_error")
        if error is not None:  # a study that resumed only to verify did not time steps again
            line += f", with an error of {100 * error:.1f} % over {facts['table_checks']} that were timed"
        found.append(f"{line}.")
    foretold = facts.get("prediction")
    for metric, one in () if foretold is None else foretold["metrics"].items():
        if one["rank_correlation"] is not None:
            ceiling = "" if one["ceiling"] is None else f" (noise allows {one['ceiling']:.2f})"
            found.append(
                f"Sensitivities ranked {_counted(one['schedules'], 'schedule', 'schedules')} by {metric} with a correlation of "
                f"{one['rank_correlation']:.2f}{ceiling}; {100 * one['coverage']:.0f} % were within their intervals."
            )
    if facts.get("ask_seconds"):
        found.append(f"The median time of an ask was {np.median(facts['ask_seconds']):.2f} s.")
    return " " + " ".join(found) if found else ""


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
