"""Pixel comparisons with the full schedule's image: PSNR and SSIM, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from tuner.metrics.base import Metric, Prompt, needed

PSNR_CEILING_DB = 100.0  # equal images have infinite PSNR, which would make every mean infinite


def to_unit_range(images_uint8_BHW3: np.ndarray, device: str) -> torch.Tensor:
    """float32 (B, 3, H, W) in 0..1 on `device`."""
    return torch.from_numpy(np.ascontiguousarray(images_uint8_BHW3)).to(device).permute(0, 3, 1, 2).float() / 255.0


class Psnr(Metric):
    """Peak signal-to-noise ratio in dB over all channels, at most 100 (equal images)."""

    name: ClassVar[str] = "psnr"
    needs_reference: ClassVar[bool] = True

    def __init__(self, *, device: str = "cpu") -> None:
        self.device = device

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        values_B = peak_signal_noise_ratio(
            to_unit_range(images_uint8_BHW3, self.device),
            to_unit_range(needed(reference_images_uint8_BHW3), self.device),
            data_range=1.0,
            reduction="none",
            dim=(1, 2, 3),
        )
        return values_B.clamp(max=PSNR_CEILING_DB).cpu().numpy()


class Ssim(Metric):
    """Structural similarity, Gaussian window of 11 pixels, mean over channels, at most 1."""

    name: ClassVar[str] = "ssim"
    needs_reference: ClassVar[bool] = True

    def __init__(self, *, device: str = "cpu") -> None:
        self.device = device

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        values_B = cast(
            torch.Tensor,
            structural_similarity_index_measure(
                to_unit_range(images_uint8_BHW3, self.device),
                to_unit_range(needed(reference_images_uint8_BHW3), self.device),
                data_range=1.0,
                reduction="none",
            ),
        )
        return values_B.reshape(-1).cpu().numpy()
