"""How similar two images are, pixel by pixel: PSNR and SSIM without any package beyond torch.

Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): Gaussian window
of 11 pixels with sigma 1.5, constants 0.01 and 0.03. Windows that would leave the image are not scored.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CEILING_DB = 100.0  # equal images have infinite PSNR, which no mean survives
_WINDOW, _SIGMA = 11, 1.5


def _unit(images_BHW3: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images_BHW3)).permute(0, 3, 1, 2).double() / 255


def psnr_db(images_BHW3: np.ndarray, references_BHW3: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB per image (B,), at most 100, of uint8 images."""
    error_B = (_unit(images_BHW3) - _unit(references_BHW3)).square().mean(dim=(1, 2, 3))
    return (-10 * error_B.log10()).clamp_max(PSNR_CEILING_DB).numpy()


def ssim(images_BHW3: np.ndarray, references_BHW3: np.ndarray) -> np.ndarray:
    """Structural similarity per image (B,), mean over channels, of uint8 images whose sides are at least 11 pixels."""
    x, y = _unit(images_BHW3), _unit(references_BHW3)
    channels = x.shape[1]
    taps = torch.exp(-((torch.arange(_WINDOW) - _WINDOW // 2).double() ** 2) / (2 * _SIGMA**2))
    window = torch.outer(taps, taps) / taps.sum() ** 2
    kernel = window.expand(channels, 1, -1, -1)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, kernel, groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    score = score / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return score.mean(dim=(1, 2, 3)).numpy()
