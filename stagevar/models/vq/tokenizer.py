"""The image tokenizer of VAR and STAR: a convolutional autoencoder with one codebook, read scale by scale.

A token is an index into the codebook. Every scale's code map is resized to the final grid, smoothed by one of four
convolutions (*phi*), and added to the code sum; the decoder turns the code sum into pixels. Names and shapes in the
state dict are the official ones, except the usage statistics `quantize.ema_vocab_hit_SV`, which nothing reads.

Source: FoundationVision/VAR, models/vqvae.py, models/quant.py, models/basic_vae.py (facts only). Differs in that the
residual loop always works in the code sum's precision, and that large batches are decoded in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.errors import UsageError
from stagevar.models.checkpoint.key_rules import KeyRules
from stagevar.schedule.grids import Grid

#: What VAR's tokenizer file carries beyond this module: how often each code was used at each training scale.
VQVAE_RULES = KeyRules(dropped=("quantize.ema_vocab_hit_SV",))
#: Channels of the public tokenizer at each resolution, as multiples of its base.
CHANNEL_MULTIPLES = (1, 1, 2, 2, 4)
#: Pixels decoded in one pass; more images are decoded in several.
MAX_DECODE_PIXELS = 2 * 2**20


class _Norm(nn.GroupNorm):
    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)


class _ResBlock(nn.Module):
    def __init__(self, in_ch: int, out_ch: int):
        super().__init__()
        self.norm1, self.conv1 = _Norm(in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2, self.conv2 = _Norm(out_ch), nn.Conv2d(out_ch, out_ch, 3, padding=1)
        if in_ch != out_ch:
            self.nin_shortcut = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """Single-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BChw)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        if x_BChw.device.type == "cuda":  # channels are far apart here, and no fused kernel of a card takes that
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out_BLC = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x_BChw + self.proj_out(out_BLC.transpose(1, 2).unflatten(2, x_BChw.shape[-2:]))


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention at the lowest one; then the step to the next, if any."""

    def __init__(self, in_ch: int, out_ch: int, blocks: int, attention: bool, resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(in_ch if i == 0 else out_ch, out_ch) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(out_ch) for _ in range(blocks if attention else 0))
        self._resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self._resample)(x) if self._resample else x


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = _ResBlock(channels, channels), _ResBlock(channels, channels)
        self.attn_1 = _Attention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image (B, 3, H, W) to features (B, d, H / 16, W / 16)."""

    def __init__(self, channels: Sequence[int], code_dim: int):
        super().__init__()
        last = len(channels) - 1
        inputs = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level(inputs[i], ch, 2, i == last, ("downsample", _Downsample(ch)) if i < last else None)
            for i, ch in enumerate(channels)
        )
        self.mid = _Middle(channels[-1])
        self.norm_out = _Norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], code_dim, 3, padding=1)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = self.conv_in(image_B3HW)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, d, h, w) to image (B, 3, 16 * h, 16 * w)."""

    def __init__(self, channels: Sequence[int], code_dim: int):
        super().__init__()
        last = len(channels) - 1
        inputs = (*channels[1:], channels[-1])
        self.conv_in = nn.Conv2d(code_dim, channels[-1], 3, padding=1)
        self.mid = _Middle(channels[-1])
        self.up = nn.ModuleList(
            _Level(inputs[i], ch, 3, i == last, ("upsample", _Upsample(ch)) if i else None)
            for i, ch in enumerate(channels)
        )
        self.norm_out = _Norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, latent_BdHW: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent_BdHW))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Smoothers(nn.Module):
    """The four shared phi convolutions."""

    def __init__(self, code_dim: int, count: int = 4):
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(count))


class Quantizer(nn.Module):
    """Codebook (V, d) and the phi convolutions."""

    def __init__(self, vocabulary: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, code_dim)
        self.quant_resi = _Smoothers(code_dim)


def phi_index(scale: int, scales: int, count: int = 4) -> int:
    """Which of the phi convolutions a scale uses: the nearest of `count` ticks spread over the relative depth.

    Of ten scales, two lie halfway between ticks, so rounding decides: the expression must stay the reference's.
    """
    edge = 1 / 3 / count
    return int(np.argmin(np.abs(np.linspace(edge, 1 - edge, count) - scale / max(scales - 1, 1))))


class VQResidual:
    """The residual loop over a fixed list of token grids; a token is a codebook index.

    Args:
        grids: token grid (h, w) per scale, coarse to fine.
        quantizer: whose codebook and phi convolutions are used (not copied).
    """

    def __init__(self, grids: Sequence[Grid], quantizer: Quantizer):
        self.grids = tuple((int(h), int(w)) for h, w in grids)
        self.quantizer = quantizer
        self.latent_dim = quantizer.embedding.embedding_dim

    @property
    def final_grid(self) -> Grid:
        """(H, W) of the latent that the decoder sees."""
        return self.grids[-1]

    def zeros(self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty code sum (B, d, H, W)."""
        return torch.zeros(batch, self.latent_dim, *self.final_grid, device=device, dtype=dtype)

    def add(self, code_sum_BdHW: Tensor, index_BL: Tensor, scale: int) -> Tensor:
        """New code sum with this scale's codes added (the input is not changed)."""
        return self.add_codes(code_sum_BdHW, F.embedding(index_BL, self.quantizer.embedding.weight), scale)

    def add_codes(self, code_sum_BdHW: Tensor, codes_BLd: Tensor, scale: int) -> Tensor:
        """`add` of the codes themselves: resized (bicubic), then half smoothed by phi."""
        dtype = code_sum_BdHW.dtype
        codes = codes_BLd.to(dtype).transpose(1, 2).unflatten(2, self.grids[scale])
        if scale < len(self.grids) - 1:
            codes = F.interpolate(codes, size=self.final_grid, mode="bicubic")
        phi = cast(nn.Conv2d, self.quantizer.quant_resi.qresi_ls[phi_index(scale, len(self.grids))])
        bias = None if phi.bias is None else phi.bias.to(dtype)
        smooth = F.conv2d(codes, phi.weight.to(dtype), bias, padding=1)
        return code_sum_BdHW + 0.5 * codes + 0.5 * smooth

    def next_input(self, code_sum_BdHW: Tensor, scale: int) -> Tensor:
        """What the transformer reads at `scale` (>= 1): the code sum averaged down to its grid, (B, h*w, d)."""
        latent = code_sum_BdHW
        if self.grids[scale] != self.final_grid:
            latent = F.interpolate(latent, size=self.grids[scale], mode="area")
        return latent.flatten(2).transpose(1, 2)


