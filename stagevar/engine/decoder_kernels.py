"""Group norm and SiLU of the image decoder as Triton kernels over maps whose channels are adjacent, and their plain twins.

CUDA's group norm requires adjacent pixels, so between convolutions that require adjacent channels every map is copied
twice. These three kernels leave it where it is: statistics per piece of the map, their sum per group, and one pass that
normalizes and applies SiLU. They read the map twice and write it once.

Statistics are means and sums of squared deviations, joined pairwise, all in float32: a sum of squares over millions of
pixels would lose the variance of a map with a large mean.

Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979), for
joining parts. Differs from `torch.nn.GroupNorm` and SiLU in rounding only: nothing is rounded in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.engine.kernels import tl, triton

#: Elements of a map that a program has in registers at once.
_ELEMENTS = 4096
#: Such tiles per program of the statistics: a map of one megapixel and 128 channels makes 512 programs.
_TILES = 64
#: Parts that a program of `_group_totals_kernel` has at once.
_PARTS = 64


def swished_norm_twin(x_BCHW: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU of a group norm, computed in float32, in the precision and layout of x."""
    # With adjacent channels PyTorch's norm on a CPU is ten roundings off; adjacent pixels are within three of float64.
    adjacent_BCHW = x_BCHW.float().contiguous()
    weight_C, bias_C = norm.weight.float(), norm.bias.float()
    out_BCHW = F.silu(F.group_norm(adjacent_BCHW, norm.num_groups, weight_C, bias_C, norm.eps))
    return torch.empty_like(x_BCHW).copy_(out_BCHW)


def _part_statistics_kernel(
    x_ptr,
    means_ptr,
    squares_ptr,
    pixels,
    parts,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    # Mean and sum of squared deviations of each channel over ROWS * TILES pixels of an image.
    part, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for tile in range(TILES):
        pixel = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = (pixel < pixels)[:, None] & inside[None, :]
        x = tl.load(x_ptr + (image * pixels + pixel)[:, None] * C + channel[None, :], mask=there, other=0.0)
        x = x.to(tl.float32)
        own = tl.sum((pixel < pixels).to(tl.float32), axis=0)
        own_mean = tl.sum(x, axis=0) / tl.maximum(own, 1.0)
        centered = tl.where(there, x - own_mean[None, :], 0.0)
        both = tl.maximum(count + own, 1.0)
        apart = own_mean - mean
        square += tl.sum(centered * centered, axis=0) + apart * apart * (count * own / both)
        mean += apart * (own / both)
        count += own
    where = (image * parts + part) * C + channel
    tl.store(means_ptr + where, mean, mask=inside)
    tl.store(squares_ptr + where, square, mask=inside)


def _group_totals_kernel(
    means_ptr,
    squares_ptr,
    weight_ptr,
    bias_ptr,
    factors_ptr,
    pixels,
    parts,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PER_PART: tl.constexpr,
    EPS: tl.constexpr,
):
    # The parts of a group of SIZE channels joined; writes what each of its channels is multiplied by, and what is added.
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    member = tl.arange(0, BLOCK)
    channel = group * SIZE + member
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (member < SIZE)[None, :]
        count = tl.maximum(tl.minimum(pixels - part * PER_PART, PER_PART), 0).to(tl.float32)
        where = (image * parts + part)[:, None] * C + channel[None, :]
        total += tl.load(means_ptr + where, mask=there, other=0.0) * count[:, None]
    number = pixels.to(tl.float32) * SIZE
    mean = tl.sum(tl.sum(total, axis=0), axis=0) / number
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (member < SIZE)[None, :]
        count = tl.maximum(tl.minimum(pixels - part * PER_PART, PER_PART), 0).to(tl.float32)
        where = (image * parts + part)[:, None] * C + channel[None, :]
        apart = tl.where(there, tl.load(means_ptr + where, mask=there, other=0.0) - mean, 0.0)
        total += tl.load(squares_ptr + where, mask=there, other=0.0) + apart * apart * count[:, None]
    variance = tl.sum(tl.sum(total, axis=0), axis=0) / number
    inside = member < SIZE
    factor = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) * (1.0 / tl.sqrt(variance + EPS))
    added = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32) - mean * factor
    tl.store(factors_ptr + image * 2 * C + channel, factor, mask=inside)
    tl.store(factors_ptr + image * 2 * C + C + channel, added, mask=inside)


def _swish_kernel(x_ptr, factors_ptr, out_ptr, pixels, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    there = (pixel < pixels)[:, None] & inside[None, :]
    where = (image * pixels + pixel)[:, None] * C + channel[None, :]
    factor = tl.load(factors_ptr + image * 2 * C + channel, mask=inside, other=0.0)
    added = tl.load(factors_ptr + image * 2 * C + C + channel, mask=inside, other=0.0)
    y = tl.load(x_ptr + where, mask=there, other=0.0).to(tl.float32) * factor[None, :] + added[None, :]
    y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=there)


KERNELS = (_part_statistics_kernel, _group_totals_kernel, _swish_kernel)
if triton is not None:
    KERNELS = tuple(map(triton.jit, KERNELS))


def swished_norm_launch(kernels: tuple, x_BCHW: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`swished_norm_twin` by `kernels`; the twin where channels are not adjacent."""
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return swished_norm_twin(x_BCHW, norm)
    statistics, totals, swish = kernels
    batch, channels, height, width = x_BCHW.shape
    pixels, block, rows = height * width, power_of_two(channels), rows_at_once(channels)
    parts, size = -(-pixels // (rows * _TILES)), channels // norm.num_groups
    means_BPC, squares_BPC = (
        torch.empty((batch, parts, channels), dtype=torch.float32, device=x_BCHW.device) for _ in range(2)
    )
    factors_B2C = torch.empty((batch, 2, channels), dtype=torch.float32, device=x_BCHW.device)
    out_BCHW = torch.empty_like(x_BCHW)
    statistics[(parts, batch)](
        x_BCHW, means_BPC, squares_BPC, pixels, parts, C=channels, BLOCK_C=block, ROWS=rows, TILES=_TILES
    )
    totals[(norm.num_groups, batch)](
        means_BPC,
        squares_BPC,
        norm.weight,
        norm.bias,
        factors_B2C,
        pixels,
        parts,
        C=channels,
        SIZE=size,
        BLOCK=power_of_two(size),
        PARTS=_PARTS,
        PER_PART=rows * _TILES,
        EPS=norm.eps,
    )
    swish[(-(-pixels // rows), batch)](x_BCHW, factors_B2C, out_BCHW, pixels, C=channels, BLOCK_C=block, ROWS=rows)
    return out_BCHW


def swished_norm() -> Callable[[Tensor, nn.GroupNorm], Tensor]:
    """The norm that a decoder takes on a card (`BSQVAE.decoding_with`)."""
    return functools.partial(swished_norm_launch, KERNELS)


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()


def rows_at_once(channels: int) -> int:
    """Pixels of a tile."""
    return max(1, _ELEMENTS // power_of_two(channels))
