"""The report's drawings: plain SVG text with CSS classes, so that one stylesheet serves light and dark.

Every function takes the width in CSS pixels and draws text at its real size; the report draws each chart twice (wide
and narrow) and lets the stylesheet choose, because a scaled-down chart has unreadable labels. Coordinates are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CHARACTER = 6.3  # mean advance of the 11.5 px interface font, for placing labels
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A marker: position, CSS class, shape (circle, square, diamond, star, cross), interval ends, label, tooltip."""

    x: float
    y: float
    kind: str
    shape: str = "circle"
    x_span: tuple[float, float] | None = None
    y_span: tuple[float, float] | None = None
    label: str = ""
    title: str = ""


@dataclass(frozen=True)
class Rule:
    """A line across the plot with a short text; `bad` is the side to shade: "above", "below" or none."""

    value: float
    text: str
    bad: str = ""


def figure(width: float, height: float, label: str, body: str) -> str:
    """An SVG element that screen readers announce by `label`."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width:g}px">{body}</svg>'
    )


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    """Escaped text."""
    attribute = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attribute}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, radius: float = 0, title: str = "") -> str:
    """A rectangle with an optional tooltip."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" rx="{radius:g}" '
        f'class="{css}">{tip}</rect>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick label: no exponent, no trailing zeros, a real minus sign."""
    shown = f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"
    return ("0" if shown in ("-0", "") else shown).replace("-", "−")


