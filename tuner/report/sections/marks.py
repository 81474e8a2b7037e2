"""Tables, legends, and how schedules are marked and named in every section."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tuner.report.words import (
    describe,
    interval_text,
    latency_of,
    ms,
    name_of,
    quality_change,
    roles_of,
    shown_ms,
    signed,
)
from tuner.results.candidate import Candidate, Measured, verification_of
from tuner.results.result import StudyResult

WIDE, NARROW = 960, 358


def both_widths(draw: Callable[[float], str], caption: str = "") -> str:
    """A chart at desktop and at phone width; the stylesheet shows one."""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>{note}</figure>'


def legend_of(*entries: tuple[str, str]) -> str:
    return (
        '<p class="legend">'
        + "".join(f'<span><i class="key {css}"></i>{name}</span>' for css, name in entries)
        + "</p>"
    )


def table_rows(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table in a scrolling box; cells are already HTML, numeric columns are right-aligned."""
    align = [' class="n"' if i in numeric else "" for i in range(len(header))]
    head = "".join(f"<th{a}>{h}</th>" for a, h in zip(align, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{a}>{c}</td>" for a, c in zip(align, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def nearest_word(result: StudyResult) -> str:
    return "undecided" if result.verdict == "inconclusive" else "nearest to feasible"


def mark_of(result: StudyResult, candidate: Candidate) -> tuple[str, str]:
    """Marker class and shape."""
    if candidate.key == result.baseline.key:
        return "baseline", "square"
    check = verification_of(candidate)
    broken = check is not None and check.status == "broken"
    within = isinstance(candidate, Measured) and candidate.feasible and not broken
    kind = "feasible" if within else "infeasible"
    if candidate.key == result.picks.get("pick"):
        return "pick", "star"
    return kind, "diamond" if candidate.source.startswith("enqueued") else "circle"


def title_of(result: StudyResult, candidate: Candidate) -> str:
    parts = [name_of(result, candidate), *roles_of(result, candidate.key)]
    if latency_of(result, candidate):
        parts.append(ms(shown_ms(result, candidate)))
    difference = quality_change(candidate)
    if difference:
        parts.append(f"quality {signed(difference.mean)} ({interval_text(difference)})")
    return " · ".join([*parts, describe(candidate.steps)])
