"""Scale tables of the model families: the token grid (h, w) of every scale. No torch here.

Source: FoundationVision/Infinity utils/dynamic_resolution.py, FoundationVision/VAR, Davinci-XLab/STAR-T2I (facts).
"""

from __future__ import annotations

import difflib

from stagevar.errors import UsageError

Grid = tuple[int, int]

_INFINITY_ROWS: dict[float, tuple[Grid, ...]] = {
    1.0: tuple((s, s) for s in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)),
    1.25: ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36), (55, 44), (70, 56)),
    1.333: ((1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36), (60, 45), (72, 54)),
    1.5: ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32), (63, 42), (78, 52)),
    1.75: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32), (70, 40), (84, 48)),
    2.0: ((1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30), (74, 37), (90, 45)),
    2.5: ((1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26), (80, 32), (100, 40)),
    3.0: ((1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24), (90, 30), (111, 37)),
}  # fmt: skip
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
    """Scales of a pixel budget and height/width ratio, and the finest grid that positions are stretched to.

    Raises UsageError for an unknown pixel budget. The ratio is snapped to the nearest template, as in the reference.
    """
    if pixels not in INFINITY_PIXELS:
        near = difflib.get_close_matches(pixels, INFINITY_PIXELS, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown pixel budget {pixels!r}; known: {', '.join(INFINITY_PIXELS)} (nearest: {near})")
    full = INFINITY_GRIDS[nearest_ratio(ratio)]
    return full[: INFINITY_PIXELS[pixels]], full[-1]
