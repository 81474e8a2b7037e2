"""nano's tokenizer: a small patch autoencoder around the same bit residual loop as Infinity's BSQ-VAE.

Interface shared with every tokenizer of the runtime: `residual`, `latent_dim`, `encode`, `decode`.

Source: the residual loop is Infinity's (see stagevar/models/infinity/bits.py); encoder and decoder are our own.
Straight-through sign quantization follows BSQ (Zhao et al. 2024) without its entropy term.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.models.infinity.bits import BitResidual
from stagevar.models.nano.presets import NanoPreset


class _Conv(nn.Module):
    """A convolution whose weight is stored as a matrix (out, in * k * k), the form that Muon can update."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        bound = (inputs * kernel**2) ** -0.5
        self.weight = nn.Parameter(torch.empty(outputs, inputs * kernel**2).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (-1, self.kernel, self.kernel))
        return F.conv2d(x_BCHW, weight, self.bias, padding=self.kernel // 2)


class _Mix(nn.Module):
    """Residual 3x3 convolution and pointwise product, for context between neighboring patches."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = _Conv(width, width, 3)
        self.out = _Conv(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.out(F.gelu(self.conv(self.norm(x_BCHW)), approximate="tanh"))


class NanoTokenizer(nn.Module):
    """Images of patch-sized cells to a latent on the final grid and back.

    Attributes:
        residual: the bit residual loop.
        latent_dim: channels d of the latent (bits per cell).
    """

    def __init__(self, config: NanoPreset):
        super().__init__()
        width, pixels = config.tokenizer_width, 3 * config.patch**2
        self.patch = config.patch
        self.latent_dim = config.latent_dim
        self.residual = BitResidual(config.grids, config.latent_dim)
        self.encode_patches = _Conv(pixels, width, 1)
        self.encode_mix = _Mix(width)
        self.encode_out = _Conv(width, config.latent_dim, 1)
        self.decode_in = _Conv(config.latent_dim, width, 1)
        self.decode_mix = nn.Sequential(_Mix(width), _Mix(width))
        self.decode_patches = _Conv(width, pixels, 1)

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Image in [-1, 1] to the latent (B, d, H / patch, W / patch), before quantization."""
        hidden = self.encode_patches(F.pixel_unshuffle(image_B3HW, self.patch))
        return self.encode_out(F.gelu(self.encode_mix(hidden), approximate="tanh"))

    def decode(self, code_sum_BdHW: Tensor) -> Tensor:
        """Code sum (B, d, H, W) to an image (B, 3, H * patch, W * patch) in [-1, 1], not clamped."""
        hidden = self.decode_mix(self.decode_in(code_sum_BdHW))
        return F.pixel_shuffle(self.decode_patches(hidden), self.patch)

    def partial_sums(self, latent_BdHW: Tensor) -> Tensor:
        """Code sums after every scale (K, B, d, H, W), without gradient."""
        with torch.no_grad():
            code_sum, sums = torch.zeros_like(latent_BdHW), []
            for scale, grid in enumerate(self.residual.latent_grids):
                bits = F.interpolate(latent_BdHW - code_sum, size=grid, mode="area") > 0
                code_sum = self.residual.add(code_sum, bits.flatten(2).transpose(1, 2), scale)
                sums.append(code_sum)
            return torch.stack(sums)
