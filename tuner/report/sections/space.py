"""The search space: how large it is, and what the search has seen of it."""

from __future__ import annotations

from html import escape

from tuner.config.coverage import SpaceCoverage
from tuner.report.sections.marks import table_rows
from tuner.results.codec import build
from tuner.results.result import StudyResult


def space_section(result: StudyResult) -> str:
    """The section; empty for results of earlier versions, which did not count this."""
    if "space" not in result.search:
        return ""
    found: SpaceCoverage = build(SpaceCoverage, result.search["space"])
    size = "A continuous space" if found.settings is None else f"{found.settings:,} settings"
    counted = "they" if found.draws == found.settings else f"{found.draws:,} random ones"
    sentences = [
        f"{size}; {counted} expand to {found.distinct:,} distinct schedules"
        + (f", {found.unfit:,} to none" if found.unfit else "")
        + f". {found.evaluated:,} were evaluated."
    ]
    if found.excluded_share is not None:
        sentences.append(
            f"By the latency predicted from their steps, the budget excludes {found.excluded_share:.0%} of the schedules."
        )
    never = [p.name for p in found.parameters if sum(count > 0 for _, count in p.tried) < 2 <= len(p.tried)]
    if never:
        sentences.append(f"Never varied: {', '.join(never)}.")
    rows = [
        [
            f"<code>{escape(p.name)}</code>",
            ", ".join(f"{escape(value)}&nbsp;×&nbsp;{count}" for value, count in p.tried if count) or "nothing",
            escape(", ".join(p.untried)) or "-",
        ]
        for p in found.parameters
    ]
    note = '<p class="note">Presets are counted at their nearest values.</p>'
    return (
        f"<p>{' '.join(sentences)}</p>"
        + table_rows(["Parameter", "Tried (value × schedules)", "Untried"], rows, [])
        + note
    )
