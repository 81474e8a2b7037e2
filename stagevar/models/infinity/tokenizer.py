"""Infinity's image tokenizer: a convolutional autoencoder whose latent is quantized to bits, scale by scale.

Two shapes are released: stride 16 (d32, Infinity-2B) and stride 8 with 2x2 patches per token (d14, Infinity-8B). Names
and shapes in the state dict are the official ones, wrappers included (`conv1.conv.weight`, `upsample.conv.conv.bias`).
The bits, codes and residual loop are in stagevar.models.infinity.bits; this file only turns images into latents and back.

Source: FoundationVision/Infinity, models/bsq_vae (facts only). Differs in that decoding works in the weights' precision
(the reference autocasts to bfloat16), splits large batches, and tiles images above MAX_DECODE_PIXELS.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.errors import UsageError
from stagevar.models.infinity.bits import BitResidual, Grid
from stagevar.models.variants import variant

#: pixels decoded in one pass; more images are decoded in several, a larger image in tiles.
MAX_DECODE_PIXELS = 2 * 2**20
#: latent channels of the public tokenizers (`vae_type` of the reference).
LATENT_DIMS = (14, 16, 18, 20, 24, 32, 64)
#: SiLU of a group norm: of a map and the norm's module.
Swished = Callable[[Tensor, nn.GroupNorm], Tensor]


class _Conv(nn.Module):
    """A convolution under the reference's `.conv` wrapper."""

    def __init__(self, in_ch: int, out_ch: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Norm(nn.Module):
    """GroupNorm followed by swish, under the reference's `.norm` wrapper; `swished`, if set, computes both instead."""

    swished: Swished | None = None

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x)) if self.swished is None else self.swished(x, self.norm)


