"""Energy of images and of their changes in the low and the high band of frequencies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def band_spectra(images_BHW3: np.ndarray, final_grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """2-D spectrum of the luminance (B, H, W) without its mean, and the mask of low frequencies.

    Low: at most half of the final token grid's Nyquist frequency, i.e. a quarter of its side, in cycles per image.
    """
    luminance = images_BHW3.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    height, width = luminance.shape[1:]
    y, x = np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width)[None]
    radius = np.hypot(y / (final_grid[0] / 4), x / (final_grid[1] / 4))
    spectrum = np.fft.fft2(luminance)
    spectrum[:, 0, 0] = 0
    return spectrum, radius <= 1


def _energy(spectrum_BHW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    return (np.abs(spectrum_BHW) ** 2 * mask_HW).sum(axis=(1, 2))


def band_changes(images: Sequence[np.ndarray], final_grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Energy of the change that each scale makes, low and high band (K, B), over the final image's in that band."""
    spectra = [band_spectra(image, final_grid)[0] for image in images]
    low = band_spectra(images[-1][:1], final_grid)[1]
    changes = []
    for mask in (low, ~low):
        total = np.maximum(_energy(spectra[-1], mask), 1e-12)
        changes.append(np.stack([_energy(after - first, mask) / total for first, after in itertools.pairwise(spectra)]))
    return changes[0], changes[1]


def low_error(image: np.ndarray, final: np.ndarray, final_grid: tuple[int, int]) -> np.ndarray:
    """Energy of the difference in the low band over the final image's in that band (B,)."""
    (own, low), (last, _) = band_spectra(image, final_grid), band_spectra(final, final_grid)
    return _energy(own - last, low) / np.maximum(_energy(last, low), 1e-12)