def marker(shape: str, x: float, y: float, css: str, size: float = 4.5, title: str = "") -> str:
    """One marker with a tooltip."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" class="{css}">{tip}</circle>'
    if shape == "square":
        return rect(x - size, y - size, 2 * size, 2 * size, css, 1, title)
    if shape == "cross":
        s = size * 0.8
        return (
            f'<path d="M{x - s:.1f} {y - s:.1f}l{2 * s:.1f} {2 * s:.1f}m0 {-2 * s:.1f}l{-2 * s:.1f} {2 * s:.1f}" '
            f'class="{css}">{tip}</path>'
        )
    if shape == "diamond":
        corners = [(x, y - size * 1.3), (x + size * 1.3, y), (x, y + size * 1.3), (x - size * 1.3, y)]
    else:  # star
        radii = [size * 1.9, size * 0.8] * 5
        corners = [(x + r * math.sin(i * math.pi / 5), y - r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    path = "L".join(f"{px:.1f} {py:.1f}" for px, py in corners)
    return f'<path d="M{path}Z" class="{css}">{tip}</path>'


def _free(box: Box, taken: Sequence[Box]) -> bool:
    return all(box[2] <= t[0] or box[0] >= t[2] or box[3] <= t[1] or box[1] >= t[3] for t in taken)


def place_labels(
    anchors: Sequence[tuple[float, float, str, bool]], avoid: Sequence[Box], frame: Box
) -> list[tuple[float, float] | None]:
    """Left-baseline positions near their anchors (x, y, label, needed), clear of each other, of `avoid` and the frame.

    Where there is no room a needed label is put down all the same, another is left out (its mark has a tooltip).
    """
    taken: list[Box] = list(avoid)
    placed: list[tuple[float, float] | None] = []
    for x, y, label, needed in anchors:
        width, height = len(label) * CHARACTER, 13
        spots: list[tuple[float, float]] = []
        for gap in (10, 18, 30, 44, 60):
            spots += [
                (x + gap, y + 4), (x - gap - width, y + 4), (x - width / 2, y - gap), (x - width / 2, y + gap + 8),
                (x + gap * 0.8, y - gap * 0.8), (x - gap * 0.8 - width, y - gap * 0.8),
                (x + gap * 0.8, y + gap), (x - gap * 0.8 - width, y + gap),
            ]  # fmt: skip
        inside = [
            s for s in spots
            if s[0] >= frame[0] and s[0] + width <= frame[2] and s[1] - height >= frame[1] and s[1] <= frame[3]
        ]  # fmt: skip
        best = next((s for s in inside if _free((s[0], s[1] - height + 2, s[0] + width, s[1] + 3), taken)), None)
        if best is None and not needed:
            placed.append(None)
            continue
        best = best or (inside or spots)[0]
        taken.append((best[0], best[1] - height + 2, best[0] + width, best[1] + 3))
        placed.append(best)
    return placed


def scatter(
    width: float,
    points: Sequence[Point],
    *,
    label: str,
    x_title: str,
    y_title: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_rule: Rule | None = None,
    y_rule: Rule | None = None,
    path: Sequence[tuple[float, float]] = (),
    step_path: Sequence[tuple[float, float]] = (),
    top: tuple[str, Sequence[tuple[float, str]]] | None = None,
    gutter: tuple[str, Sequence[str]] | None = None,
    height: float | None = None,
) -> str:
    """Points with intervals, rules, an optional front (`path`) or staircase, a top axis and a gutter of crosses below.

    `top`: title and labelled places of a second x axis, dearest first: what would collide is left out. `gutter`: title
    and tooltips of points that have no position (failures). Points outside the ranges are drawn cut off at the edge.
    """
    narrow = width < 500
    left, right, above = (56 if narrow else 64), (10 if narrow else 18), (40 if top else 16)
    below = 44 + (24 if gutter else 0)
    height = height or (360 if narrow else 440)
    frame: Box = (left, above, width - right, height - below)

    def px(value: float) -> float:
        return frame[0] + (value - x_range[0]) / (x_range[1] - x_range[0]) * (frame[2] - frame[0])

    def py(value: float) -> float:
        return frame[3] - (value - y_range[0]) / (y_range[1] - y_range[0]) * (frame[3] - frame[1])

    def clamp(value: float, low: float, high: float) -> float:
        return min(max(value, low), high)

    out = []
    for rule, across in ((x_rule, True), (y_rule, False)):
        if rule is None or not rule.bad:
            continue
        at = clamp(px(rule.value), frame[0], frame[2]) if across else clamp(py(rule.value), frame[1], frame[3])
        if across:
            out.append(rect(at, frame[1], frame[2] - at, frame[3] - frame[1], "bad"))
        elif rule.bad == "below":
            out.append(rect(frame[0], at, frame[2] - frame[0], frame[3] - at, "bad"))
        else:
            out.append(rect(frame[0], frame[1], frame[2] - frame[0], at - frame[1], "bad"))
    for value in ticks(*y_range, 5 if narrow else 6):
        out.append(line(frame[0], py(value), frame[2], py(value), "grid"))
        out.append(text(frame[0] - 7, py(value) + 4, number(value), "tick", "end"))
    for value in ticks(*x_range, 5 if narrow else 8):
        out.append(line(px(value), frame[3], px(value), frame[3] + 4, "axis"))
        out.append(text(px(value), frame[3] + 17, number(value), "tick", "middle"))
    if top:
        out.append(text(frame[0], 11, top[0], "axis-title"))
        used: list[float] = []
        for value, name in top[1]:
            if x_range[0] <= value <= x_range[1] and all(abs(px(value) - x) > 40 for x in used):
                used.append(px(value))
                out.append(line(px(value), frame[1] - 4, px(value), frame[1], "axis"))
                out.append(text(px(value), frame[1] - 8, name, "tick", "middle"))
    out.append(line(frame[0], frame[3], frame[2], frame[3], "axis"))
    out.append(text((frame[0] + frame[2]) / 2, frame[3] + 35, x_title, "axis-title", "middle"))
    middle = (frame[1] + frame[3]) / 2
    out.append(
        f'<text x="{11:g}" y="{middle:.1f}" text-anchor="middle" class="axis-title" '
        f'transform="rotate(-90 11 {middle:.1f})">{escape(y_title)}</text>'
    )
    avoid: list[Box] = []
    if x_rule and x_range[0] <= x_rule.value <= x_range[1]:
        out.append(line(px(x_rule.value), frame[1], px(x_rule.value), frame[3], "rule"))
        start = px(x_rule.value) + 5
        flip = start + len(x_rule.text) * CHARACTER > frame[2]
        out.append(
            text(start - 10 if flip else start, frame[3] - 7, x_rule.text, "rule-text", "end" if flip else "start")
        )
        x0 = start - 10 - len(x_rule.text) * CHARACTER if flip else start
        avoid.append((x0, frame[3] - 20, x0 + len(x_rule.text) * CHARACTER, frame[3]))
        avoid.append((px(x_rule.value) - 1, frame[1], px(x_rule.value) + 1, frame[3]))
    if y_rule and y_range[0] <= y_rule.value <= y_range[1]:
        out.append(line(frame[0], py(y_rule.value), frame[2], py(y_rule.value), "rule"))
        out.append(text(frame[2] - 4, py(y_rule.value) + 14, y_rule.text, "rule-text", "end"))
        avoid.append((frame[0], py(y_rule.value) - 1, frame[2], py(y_rule.value) + 1))
        avoid.append((frame[2] - 4 - len(y_rule.text) * CHARACTER, py(y_rule.value), frame[2], py(y_rule.value) + 16))
    if len(path) > 1:
        out.append(
            '<path d="M' + "L".join(f"{px(x):.1f} {py(clamp(y, *y_range)):.1f}" for x, y in path) + '" class="front"/>'
        )
    if step_path:
        pieces = [f"M{px(step_path[0][0]):.1f} {py(step_path[0][1]):.1f}"]
        pieces += [f"H{px(x):.1f}V{py(y):.1f}" for x, y in step_path[1:]]
        out.append(f'<path d="{"".join(pieces)}" class="front"/>')
    for point in points:
        x, y = clamp(px(point.x), frame[0], frame[2]), clamp(py(point.y), frame[1], frame[3])
        inside = y_range[0] <= point.y <= y_range[1] and x_range[0] <= point.x <= x_range[1]
        if inside and point.y_span:
            ends = [clamp(py(v), frame[1], frame[3]) for v in point.y_span]
            out.append(line(x, ends[0], x, ends[1], f"whisker {point.kind}"))
        if inside and point.x_span:
            ends = [clamp(px(v), frame[0], frame[2]) for v in point.x_span]
            out.append(line(ends[0], y, ends[1], y, f"whisker {point.kind}"))
    for point in points:
        x, y = clamp(px(point.x), frame[0], frame[2]), clamp(py(point.y), frame[1], frame[3])
        inside = y_range[0] <= point.y <= y_range[1] and x_range[0] <= point.x <= x_range[1]
        avoid.append((x - 6, y - 6, x + 6, y + 6))
        if inside:
            out.append(marker(point.shape, x, y, f"mark {point.kind}", title=point.title))
        else:
            out.append(f'<path d="M{x - 5:.1f} {y - 7:.1f}h10l-5 7Z" class="mark {point.kind}">'
                       f"<title>{escape('off the scale: ' + point.title)}</title></path>")  # fmt: skip
    labelled = sorted((p for p in points if p.label), key=lambda p: p.kind not in ("pick", "baseline"))
    anchors = [(px(p.x), py(clamp(p.y, *y_range)), p.label, p.kind in ("pick", "baseline")) for p in labelled]
    for place, (ax, ay, name, _), point in zip(place_labels(anchors, avoid, frame), anchors, labelled, strict=True):
        if place is None:
            continue
        x, y = place
        nearest = min(max(ax, x), x + len(name) * CHARACTER)
        if math.hypot(nearest - ax, y - 4 - ay) > 22:
            out.append(line(ax, ay, nearest, y - 4, "leader"))
        out.append(text(x, y, name, f"label {point.kind}"))
    if gutter:
        y = height - 9
        out.append(text(frame[0], y + 4, gutter[0], "tick"))
        start = frame[0] + len(gutter[0]) * CHARACTER + 14
        for i, title in enumerate(gutter[1]):
            x = start + 13 * i
            if x > frame[2]:
                break
            out.append(marker("cross", x, y, "mark failed", title=title))
    return figure(width, height, label, "".join(out))


def paired_bars(
    width: float,
    names: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    label: str,
    unit: str,
    notes: Sequence[str] = (),
) -> str:
    """Horizontal bars, one group per name. series: (legend, CSS class, values). `notes` stand after the last bar."""
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
    """One scale of a strip. kept: share of the tokens that are run, 0 to 1. branches: names of those that run."""

    side: str
    stage: str
    kept: float
    branches: tuple[str, ...]
    skipped: bool
    title: str


def strip(width: float, cells: Sequence[StripCell], weights: Sequence[float], label: str) -> str:
    """A schedule as a row of cells: width grows with the scale's tokens, the filled part with the tokens kept.

    The upper half is the conditional branch, the lower half the unconditional one: what is not filled is work saved.
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
