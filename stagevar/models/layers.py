"""Layers that the families share: linear layers of any precision, cosine self-attention, rotary positions, feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.models.base import Around, Grid, Site, apply_guidance

MAX_SCALE_MUL = math.log(100.0)
#: turn(x_RHLc, table) -> x_RHLc, with the table in the form that the function takes
Turn = Callable[[Tensor, Tensor], Tensor]
#: run_layer(layer, x_RLC, positions) -> x_RLC
RunLayer = Callable[[int, Tensor, "Tensor | None"], Tensor]
#: run_chunk(layers, x_RLC, positions) -> x_RLC
RunChunk = Callable[[range, Tensor, "Tensor | None"], Tensor]


def run_trunk(
    x_RLC: Tensor,
    chunk_layers: Sequence[range],
    run_layer: RunLayer,
    around: Around,
    inner_guidance: dict[int, float] | None,
    fuse: tuple[int, float] | None,
    before_chunk: Callable[[Tensor], Tensor] | None = None,
    whole_chunk: RunChunk | None = None,
) -> Tensor:
    """All layers through the trunk and chunk sites; branches are mixed or fused as `NextScaleModel.trunk` says.

    Args:
        before_chunk: applied to the rows (R, L, C) before every chunk but the first.
        whole_chunk: runs a chunk's layers at once, instead of `run_layer` one by one; branches are then neither mixed
            nor fused.
    """

    def run_chunk(layers: range, x: Tensor, positions: Tensor | None) -> Tensor:
        for layer in layers:
            if fuse is not None and layer == fuse[0]:
                x = apply_guidance(x, fuse[1])
            x = run_layer(layer, x, positions)
            if inner_guidance and layer in inner_guidance:
                x = apply_guidance(x, inner_guidance[layer]).repeat(2, 1, 1)
        return x

    run: RunChunk = whole_chunk or run_chunk

    def run_chunks(x: Tensor, positions: Tensor | None) -> Tensor:
        for index, layers in enumerate(chunk_layers):
            if index and before_chunk is not None:
                x = before_chunk(x)
            x = around(Site("chunk", index), x, positions, partial(run, layers))
        return x

    return around(Site("trunk"), x_RLC, None, run_chunks)


def rope_table(grids: Sequence[Grid], rope_grid: Grid, head_dim: int) -> Tensor:
    """cos and sin of the 2-D rotary angles of every token, scales concatenated: (2, L_total, head_dim / 2), float32.

    Grid point (i, j) of an (h, w) scale sits at (round(i * H / h), round(j * W / w)) of the finest grid (H, W), half to
    even in float32; the first half of the pairs turns with y, the second with x.
    """
    half = head_dim // 2
    frequency = 1.0 / (10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    angles = []
    for h, w in grids:
        y = torch.round(torch.arange(h, dtype=torch.float32) * (rope_grid[0] / h))
        x = torch.round(torch.arange(w, dtype=torch.float32) * (rope_grid[1] / w))
        y_angle = torch.outer(y, frequency)[:, None].expand(h, w, -1)
        x_angle = torch.outer(x, frequency)[None].expand(h, w, -1)
        angles.append(torch.cat([y_angle, x_angle], dim=-1).reshape(h * w, half))
    angle_Lc = torch.cat(angles)
    return torch.stack([angle_Lc.cos(), angle_Lc.sin()])


def turns(cos_sin: Tensor) -> Tensor:
    """The table that `rotate` takes, complex: (L, c/2) of (2, L, c/2), or (R, 1, L, c/2) of (2, R, L, c/2) for all heads."""
    table = torch.complex(cos_sin[0], cos_sin[1])
    return table[:, None] if table.ndim == 3 else table


def rotate(x_RHLc: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, as one complex product with `turns`; axes before RHLc are allowed."""
    return torch.view_as_real(torch.view_as_complex(x_RHLc.unflatten(-1, (-1, 2))) * table).flatten(-2)


