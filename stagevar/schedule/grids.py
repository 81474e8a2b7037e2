"""Scale tables of the model families: the token grid (h, w) of every scale. No torch here.

Source: FoundationVision/Infinity utils/dynamic_resolution.py, FoundationVision/VAR, Davinci-XLab/STAR-T2I (facts).
"""

from __future__ import annotations

from stagevar.errors import UsageError

Grid = tuple[int, int]


def _grids(rows: str) -> tuple[Grid, ...]:
    return tuple((int(h), int(w)) for h, w in (pair.split("x") for pair in rows.split()))


_INFINITY_ROWS: dict[float, tuple[Grid, ...]] = {
    1.0: tuple((s, s) for s in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)),
    1.25: _grids("1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56"),
    1.333: _grids("1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54"),
    1.5: _grids("1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52"),
    1.75: _grids("1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48"),
    2.0: _grids("1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45"),
    2.5: _grids("1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40"),
    3.0: _grids("1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37"),
}
_INVERSES = {1.25: 0.8, 1.333: 0.75, 1.5: 0.666, 1.75: 0.571, 2.0: 0.5, 2.5: 0.4, 3.0: 0.333}

#: Infinity's full-resolution (1M) grids for each of the 15 height/width ratios.
INFINITY_GRIDS: dict[float, tuple[Grid, ...]] = {
    **_INFINITY_ROWS,
    **{inverse: tuple((w, h) for h, w in _INFINITY_ROWS[ratio]) for ratio, inverse in _INVERSES.items()},
}

#: Number of scales that each pixel budget uses.
INFINITY_PIXELS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

VAR_SIDES = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
STAR_SIDES = {**VAR_SIDES, 1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)}


def square(sides: tuple[int, ...]) -> tuple[Grid, ...]:
    """Square grids of these sides."""
    return tuple((side, side) for side in sides)


def nearest_ratio(ratio: float) -> float:
    """The template height/width ratio nearest to the one asked for."""
    return min(INFINITY_GRIDS, key=lambda template: abs(template - ratio))


def infinity_grids(pixels: str = "1M", ratio: float = 1.0) -> tuple[tuple[Grid, ...], Grid]:
    """Scales of a pixel budget and height/width ratio, and the finest grid, to which positions are stretched.

    The ratio is snapped to the nearest template, as in the reference.

    Raises:
        UsageError: for an unknown pixel budget.
    """
    if pixels not in INFINITY_PIXELS:
        raise UsageError(f"unknown pixel budget {pixels!r}; known: {', '.join(INFINITY_PIXELS)}")
    full = INFINITY_GRIDS[nearest_ratio(ratio)]
    return full[: INFINITY_PIXELS[pixels]], full[-1]