class VQVAE(nn.Module):
    """The tokenizer of VAR and STAR; 16 pixels per grid step.

    Args:
        grids: token grid (h, w) per scale.
        vocabulary, code_dim: codebook shape (4096 x 32 in the public file).
        base_ch: channels at full resolution, a multiple of 32 (160 in the public file).
    """

    def __init__(self, grids: Sequence[Grid], vocabulary: int = 4096, code_dim: int = 32, base_ch: int = 160):
        super().__init__()
        if base_ch % 32:
            raise UsageError(f"tokenizer base_ch {base_ch} is not a multiple of 32; its group norms have 32 groups")
        channels = [base_ch * m for m in CHANNEL_MULTIPLES]
        self.latent_dim = code_dim
        self.stride = 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, code_dim)
        self.decoder = Decoder(channels, code_dim)
        self.quantize = Quantizer(vocabulary, code_dim)
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.set_grids(grids)

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Chooses the scales."""
        self.residual = VQResidual(grids, self.quantize)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Latent (B, d, H / 16, W / 16), float32, of images in [-1, 1] whose sides are multiples of 16."""
        return self.quant_conv(self.encoder(image_B3HW.to(self.dtype))).float()

    @torch.no_grad()
    def decode(self, code_sum_BdHW: Tensor) -> Tensor:
        """Image (B, 3, 16 * H, 16 * W), float32, nominally in [-1, 1], not clamped; MAX_DECODE_PIXELS at a time."""
        pixels = code_sum_BdHW.shape[-2] * code_sum_BdHW.shape[-1] * self.stride**2
        parts = code_sum_BdHW.to(self.dtype).split(max(1, MAX_DECODE_PIXELS // pixels))
        return torch.cat([self.decoder(self.post_quant_conv(part)).float() for part in parts])
