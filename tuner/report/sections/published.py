"""What others report for their accelerations."""

from __future__ import annotations

from html import escape

from tuner.report.sections.marks import table_rows
from tuner.report.words import (
    latency_of,
    speedup,
)
from tuner.results import published
from tuner.results.result import StudyResult


def published_section(result: StudyResult) -> str:
    rows = published.methods_for(result.model)
    if not rows:
        return ""

    def cells(row: published.Published, own: bool) -> list[str]:
        show = lambda v, f: "" if v is None else format(v, f)  # noqa: E731
        name = f"<b>{escape(row.name)}</b>" if own else escape(row.name)
        name += f" ({escape(row.source)})" if row.source else ""
        speed = show(row.speedup, ".2f") + ("×" if row.speedup else "")
        return [name, row.parameters, show(row.latency_s, ".2f"), speed, show(row.geneval, ".2f"), show(row.dpg, ".2f")]

    table = [cells(row, True) for row in rows]
    pick = result.pick
    latency = latency_of(result, pick) if pick is not None else None
    speed = speedup(latency) if latency else None
    if speed and latency:
        name = '<b>this run\'s pick</b> <span class="tag">measured here</span>'
        seconds = f"{latency.drift_corrected_ms / 1e3:.2f}"
        table.append([name, "", seconds, f"{speed[0]:.2f}×", "", ""])
    # A family that the paper lists among the generators already has its row above.
    table += [cells(row, False) for row in published.GENERATORS if row.name not in rows[0].name]
    return table_rows(["Method", "Parameters", "Latency, s", "Speed-up", "GenEval", "DPG"], table, [1, 2, 3, 4, 5]) + (
        f'<p class="note">Rows of {escape(published.SOURCE)}, except those that name another source and the one measured '
        "here. The paper does not name its GPU, so only speed-ups compare across rows; its other generators are listed "
        "for reference. It does not say whether its 3.4× skipped the last two scales, as the released code does.</p>"
    )
