"""Pixels of scenes, drawn by numpy at any image size."""

from __future__ import annotations

import numpy as np

from stagevar.models.nano.scenes import COLOR_RGB, LATTICE, MARK_RGB, MAX_OBJECTS, SHAPES, TEXTURES, SceneBatch


def shape_distance(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to a shape of radius 1, at local coordinates u (right) and v (down)."""
    name = SHAPES[shape]
    if name == "circle":
        return np.hypot(u, v) - 1.0
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.9
    if name == "triangle":
        return np.maximum((2.0 * np.abs(u) - v - 1.0) / 5.0**0.5, v - 0.95)
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.74) - 0.26
    if name == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.maximum(np.maximum(a, b) - 1.0, np.minimum(a, b) - 0.32)
    # Star: fold the plane onto half a point, then the distance to the line from tip to notch.
    length, sector = np.hypot(u, v), np.pi / 5
    angle = np.abs(np.mod(np.arctan2(u, -v) + sector, 2 * sector) - sector)
    notch = 0.42
    dx, dy = notch * np.cos(sector) - 1.0, notch * np.sin(sector)
    return ((length * np.cos(angle) - 1.0) * dy - length * np.sin(angle) * dx) / np.hypot(dx, dy)


def marks(texture: int, size: int) -> np.ndarray:
    """Where a texture puts white marks, (size, size) bool; the lattice is fixed to the image."""
    unit = np.floor(np.arange(size) * LATTICE / size).astype(int)
    on = (unit // 2) % 2 == 1
    if TEXTURES[texture] == "striped":
        return np.broadcast_to(on[:, None], (size, size))
    if TEXTURES[texture] == "dotted":
        return on[:, None] & on[None, :]
    return np.zeros((size, size), dtype=bool)


def draw(scenes: SceneBatch, size: int = 64) -> np.ndarray:
    """Pixels (B, 3, size, size), float32 in [0, 1], edges antialiased."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    tone, slope_x, slope_y = (scenes.background_B6[:, i, None, None] for i in range(3))
    shade = tone + slope_x * (axis[None, None, :] - 0.5) + slope_y * (axis[None, :, None] - 0.5)
    image = shade[:, None] + scenes.background_B6[:, 3:, None, None]
    image = np.clip(image, 0.02, 1.0).astype(np.float32)
    texture_marks = np.stack([marks(t, size) for t in range(len(TEXTURES))]).astype(np.float32)
    for k in range(MAX_OBJECTS):
        for shape in range(len(SHAPES)):
            rows = np.flatnonzero((scenes.count_B > k) & (scenes.shape_BK[:, k] == shape))
            if not len(rows):
                continue
            radius = scenes.radius_BK[rows, k, None, None]
            u = (axis[None, None, :] - scenes.center_BK2[rows, k, 0, None, None]) / radius
            v = (axis[None, :, None] - scenes.center_BK2[rows, k, 1, None, None]) / radius
            cover = np.clip(0.5 - shape_distance(shape, u, v) * radius * size, 0.0, 1.0)[:, None]
            mark = texture_marks[scenes.texture_BK[rows, k]][:, None]
            color = COLOR_RGB[scenes.color_BK[rows, k]][:, :, None, None]
            image[rows] += cover * (color + mark * (MARK_RGB - color) - image[rows])
    return image