class Rotation:
    """The rotary table of one scale in the form that the heads take, made once for all layers with the same positions.

    Args:
        cos_sin: (2, L, c/2) of all positions in order.
        prepare: turns such a table into what the heads take.
    """

    def __init__(self, cos_sin: Tensor, prepare: Callable[[Tensor], Tensor]):
        self._cos_sin, self._prepare = cos_sin, prepare
        self._whole: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """Positions of the scale."""
        return self._cos_sin.shape[1]

    def at(self, positions: Tensor | None) -> Tensor:
        """The table of these raster positions, as a site gives them."""
        if positions is None:
            if self._whole is None:
                self._whole = self._prepare(self._cos_sin)
            return self._whole
        if self._last is None or self._last[0] is not positions:
            self._last = (positions, self._prepare(self._cos_sin[:, positions]))
        return self._last[1]


def modulated_norm(x_RLC: Tensor, scale_R1C: Tensor, shift_R1C: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """LayerNorm without affine, then x * (1 + scale) + shift, in float32; the result in dtype."""
    normed_RLC = F.layer_norm(x_RLC.float(), x_RLC.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_R1C, normed_RLC, 1 + scale_R1C).to(dtype)


def cosine_heads(
    qkv_RL3C: Tensor, heads: int, factor_1H11: Tensor, table: Tensor | None, turn: Turn = rotate
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (R, H, L, c): q and k of unit length, rotated by `turn` (not, without a table), q times its factor."""
    qkv = qkv_RL3C.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    # q and k together: on small scales the number of kernels is what counts. The scale of q commutes with the rotation.
    qk = F.normalize(qkv[:2].float(), dim=-1, eps=1e-12)
    if table is not None:
        qk = turn(qk, table)
    return qk[0] * factor_1H11, qk[1], qkv[2]


@dataclass(frozen=True)
class Chained:
    """What runs between the matrix products when nothing looks at the sublayers: fewer, larger pieces.

    Attributes:
        gated_norm, heads_into_cache: like the twins in stagevar.engine.kernels.
        gelu_linear: (x, layer) -> the layer's output after a tanh-approximated GELU.
    """

    gated_norm: Callable[..., tuple[Tensor, Tensor]]
    heads_into_cache: Callable[..., Tensor]
    gelu_linear: Callable[[Tensor, nn.Module], Tensor]


@dataclass(frozen=True)
class Pieces:
    """What runs between the matrix products; stagevar.models.fused has the same as compiled kernels.

    Attributes:
        table: turns (cos, sin) into the rotary table that cosine_heads takes.
        chained: pieces across sublayers, if there are any.
    """

    modulated_norm: Callable[..., Tensor] = modulated_norm
    cosine_heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = cosine_heads
    table: Callable[[Tensor], Tensor] = turns
    chained: Chained | None = None


PLAIN = Pieces()


def linear(x: Tensor, layer: nn.Module, bias: Tensor | None = None) -> Tensor:
    """A linear layer, plain or in 8 bits, in its weights' precision; `bias` where it is kept apart from the layer."""
    if isinstance(layer, nn.Linear):
        weight = layer.weight
        return F.linear(x.to(weight.dtype), weight, layer.bias if bias is None else bias.to(weight.dtype))
    product: Tensor = layer(x, bias)
    return product


class BlockShape(Protocol):
    """What the layers here read of a family's configuration."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def hidden(self) -> int:
        """Width of the feed-forward's inner layer."""
        ...


class SelfAttention(nn.Module):
    """Cosine self-attention: unit-norm q and k with a learned scale per head, rotary positions, no mask."""

    pieces = PLAIN
    zero_k_bias: Tensor

    def __init__(self, config: BlockShape):
        super().__init__()
        width, self.heads, self.head_dim = config.width, config.heads, config.head_dim
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def constants(self) -> tuple[Tensor, Tensor]:
        """(bias of the qkv product (3C,), factor of q (1, H, 1, 1), float32): the same at every scale of every image."""
        factor_1H11 = self.scale_mul_1H11.float().clamp_max(MAX_SCALE_MUL).exp()
        return torch.cat([self.q_bias, self.zero_k_bias, self.v_bias]), factor_1H11

    def qkv(
        self, x_RLC: Tensor, table: Tensor | None, constants: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (normalized and rotated; None: not rotated) and v, each (R, H, L, c); with `constants()`, made earlier."""
        bias_3C, factor_1H11 = constants
        return self.pieces.cosine_heads(linear(x_RLC, self.mat_qkv, bias_3C), self.heads, factor_1H11, table)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, config: BlockShape):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x_RLC: Tensor) -> Tensor:
        return linear(F.gelu(linear(x_RLC, self.fc1), approximate="tanh"), self.fc2)
