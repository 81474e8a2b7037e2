"""Reads a nano scene back from its pixels: the object detector of this world, in GenEval's terms.

Objects are connected bright regions on the dark background. A region's class is the shape whose drawing, at the
same center and area, overlaps it best; its color the nearest hue; its texture the mark lattice that explains
its whiteness best. The verdict itself is GenEval's rule (`stagevar.prompts.geneval.judge`), so nothing here knows what a prompt
asked for.

Source: the rules are GenEval's (djghosh13/geneval), the detector is ours in place of Mask2Former and CLIP.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from stagevar.models.nano.drawing import marks, shape_distance
from stagevar.models.nano.scenes import COLOR_RGB, COLORS, LATTICE, MARK_RGB, SHAPES, TEXTURES
from stagevar.prompts.geneval import Detection, Metadata, Verdict, judge

_BRIGHT = 0.55  # every object color has a channel above it, no background does
_MIN_AREA = 10 / LATTICE**2  # share of the image; the smallest star covers three times as much
_FIT_SURE, _FIT_NONE = 0.70, 0.45  # agreement that counts as certain, and as nothing
_STRETCHES = (0.9, 0.97, 1.04, 1.12)


@cache
def _unit_shapes() -> tuple[np.ndarray, np.ndarray]:
    """Area of every shape of radius 1, and its centroid (x, y) relative to its own center."""
    axis = np.linspace(-1.1, 1.1, 441)
    u, v = np.meshgrid(axis, axis)
    areas, centroids = [], []
    for shape in range(len(SHAPES)):
        inside = shape_distance(shape, u, v) < 0
        areas.append(inside.mean() * 2.2**2)
        centroids.append((u[inside].mean(), v[inside].mean()))
    return np.array(areas), np.array(centroids)


def _fit(cover_HW: np.ndarray) -> tuple[int, float]:
    """The shape that explains a soft mask best, and how well (1 = exactly).

    Every shape is drawn with the mask's own centroid and about its area, edges a little soft, and compared by soft
    overlap. Faded tips of a small star therefore cost little, where a bounding box would shrink.
    """
    height, width = cover_HW.shape
    total = float(cover_HW.sum())
    y, x = np.mgrid[:height, :width] + 0.5
    center_x, center_y = float((cover_HW * x).sum()) / total, float((cover_HW * y).sum()) / total
    areas, centroids = _unit_shapes()
    stretch_S11 = np.array(_STRETCHES)[:, None, None]
    best = np.zeros(len(SHAPES))
    for shape in range(len(SHAPES)):
        radius_S11 = stretch_S11 * (total / areas[shape]) ** 0.5
        u_SHW = (x - center_x) / radius_S11 + centroids[shape][0]
        v_SHW = (y - center_y) / radius_S11 + centroids[shape][1]
        drawn_SHW = np.clip(0.5 - shape_distance(shape, u_SHW, v_SHW) * radius_S11 / 1.5, 0.0, 1.0)
        overlap_S = np.minimum(cover_HW, drawn_SHW).sum((1, 2)) / np.maximum(cover_HW, drawn_SHW).sum((1, 2))
        best[shape] = overlap_S.max()
    return int(best.argmax()), float(best.max())


def _soft_edges(cover: np.ndarray) -> tuple[float, float]:
    """First and last edge of a 1-D coverage profile, with the fraction of the border pixel."""
    inside = np.flatnonzero(cover >= 0.5)
    if not len(inside):
        inside = np.array([int(cover.argmax())])
    low, high = int(inside[0]), int(inside[-1])
    before = float(cover[low - 1]) if low > 0 else 0.0
    after = float(cover[high + 1]) if high + 1 < len(cover) else 0.0
    return low - min(before, 0.5), high + 1 + min(after, 0.5)


def _color(pixels_N3: np.ndarray) -> int:
    """Index of the nearest hue; white marks and dark edges carry little chroma and so little weight."""
    chroma = pixels_N3 - pixels_N3.mean(1, keepdims=True)
    weight = np.linalg.norm(chroma, axis=1) ** 2
    mean = (chroma * weight[:, None]).sum(0)
    reference = COLOR_RGB - COLOR_RGB.mean(1, keepdims=True)
    cosine = reference @ mean / (np.linalg.norm(reference, axis=1) * np.linalg.norm(mean) + 1e-9)
    return int(cosine.argmax())


def _texture(image_HW3: np.ndarray, core_HW: np.ndarray, color: int) -> int:
    """Index of the mark lattice that fits the whiteness inside the region best."""
    plain = float(COLOR_RGB[color].min())
    white = np.clip((image_HW3[core_HW].min(1) - plain) / (MARK_RGB - plain), 0.0, 1.0)
    size = len(image_HW3)
    errors = [np.abs(white - marks(t, size)[core_HW]).mean() for t in range(len(TEXTURES))]
    return int(np.argmin(errors))


def detect(image_3HW: np.ndarray) -> list[Detection]:
    """Objects of one image (3, H, W) in [0, 1], as GenEval detections with boxes in pixels (x0, y0, x1, y1).

    The score is 1 for a clean shape and falls to 0 where no shape fits, so GenEval's own thresholds apply.
    """
    from scipy import ndimage  # here, so that the runtime imports without scipy

    image = np.clip(np.asarray(image_3HW, dtype=np.float32).transpose(1, 2, 0), 0.0, 1.0)
    brightness = image.max(2)
    background = np.median(brightness[brightness < _BRIGHT]) if (brightness < _BRIGHT).any() else 0.2
    labels, _ = ndimage.label(brightness > _BRIGHT, structure=np.ones((3, 3)))
    size = len(image)
    found = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        region = labels == index
        if region.sum() < _MIN_AREA * size * size:
            continue
        # Soft coverage: how far each pixel has left the background toward the region's own brightness.
        near = ndimage.binary_dilation(region, structure=np.ones((3, 3)))
        level = float(np.median(brightness[region]))
        cover = np.where(near, np.clip((brightness - background) / max(level - background, 1e-3), 0.0, 1.0), 0.0)
        x0, x1 = _soft_edges(cover.max(0))
        y0, y1 = _soft_edges(cover.max(1))
        pad = slice(max(rows.start - 1, 0), rows.stop + 1), slice(max(columns.start - 1, 0), columns.stop + 1)
        shape, fit = _fit(cover[pad])
        score = float(np.clip((fit - _FIT_NONE) / (_FIT_SURE - _FIT_NONE), 0.0, 1.0))
        core = ndimage.binary_erosion(region)
        core = core if core.sum() >= 8 else region
        color = _color(image[region])
        found.append(
            Detection(
                class_name=SHAPES[shape],
                score=score,
                box_xyxy=(x0, y0, x1, y1),
                color=COLORS[color],
                texture=TEXTURES[_texture(image, core, color)],
            )
        )
    return found


def check(image_3HW: np.ndarray, metadata: Metadata) -> Verdict:
    """GenEval's verdict on one image (3, H, W) in [0, 1] for a scene's metadata."""
    return judge(metadata, detect(image_3HW))


def check_batch(image_B3HW: np.ndarray, metadata: list[Metadata]) -> np.ndarray:
    """Verdicts of a batch as booleans (B,)."""
    return np.array([check(image, meta).correct for image, meta in zip(image_B3HW, metadata, strict=True)])