class _ResBlock(nn.Module):
    def __init__(self, in_ch: int, out_ch: int):
        super().__init__()
        self.norm1, self.conv1 = _Norm(in_ch), _Conv(in_ch, out_ch, 3, padding=1)
        self.norm2, self.conv2 = _Norm(out_ch), _Conv(out_ch, out_ch, 3, padding=1)
        if in_ch != out_ch:
            self.nin_shortcut = _Conv(in_ch, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _Conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks of one resolution; `resample` is the name and module that leave it, if any."""

    def __init__(self, in_ch: int, out_ch: int, blocks: int, resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(in_ch if i == 0 else out_ch, out_ch) for i in range(blocks))
        self._resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self._resample)(x) if self._resample else x


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = _ResBlock(channels, channels), _ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Image (B, 3, H, W) to latent (B, d, H / stride, W / stride)."""

    def __init__(self, channels: Sequence[int], latent_dim: int):
        super().__init__()
        self.conv_in = _Conv(3, channels[0], 3, padding=1)
        inputs = (channels[0], *channels[:-1])
        last = len(channels) - 1
        self.down = nn.ModuleList(
            _Level(inputs[i], ch, 2, ("downsample", _Downsample(ch)) if i < last else None)
            for i, ch in enumerate(channels)
        )
        self.mid = _Middle(channels[-1])
        self.norm_out = _Norm(channels[-1])
        self.conv_out = _Conv(channels[-1], latent_dim, 3, padding=1)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = self.conv_in(image_B3HW)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    """Latent (B, d, h, w) to image (B, 3, stride * h, stride * w)."""

    def __init__(self, channels: Sequence[int], latent_dim: int):
        super().__init__()
        self.conv_in = _Conv(latent_dim, channels[-1], 3, padding=1)
        self.mid = _Middle(channels[-1])
        inputs = (*channels[1:], channels[-1])
        self.up = nn.ModuleList(
            _Level(inputs[i], ch, 3, ("upsample", _Upsample(ch)) if i else None) for i, ch in enumerate(channels)
        )
        self.norm_out = _Norm(channels[0])
        self.conv_out = _Conv(channels[0], 3, 3, padding=1)

    def forward(self, latent_BdHW: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent_BdHW))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class _BitMask(nn.Module):
    """Powers of two that the reference keeps to pack bits into indices; unused here, stored for equal state dicts."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.register_buffer("mask", torch.ones((), dtype=torch.int64) << torch.arange(latent_dim - 1, -1, -1))


class _Quantizer(nn.Module):
    def __init__(self, latent_dim: int):
        super().__init__()
        self.lfq = _BitMask(latent_dim)


class BSQVAE(nn.Module):
    """The tokenizer of the Infinity family.

    Args:
        latent_dim: channels d of the latent, one bit each (one of LATENT_DIMS in the public files).
        patchify: stride 8 and 2x2 latent patches per token (Infinity-8B) instead of stride 16.
        grids: transformer grid (h, w) per scale; 16 pixels per grid step in both shapes.
        base_ch: channels at full resolution, a multiple of 32 (128 in every public file).

    Attributes:
        memory_format: of the decoder's maps.
    """

    memory_format = torch.channels_last

    def __init__(self, latent_dim: int, grids: Sequence[Grid], patchify: bool = False, base_ch: int = 128):
        super().__init__()
        if base_ch % 32:
            raise UsageError(f"tokenizer base_ch {base_ch} is not a multiple of 32; its group norms have 32 groups")
        channels = [base_ch * m for m in ((1, 2, 4, 4) if patchify else (1, 2, 4, 4, 4))]
        self.latent_dim = latent_dim
        self.patchify = patchify
        self.stride = 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, latent_dim)
        self.decoder = Decoder(channels, latent_dim)
        self.quantizer = _Quantizer(latent_dim)
        self.quantize = self.quantizer  # the reference registers the module under both names
        self.set_grids(grids)

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Chooses resolution and aspect ratio."""
        self.residual = BitResidual(grids, self.latent_dim, self.patchify)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    def decoding_as(self, dtype: torch.dtype, channels_last: bool) -> BSQVAE:
        """The same tokenizer with its decoder's weights converted to a precision and layout, in which decoding then runs."""
        copied = variant(self, lambda name, module: None)
        copied.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        copied.decoder = copy.deepcopy(self.decoder).to(dtype).to(memory_format=copied.memory_format)
        return copied

    def decoding_with(self, swished: Swished) -> BSQVAE:
        """The same tokenizer, every tensor shared, whose decoder computes group norm and SiLU by a function."""
        copied = variant(self, lambda name, module: None)
        copied.quantize = copied.quantizer
        for part in copied.decoder.modules():
            if isinstance(part, _Norm):
                part.swished = swished
        return copied

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Latent (B, d, H / stride, W / stride), float32, of images in [-1, 1] whose sides are multiples of stride."""
        return self.encoder(image_B3HW.to(self.dtype, memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def decode(self, code_sum_BdHW: Tensor) -> Tensor:
        """Image (B, 3, stride * H, stride * W), float32, nominally in [-1, 1], not clamped.

        Batches are split so that MAX_DECODE_PIXELS are decoded at a time (exact: no layer mixes images). A single image
        above that is decoded in overlapping tiles with linear blending, which is close to but not the same as one pass,
        since group norms then see a tile instead of the image.
        """
        # Channels last is what the reference's tensors happen to be in; apart from speed it decides which group norm kernel
        # runs, and on the CPU the two kernels differ by more than the rest of the decoder put together.
        dtype = self.decoder.conv_in.conv.weight.dtype
        latent_BdHW = code_sum_BdHW.to(dtype, memory_format=self.memory_format)
        pixels = latent_BdHW.shape[-2] * latent_BdHW.shape[-1] * self.stride**2
        if pixels > MAX_DECODE_PIXELS:
            return torch.cat([self._decode_tiled(one) for one in latent_BdHW.split(1)])
        return torch.cat([self.decoder(part).float() for part in latent_BdHW.split(MAX_DECODE_PIXELS // pixels)])

    def _decode_tiled(self, latent_1dHW: Tensor, tile_pixels: int = 1024, overlap_pixels: int = 256) -> Tensor:
        tile, overlap, stride = tile_pixels // self.stride, overlap_pixels // self.stride, self.stride
        height, width = latent_1dHW.shape[-2:]
        image = latent_1dHW.new_zeros((1, 3, height * stride, width * stride), dtype=torch.float32)
        weight = image.new_zeros((1, 1, height * stride, width * stride))
        for top in _tile_starts(height, tile, overlap):
            for left in _tile_starts(width, tile, overlap):
                part = latent_1dHW[..., top : top + tile, left : left + tile]
                decoded = self.decoder(part).float()
                ramp = torch.outer(
                    _ramp(decoded.shape[-2], overlap * stride, image.device),
                    _ramp(decoded.shape[-1], overlap * stride, image.device),
                )
                window = (
                    ...,
                    slice(top * stride, top * stride + decoded.shape[-2]),
                    slice(left * stride, left * stride + decoded.shape[-1]),
                )
                image[window] += decoded * ramp
                weight[window] += ramp
        return image / weight


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First positions of tiles that cover `length`; the last one is shifted back so that it is whole."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _ramp(length: int, overlap: int, device: torch.device) -> Tensor:
    """Blending weights along one side: rising over `overlap` pixels at both ends, never zero."""
    distance = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp_max(overlap) / overlap
