"""Points with intervals on two axes, for the report's trade-off and history. Width and text as in `tuner.report.charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tuner.report.svg import CHARACTER, Box, figure, line, marker, number, rect, text, ticks


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


def _free(box: Box, taken: Sequence[Box]) -> bool:
    return all(box[2] <= t[0] or box[0] >= t[2] or box[3] <= t[1] or box[1] >= t[3] for t in taken)


def place_labels(
    anchors: Sequence[tuple[float, float, str, bool]], avoid: Sequence[Box], frame: Box
) -> list[tuple[float, float] | None]:
    """Left-baseline positions near their anchors (x, y, label, needed), clear of each other, of `avoid` and the frame.

    If there is no room, a needed label is placed anyway and any other is left out (its mark has a tooltip).
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


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


@dataclass(frozen=True)
class _Axes:
    """Where the values of a scatter plot are, in a `frame` in pixels."""

    frame: Box
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    narrow: bool

    def px(self, value: float) -> float:
        left, _, right, _ = self.frame
        return left + (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * (right - left)

    def py(self, value: float) -> float:
        _, top, _, bottom = self.frame
        return bottom - (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0]) * (bottom - top)

    def inside(self, point: Point) -> bool:
        return self.y_range[0] <= point.y <= self.y_range[1] and self.x_range[0] <= point.x <= self.x_range[1]

    def at_edge(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of values; those beyond the frame are on its edge."""
        left, top, right, bottom = self.frame
        return _clamp(self.px(x), left, right), _clamp(self.py(y), top, bottom)

    def bad_areas(self, x_rule: Rule | None, y_rule: Rule | None) -> list[str]:
        left, top, right, bottom = self.frame
        areas = []
        if x_rule and x_rule.bad:
            at = _clamp(self.px(x_rule.value), left, right)
            areas.append(rect(at, top, right - at, bottom - top, "bad"))
        if y_rule and y_rule.bad:
            at = _clamp(self.py(y_rule.value), top, bottom)
            first, last = (at, bottom) if y_rule.bad == "below" else (top, at)
            areas.append(rect(left, first, right - left, last - first, "bad"))
        return areas

    def scales(self, x_title: str, y_title: str, top: tuple[str, Sequence[tuple[float, str]]] | None) -> list[str]:
        """Grid, ticks and titles of the axes; for `top` see `scatter`."""
        left, above, right, below = self.frame
        out = []
        for value in ticks(*self.y_range, 5 if self.narrow else 6):
            out.append(line(left, self.py(value), right, self.py(value), "grid"))
            out.append(text(left - 7, self.py(value) + 4, number(value), "tick", "end"))
        for value in ticks(*self.x_range, 5 if self.narrow else 8):
            out.append(line(self.px(value), below, self.px(value), below + 4, "axis"))
            out.append(text(self.px(value), below + 17, number(value), "tick", "middle"))
        if top:
            out.append(text(left, 11, top[0], "axis-title"))
            used: list[float] = []
            for value, name in top[1]:
                if self.x_range[0] <= value <= self.x_range[1] and all(abs(self.px(value) - x) > 40 for x in used):
                    used.append(self.px(value))
                    out.append(line(self.px(value), above - 4, self.px(value), above, "axis"))
                    out.append(text(self.px(value), above - 8, name, "tick", "middle"))
        out.append(line(left, below, right, below, "axis"))
        out.append(text((left + right) / 2, below + 35, x_title, "axis-title", "middle"))
        middle = (above + below) / 2
        out.append(
            f'<text x="{11:g}" y="{middle:.1f}" text-anchor="middle" class="axis-title" '
            f'transform="rotate(-90 11 {middle:.1f})">{escape(y_title)}</text>'
        )
        return out

    def rules(self, x_rule: Rule | None, y_rule: Rule | None) -> tuple[list[str], list[Box]]:
        """Rules with their texts, and the boxes that labels must avoid."""
        left, top, right, bottom = self.frame
        out, taken = [], []
        if x_rule and self.x_range[0] <= x_rule.value <= self.x_range[1]:
            at, width = self.px(x_rule.value), len(x_rule.text) * CHARACTER
            flip = at + 5 + width > right
            start, anchor = (at - 5, "end") if flip else (at + 5, "start")
            out += [line(at, top, at, bottom, "rule"), text(start, bottom - 7, x_rule.text, "rule-text", anchor)]
            first = start - width if flip else start
            taken += [(first, bottom - 20, first + width, bottom), (at - 1, top, at + 1, bottom)]
        if y_rule and self.y_range[0] <= y_rule.value <= self.y_range[1]:
            at, width = self.py(y_rule.value), len(y_rule.text) * CHARACTER
            out += [line(left, at, right, at, "rule"), text(right - 4, at + 14, y_rule.text, "rule-text", "end")]
            taken += [(left, at - 1, right, at + 1), (right - 4 - width, at, right, at + 16)]
        return out, taken

    def front(self, path: Sequence[tuple[float, float]], steps: Sequence[tuple[float, float]]) -> list[str]:
        """The lines of a front and of a staircase, if any."""
        out = []
        if len(path) > 1:
            places = (f"{self.px(x):.1f} {self.py(_clamp(y, *self.y_range)):.1f}" for x, y in path)
            out.append(f'<path d="M{"L".join(places)}" class="front"/>')
        if steps:
            pieces = [f"M{self.px(steps[0][0]):.1f} {self.py(steps[0][1]):.1f}"]
            pieces += [f"H{self.px(x):.1f}V{self.py(y):.1f}" for x, y in steps[1:]]
            out.append(f'<path d="{"".join(pieces)}" class="front"/>')
        return out

    def whiskers(self, point: Point) -> list[str]:
        x, y = self.at_edge(point.x, point.y)
        out = []
        if self.inside(point) and point.y_span:
            low, high = (self.at_edge(point.x, value)[1] for value in point.y_span)
            out.append(line(x, low, x, high, f"whisker {point.kind}"))
        if self.inside(point) and point.x_span:
            low, high = (self.at_edge(value, point.y)[0] for value in point.x_span)
            out.append(line(low, y, high, y, f"whisker {point.kind}"))
        return out

    def mark(self, point: Point) -> str:
        """The point's marker, or an arrow at the edge of the frame if it is beyond."""
        x, y = self.at_edge(point.x, point.y)
        if self.inside(point):
            return marker(point.shape, x, y, f"mark {point.kind}", title=point.title)
        tip = escape("off the scale: " + point.title)
        return f'<path d="M{x - 5:.1f} {y - 7:.1f}h10l-5 7Z" class="mark {point.kind}"><title>{tip}</title></path>'

    def labels(self, points: Sequence[Point], avoid: Sequence[Box]) -> list[str]:
        """Labels of the points that have one, with a leader if a label is far from its point."""
        needed = ("pick", "baseline")
        labeled = sorted((p for p in points if p.label), key=lambda p: p.kind not in needed)
        anchors = [(self.px(p.x), self.py(_clamp(p.y, *self.y_range)), p.label, p.kind in needed) for p in labeled]
        places = place_labels(anchors, avoid, self.frame)
        out = []
        for place, (at_x, at_y, name, _), point in zip(places, anchors, labeled, strict=True):
            if place is None:
                continue
            x, y = place
            nearest = _clamp(at_x, x, x + len(name) * CHARACTER)
            if math.hypot(nearest - at_x, y - 4 - at_y) > 22:
                out.append(line(at_x, at_y, nearest, y - 4, "leader"))
            out.append(text(x, y, name, f"label {point.kind}"))
        return out

    def gutter(self, y: float, title: str, tips: Sequence[str]) -> list[str]:
        """A title and a row of crosses, as many as fit."""
        left, _, right, _ = self.frame
        start = left + len(title) * CHARACTER + 14
        places = ((start + 13 * index, tip) for index, tip in enumerate(tips))
        crosses = [marker("cross", x, y, "mark failed", title=tip) for x, tip in places if x <= right]
        return [text(left, y + 4, title, "tick"), *crosses]


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

    `top` is the title and labeled places of a second x axis, most important first; labels that would collide are left out.
    `gutter` is the title and tooltips of points without a position (failures). Points outside the ranges are drawn at the
    edge.
    """
    narrow = width < 500
    left, right, above = (56 if narrow else 64), (10 if narrow else 18), (40 if top else 16)
    below = 44 + (24 if gutter else 0)
    height = height or (360 if narrow else 440)
    axes = _Axes((left, above, width - right, height - below), x_range, y_range, narrow)
    rules, avoid = axes.rules(x_rule, y_rule)
    avoid += [(x - 6, y - 6, x + 6, y + 6) for x, y in (axes.at_edge(point.x, point.y) for point in points)]
    drawn = [
        *axes.bad_areas(x_rule, y_rule),
        *axes.scales(x_title, y_title, top),
        *rules,
        *axes.front(path, step_path),
        *(whisker for point in points for whisker in axes.whiskers(point)),
        *map(axes.mark, points),
        *axes.labels(points, avoid),
        *(axes.gutter(height - 9, *gutter) if gutter else ()),
    ]
    return figure(width, height, label, "".join(drawn))
