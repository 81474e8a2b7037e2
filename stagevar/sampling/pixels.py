"""Pixels of decoded images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_uint8(image_B3HW: Tensor) -> np.ndarray:
    """[-1, 1] floats to uint8 (B, H, W, 3), clamped, truncated."""
    pixels = ((image_B3HW.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
