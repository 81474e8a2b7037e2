"""What each named schedule does, scale by scale."""

from __future__ import annotations

import math
from functools import partial
from html import escape
from typing import cast

from stagevar.profile import StepData
from tuner.report.charts import StripCell, strip
from tuner.report.sections.marks import both_widths, legend_of, nearest_word
from tuner.report.words import (
    PICK_ORDER,
    describe,
    find,
    kept_share,
    name_of,
    roles_of,
    side,
)
from tuner.results.candidate import Candidate
from tuner.results.result import StudyResult


def _shown_schedules(result: StudyResult) -> list[tuple[str, Candidate]]:
    """Full schedule, picks and nearest, each once."""
    entries: list[tuple[str, Candidate]] = [("Full schedule", result.baseline)]
    keys = [*(result.picks[r] for r in PICK_ORDER if r in result.picks), *result.nearest]
    for key in dict.fromkeys(keys):
        candidate = find(result, key)
        if candidate is None or key == result.baseline.key:
            continue
        roles = ", ".join(roles_of(result, key)) or nearest_word(result)
        entries.append((f"{roles.capitalize()} ({name_of(result, candidate)})", candidate))
    return entries


def schedules_section(result: StudyResult) -> str:
    if not result.baseline.steps:
        return ""
    out = []
    shown = _shown_schedules(result)
    # The full schedule has no stages of its own: it gets the colors of the schedule that it is compared with.
    stages = [step.get("stage") for step in shown[-1 if len(shown) == 1 else 1][1].steps]
    for title, candidate in shown:
        steps = candidate.steps
        if candidate is result.baseline and len(stages) == len(steps):
            steps = tuple(cast(StepData, {**step, "stage": stage}) for step, stage in zip(steps, stages, strict=True))
        cells = [_cell(step) for step in steps]
        weights = [math.sqrt(step["grid"][0] * step["grid"][1]) for step in candidate.steps]
        share = (
            candidate.processed_tokens / result.baseline.processed_tokens if result.baseline.processed_tokens else 1.0
        )
        out.append(
            f'<div class="plan"><h3>{escape(title)}<small>{escape(describe(candidate.steps))} · '
            f"{share:.0%} of the token rows</small></h3>"
            + both_widths(partial(strip, cells=cells, weights=weights, label=f"Schedule: {title}"))
            + "</div>"
        )
    legend = legend_of(("semantic", "semantic stage"), ("structure", "structure stage"), ("fidelity", "fidelity stage"))
    note = (
        '<p class="note">One cell per scale, labeled with its side in tokens. The upper half is the '
        "conditional branch, the lower half the unconditional branch; color is work done, pale is "
        "work saved, a slash is a scale that is not run.</p>"
    )
    return legend + "".join(out) + note


def _cell(step: StepData) -> StripCell:
    branches = tuple(step.get("branches", ()))
    skipped = bool(step.get("skipped"))
    kept = kept_share(step)
    what = (
        "not run" if skipped else f"{kept:.0%} of {step['grid'][0] * step['grid'][1]} tokens, {' and '.join(branches)}"
    )
    stage = step.get("stage", "fidelity")
    stage = stage if stage in ("semantic", "structure", "fidelity") else "fidelity"
    return StripCell(
        side(step), stage, kept, branches, skipped, f"scale {step['scale']} ({side(step)}), {stage}: {what}"
    )
