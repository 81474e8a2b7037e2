"""Pieces of the report's drawings: plain SVG with CSS classes, so that one stylesheet serves light and dark mode.

Coordinates are pixels.
"""

from __future__ import annotations

import math
from html import escape

CHARACTER = 6.3  # mean advance of the 11.5 px interface font, for placing labels
Box = tuple[float, float, float, float]


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
