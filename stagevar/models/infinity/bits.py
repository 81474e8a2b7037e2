"""Bits, codes and the multi-scale residual loop that Infinity's tokenizers share.

An image is a sum of residual code maps, one per scale. A token carries `token_bits` bits; bit b becomes the code value
(2b - 1) / sqrt(latent_dim). Every scale's codes are resized to the final grid and added to the *code sum*; the decoder
turns the code sum into pixels. With `patchify` one transformer token covers a 2x2 patch of the tokenizer's grid, so
token_bits = 4 * latent_dim.

Source: Infinity (FoundationVision/Infinity), models/infinity.py `autoregressive_infer_cfg` and models/bsq_vae; facts in our
own words, behavior checked against reference outputs in tests/golden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


class BitResidual:
    """The residual loop over a fixed list of token grids.

    Args:
        grids: transformer grid (h, w) per scale, coarse to fine.
        latent_dim: channels d of the tokenizer's latent.
        patchify: whether a token is a 2x2 patch of the latent grid (Infinity-8B).
    """

    def __init__(self, grids: Sequence[Grid], latent_dim: int, patchify: bool = False):
        self.grids = tuple((int(h), int(w)) for h, w in grids)
        self.latent_dim = latent_dim
        self.patchify = patchify
        self.latent_grids = tuple((2 * h, 2 * w) if patchify else (h, w) for h, w in self.grids)
        self.token_bits = latent_dim * (4 if patchify else 1)

    @property
    def final_grid(self) -> Grid:
        """(H, W) of the latent that the decoder sees."""
        return self.latent_grids[-1]

    def zeros(self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty code sum (B, d, H, W)."""
        return torch.zeros(batch, self.latent_dim, *self.final_grid, device=device, dtype=dtype)

    def latent_bits(self, bits_BLt: Tensor, scale: int) -> Tensor:
        """Bits per token (B, h*w, token_bits) to bits per latent position (B, d, H_s, W_s), same dtype."""
        h, w = self.grids[scale]
        bits_Bthw = bits_BLt.transpose(1, 2).reshape(bits_BLt.shape[0], self.token_bits, h, w)
        return F.pixel_shuffle(bits_Bthw, 2) if self.patchify else bits_Bthw

    def codes(self, bits_BLt: Tensor, scale: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Code map (B, d, H_s, W_s) of one scale's bits (B, h*w, token_bits)."""
        return (self.latent_bits(bits_BLt.to(dtype), scale) * 2 - 1) / math.sqrt(self.latent_dim)

    def add(self, code_sum_BdHW: Tensor, bits_BLt: Tensor, scale: int) -> Tensor:
        """New code sum with this scale's codes added (bilinear, no antialias; the input is not changed)."""
        codes = self.codes(bits_BLt, scale, code_sum_BdHW.dtype)
        if codes.shape[-2:] != self.final_grid:
            codes = F.interpolate(codes, size=self.final_grid, mode="bilinear", align_corners=False)
        return code_sum_BdHW + codes

    def next_input(self, code_sum_BdHW: Tensor, scale: int) -> Tensor:
        """What the transformer reads at `scale` (>= 1): the code sum resized to its grid, (B, h*w, token_bits)."""
        latent = code_sum_BdHW
        if self.latent_grids[scale] != self.final_grid:
            latent = F.interpolate(latent, size=self.latent_grids[scale], mode="bilinear", align_corners=False)
        if self.patchify:
            latent = F.pixel_unshuffle(latent, 2)
        return latent.flatten(2).transpose(1, 2)

    def quantize(
        self,
        latent_BdHW: Tensor,
        flip_probability: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Greedy residual quantization of a latent at the final grid.

        `flip_probability` (one per scale) flips that share of the bits *after* they were taken as targets, so that later
        scales learn to repair earlier mistakes (Infinity's bitwise self-correction).

        Returns:
            targets: bits per scale (B, h*w, token_bits), uint8, before flipping.
            inputs: what the transformer reads per scale >= 1 (list index 0 is scale 1), made from the flipped bits.
            code_sum: (B, d, H, W) of the flipped bits.
        """
        targets, inputs = [], []
        code_sum = torch.zeros_like(latent_BdHW)
        for scale, grid in enumerate(self.latent_grids):
            if scale:
                inputs.append(self.next_input(code_sum, scale))
            residual = latent_BdHW - code_sum
            if grid != self.final_grid:
                residual = F.interpolate(residual, size=grid, mode="area")
            bits_BdHW = (residual > 0).to(latent_BdHW.dtype)
            if self.patchify:
                bits_BdHW = F.pixel_unshuffle(bits_BdHW, 2)
            bits_BLt = bits_BdHW.flatten(2).transpose(1, 2).contiguous()
            targets.append(bits_BLt.to(torch.uint8))
            if flip_probability is not None and flip_probability[scale] > 0:
                draw = torch.rand(bits_BLt.shape, device=bits_BLt.device, generator=generator)
                bits_BLt = torch.where(draw < flip_probability[scale], 1 - bits_BLt, bits_BLt)
            code_sum = self.add(code_sum, bits_BLt, scale)
        return targets, inputs, code_sum
