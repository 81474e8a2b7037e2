"""Fronts over two named objectives: latency (less is better) and quality difference (more is better)."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the non-dominated (latency, quality) points, fastest first; of equal points, the first one."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that the points dominate up to `reference` (worst latency, worst quality); points beyond it do not count."""
    inside = [p for p in points if p[0] < reference[0] and p[1] > reference[1]]
    area, floor = 0.0, reference[1]
    for index in front(inside):
        latency, quality = inside[index]
        area += (reference[0] - latency) * (quality - floor)
        floor = quality
    return area


def balanced(points: Sequence[Point]) -> int:
    """Index of the front point nearest to the ideal corner, both objectives scaled to the front's range."""
    indices = front(points)
    latencies, qualities = [points[i][0] for i in indices], [points[i][1] for i in indices]
    latency_span = (max(latencies) - min(latencies)) or 1.0
    quality_span = (max(qualities) - min(qualities)) or 1.0

    def distance(index: int) -> float:
        slow = (points[index][0] - min(latencies)) / latency_span
        bad = (max(qualities) - points[index][1]) / quality_span
        return slow**2 + bad**2

    return min(indices, key=distance)
