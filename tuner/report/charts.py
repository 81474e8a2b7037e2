"""The report's bars and strips, as SVG (`tuner.report.svg`).

Every function takes the width in CSS pixels and draws text at its real size. The report draws each chart twice (wide and
narrow) and lets the stylesheet choose, because labels of a scaled-down chart are unreadable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tuner.report.svg import CHARACTER, figure, line, number, rect, text


def paired_bars(
    width: float,
    names: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    label: str,
    unit: str,
    notes: Sequence[str] = (),
) -> str:
    """Horizontal bars, one group per name; `series` are (legend, CSS class, values), `notes` follow the last bar."""
    bar, gap = 11, 12
    group = bar * len(series) + gap
    left = max(len(n) for n in names) * CHARACTER + 14
    reserve = max([len(n) for n in notes] + [0]) * CHARACTER + 70
    span = max(max(values) for _, _, values in series) or 1.0
    scale = (width - left - reserve) / span
    out, y = [], 4.0
    for i, name in enumerate(names):
        out.append(text(left - 10, y + bar * len(series) / 2 + 4, name, "tick", "end"))
        for j, (legend, css, values) in enumerate(series):
            top = y + j * bar
            out.append(
                rect(left, top, values[i] * scale, bar - 1.5, css, 1.5, f"{legend}, {name}: {values[i]:.4g} {unit}")
            )
            out.append(text(left + values[i] * scale + 6, top + bar - 2, number(round(values[i], 2)), "value"))
        if notes and notes[i]:
            out.append(text(width - 4, y + bar * len(series) / 2 + 4, notes[i], "note", "end"))
        y += group
    out.append(line(left, 0, left, y - gap + 4, "axis"))
    return figure(width, y, label, "".join(out))


def bars(width: float, rows: Sequence[tuple[str, float, str, str]], *, label: str, span: float | None = None) -> str:
    """One horizontal bar per row: (name, value, CSS class, text after the bar)."""
    left = min(max(len(r[0]) for r in rows) * CHARACTER + 14, width * 0.45)
    reserve = max(len(r[3]) for r in rows) * CHARACTER + 12
    span = span or max(max(r[1] for r in rows), 1e-12)
    scale = max(width - left - reserve, 20) / span
    out = []
    for i, (name, value, css, after) in enumerate(rows):
        y = i * 24 + 2
        shown = name if len(name) * CHARACTER < left else name[: int(left / CHARACTER) - 2] + "…"
        out.append(text(left - 10, y + 13, shown, "tick", "end"))
        out.append(rect(left, y + 2, value * scale, 14, css, 2, f"{name}: {after}"))
        out.append(text(left + max(value, 0) * scale + 7, y + 13, after, "value"))
    out.append(line(left, 0, left, len(rows) * 24, "axis"))
    return figure(width, len(rows) * 24 + 2, label, "".join(out))


@dataclass(frozen=True)
class StripCell:
    """One scale of a strip; `kept` is the share of tokens that are run, 0 to 1, `branches` names those that run."""

    side: str
    stage: str
    kept: float
    branches: tuple[str, ...]
    skipped: bool
    title: str


def strip(width: float, cells: Sequence[StripCell], weights: Sequence[float], label: str) -> str:
    """A schedule as a row of cells: width grows with the scale's tokens, the filled part with the tokens kept.

    The upper half is the conditional branch, the lower half the unconditional one; the unfilled part is work saved.
    """
    gap, height = 3.0, 46.0
    least = 15.0 if width < 500 else 24.0
    free = width - gap * (len(cells) - 1) - least * len(cells)
    total = sum(weights)
    out, x = [], 0.0
    for cell, weight in zip(cells, weights, strict=True):
        wide = least + free * weight / total
        out.append(f"<g><title>{escape(cell.title)}</title>")
        out.append(rect(x, 0, wide, height, f"cell {cell.stage}", 3))
        if cell.skipped:
            out.append(line(x + 4, height - 4, x + wide - 4, 4, "skip"))
        else:
            half = height / 2 - 0.5
            for branch in cell.branches:
                top = 0 if branch == "cond" else half + 1
                filled = half * max(cell.kept, 0.04)
                out.append(rect(x, top + half - filled, wide, filled, f"fill {cell.stage}", 2))
        out.append("</g>")
        out.append(text(x + wide / 2, height + 14, cell.side, "tick", "middle"))
        if wide >= 30:
            share = "skip" if cell.skipped else ("" if cell.kept > 0.995 else f"{cell.kept:.0%}")
            if share:
                out.append(text(x + wide / 2, height + 27, share, "value", "middle"))
        x += wide + gap
    return figure(width, height + 32, label, "".join(out))
