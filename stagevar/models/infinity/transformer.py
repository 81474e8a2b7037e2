"""The Infinity transformer: bitwise next-scale prediction with text cross-attention.

State-dict names and shapes are the official ones, so public checkpoints load as they are; the forward is our own. The same
class serves the public sizes and `nano` (a small preset of it).

Source: FoundationVision/Infinity, models/infinity.py and models/basic.py (facts only), following the `fused_norm=True`
path that official inference uses. Differs in that cross-attention stays in the weights' precision (the reference casts
to bfloat16 for its attention kernel), text K/V are projected once per prompt instead of once per scale, and the sampling
loop lives in stagevar.sampling.sampler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stagevar.models.base import (
    Around,
    Attend,
    Conditioning,
    Grid,
    NextScaleModel,
    Sampling,
    Site,
    around_nothing,
    by_layer,
    leaves_layers_alone,
    mixed,
)
from stagevar.models.precision import LowPrecisionLinear
from stagevar.tensors import attention
from stagevar.tensors.noise import ScaleNoise

MAX_SCALE_MUL = math.log(100.0)
#: turn(x_RHLc, table) -> x_RHLc, with the table in the form that the function takes
Turn = Callable[[Tensor, Tensor], Tensor]
_LARGE_SCALE = 64  # tokens; see `Infinity.features_train`
_CPU_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
_ANY_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class InfinityConfig:
    """Shape of an Infinity transformer.

    token_bits: bits per token (d_vae of the paper; 4 * latent_dim with patchify). text_dim: width of the text features.
    rope_grid: the finest grid of the full-resolution schedule, to which every scale's positions are stretched.
    level_embedding_every_chunk: the reference's flag value 0 (released models use 1, i.e. first chunk only).
    """

    depth: int
    width: int
    heads: int
    chunks: int
    token_bits: int
    text_dim: int = 2048
    text_maxlen: int = 512
    ffn_hidden: int | None = None
    max_scales: int = 15
    level_embedding_every_chunk: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Feed-forward width: four times the model's, rounded to a multiple of 256 as in the reference."""
        return self.ffn_hidden or round(self.width * 4 / 256) * 256

    @property
    def pool_heads(self) -> int:
        """Heads of the attentive text pooling."""
        return self.text_dim // (64 if self.width > 4096 else 128)


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
        cos_sin: (2, L, c/2) of all positions in order. prepare: makes of such a table what the heads take.
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
    """What runs between the matrix products where nothing looks at the sublayers: fewer, larger pieces.

    gated_norm, heads_into_cache: as the twins of stagevar.engine.kernels. gelu_linear: (x, layer) -> the layer's output
    after a tanh-approximated GELU.
    """

    gated_norm: Callable[..., tuple[Tensor, Tensor]]
    heads_into_cache: Callable[..., Tensor]
    gelu_linear: Callable[[Tensor, nn.Module], Tensor]


@dataclass(frozen=True)
class Pieces:
    """What runs between the matrix products; stagevar.models.fused has the same as compiled kernels.

    table: makes of (cos, sin) the rotary table that cosine_heads takes. chained: pieces across sublayers, where there are.
    """

    modulated_norm: Callable[..., Tensor] = modulated_norm
    cosine_heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = cosine_heads
    table: Callable[[Tensor], Tensor] = turns
    chained: Chained | None = None


PLAIN = Pieces()


def linear(x: Tensor, layer: nn.Linear | LowPrecisionLinear, bias: Tensor | None = None) -> Tensor:
    """A linear layer in its weights' precision; `bias` where it is kept apart from the layer."""
    if isinstance(layer, LowPrecisionLinear):
        return layer(x, bias)
    weight = layer.weight
    return F.linear(x.to(weight.dtype), weight, layer.bias if bias is None else bias.to(weight.dtype))


class SelfAttention(nn.Module):
    """Cosine self-attention: unit-norm q and k with a learned scale per head, rotary positions, no mask."""

    pieces = PLAIN

    def __init__(self, config: InfinityConfig):
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


class CrossAttention(nn.Module):
    """Attention from image tokens to the text rows of the same prompt."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        width, self.heads, self.head_dim = config.width, config.heads, config.head_dim
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def text_kv(self, text_RTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (R, H, T, c) of projected text features."""
        weight = self.mat_kv.weight
        bias = torch.cat([self.zero_k_bias, self.v_bias])
        kv = F.linear(text_RTC.to(weight.dtype), weight, bias.to(weight.dtype))
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def forward(self, x_RLC: Tensor, k_RHTc: Tensor, v_RHTc: Tensor, bias_R11T: Tensor | None) -> Tensor:
        q = linear(x_RLC, self.mat_q).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        out = attention.attend(q, k_RHTc, v_RHTc, bias_R11T)
        return linear(out.transpose(1, 2).flatten(2), self.proj)


class AttentivePool(nn.Module):
    """One learned query per head summarizes a prompt's text rows into a vector of the model's width."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        width, self.heads = config.width, config.pool_heads
        self.head_dim = width // self.heads
        self.mat_q = nn.Parameter(torch.randn(1, self.heads, self.head_dim) * 0.02)
        self.mat_kv = nn.Linear(config.text_dim, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, text_RTD: Tensor, mask_R11T: Tensor | None) -> Tensor:
        kv = F.linear(text_RTD, self.mat_kv.weight, torch.cat([self.zero_k_bias, self.v_bias]))
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.mat_q[:, :, None].expand(text_RTD.shape[0], -1, -1, -1)
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask_R11T)
        return self.proj(out.transpose(1, 2).flatten(1))


class _TextPool(nn.Module):
    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.ca = AttentivePool(config)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x_RLC: Tensor) -> Tensor:
        return linear(F.gelu(linear(x_RLC, self.fc1), approximate="tanh"), self.fc2)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last modulated by the pooled text."""

    pieces = PLAIN

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) * 0.02)
        self.sa = SelfAttention(config)
        self.ca_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.ca = CrossAttention(config)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x_RLC: Tensor,
        layer: int,
        rotation: Rotation,
        positions: Tensor | None,
        conditioning: InfinityConditioning,
        attend: Attend,
        around: Around,
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = conditioning.modulation[layer]
        text_k, text_v = conditioning.text_kv[layer]
        constants = conditioning.constants[layer]
        dtype = text_k.dtype  # of the products

        def attention(x: Tensor, positions: Tensor | None) -> Tensor:
            normed = self.pieces.modulated_norm(x, scale1, shift1, dtype)
            q, k, v = self.sa.qkv(normed, rotation.at(positions), constants.heads)
            out_RHLc = attend(layer, q, k, v, 1.0)
            return linear(out_RHLc.transpose(1, 2).flatten(2), self.sa.proj) * gamma1

        def cross(x: Tensor, positions: Tensor | None) -> Tensor:
            normed = F.layer_norm(x, x.shape[-1:], constants.norm_weight_C, constants.norm_bias_C, 1e-6)
            return self.ca(normed, text_k, text_v, conditioning.bias_R11T)

        def feed_forward(x: Tensor, positions: Tensor | None) -> Tensor:
            return self.ffn(self.pieces.modulated_norm(x, scale2, shift2, dtype)) * gamma2

        x_RLC = x_RLC + around(Site("attn", layer), x_RLC, positions, attention)
        x_RLC = x_RLC + around(Site("cross", layer), x_RLC, positions, cross)
        return x_RLC + around(Site("mlp", layer), x_RLC, positions, feed_forward)

    def chain(
        self,
        stream: Stream,
        layer: int,
        table: Tensor,
        conditioning: InfinityConditioning,
        attend: Any,
        chained: Chained,
    ) -> Stream:
        """`forward` in pieces across sublayers; the last sublayer's output is added by whoever comes next."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = conditioning.modulation[layer]
        text_k, text_v = conditioning.text_kv[layer]
        constants, dtype = conditioning.constants[layer], text_k.dtype
        bias_3C, factor_1H11 = constants.heads

        x, normed = chained.gated_norm(stream.x_RLC, stream.update_RLC, stream.gate_R1C, scale1, shift1, True, dtype)
        qkv = linear(normed, self.sa.mat_qkv, bias_3C)
        out_RHLc = attend.heads(layer, qkv, factor_1H11.flatten(), table, chained.heads_into_cache, 1.0)
        attended = linear(out_RHLc.transpose(1, 2).flatten(2), self.sa.proj)
        weight, bias = constants.norm_weight_C[None, None], constants.norm_bias_C[None, None]
        x, normed = chained.gated_norm(x, attended, gamma1, weight, bias, False, dtype)
        crossed = self.ca(normed, text_k, text_v, conditioning.bias_R11T)
        x, normed = chained.gated_norm(x, crossed, None, scale2, shift2, True, dtype)
        return Stream(x, linear(chained.gelu_linear(normed, self.ffn.fc1), self.ffn.fc2), gamma2)

    def constants(self) -> LayerConstants:
        """Made once per prompt, not per scale: the model may be trained in between."""
        return LayerConstants(self.sa.constants(), self.ca_norm.weight.float(), self.ca_norm.bias.float())


@dataclass(frozen=True)
class Stream:
    """The residual stream (R, L, C), float32, and what is still to be added to it: update times gate (R, 1, C)."""

    x_RLC: Tensor
    update_RLC: Tensor | None = None
    gate_R1C: Tensor | None = None

    def whole(self) -> Tensor:
        """The stream with everything added."""
        if self.update_RLC is None:
            return self.x_RLC
        return torch.addcmul(self.x_RLC, self.update_RLC, self.gate_R1C)


@dataclass(frozen=True)
class LayerConstants:
    """What a block makes of its weights alone. No prompt changes it, so a recorded graph reads it where it is.

    heads: `SelfAttention.constants`. norm_weight_C, norm_bias_C: of the norm before cross-attention, in the precision of
    the residual stream, float32.
    """

    heads: tuple[Tensor, Tensor]
    norm_weight_C: Tensor
    norm_bias_C: Tensor


class _Chunk(nn.Module):
    """A run of blocks; the reference wraps each one, hence the extra `module` in the state-dict names."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        self.module = nn.ModuleList(blocks)


class _AdaLin(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class _Scale(nn.Module):
    """RMSNorm weight of the text features."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-6)


@dataclass
class InfinityConditioning(Conditioning):
    """pooled_RC; modulation per layer: six (R, 1, C); text_kv per layer: two (R, H, T, c).

    bias_R11T: added to cross-attention's scores, 0 for real text rows and -inf for padding, in the precision of text_kv, so
    that no scale converts a mask; None without padding. constants: per layer.
    """

    pooled_RC: Tensor
    modulation: list[tuple[Tensor, ...]]
    text_kv: list[tuple[Tensor, Tensor]]
    bias_R11T: Tensor | None
    head_modulation: tuple[Tensor, Tensor]
    constants: tuple[LayerConstants, ...]

    @property
    def rows(self) -> int:
        return self.pooled_RC.shape[0]

    def select(self, rows: slice | list[int]) -> InfinityConditioning:
        if rows == slice(0, self.rows):
            return self
        return InfinityConditioning(
            self.pooled_RC[rows],
            [tuple(part[rows] for part in layer) for layer in self.modulation],
            [(k[rows], v[rows]) for k, v in self.text_kv],
            None if self.bias_R11T is None else self.bias_R11T[rows],
            (self.head_modulation[0][rows], self.head_modulation[1][rows]),
            self.constants,
        )

    def padded(self, multiple: int) -> InfinityConditioning:
        k_RHTc = self.text_kv[0][0]
        extra = -k_RHTc.shape[2] % multiple
        bias = self.bias_R11T
        if bias is None:
            bias = k_RHTc.new_zeros(self.rows, 1, 1, k_RHTc.shape[2])
        text_kv = [(F.pad(k, (0, 0, 0, extra)), F.pad(v, (0, 0, 0, extra))) for k, v in self.text_kv]
        return dataclasses.replace(self, text_kv=text_kv, bias_R11T=F.pad(bias, (0, extra), value=-math.inf))


def pad_text(features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Ragged text rows [(len_i, D)] to (R, T, D) with T the longest, and a bool mask (R, 1, 1, T), None if none is needed."""
    lengths = [int(rows.shape[0]) for rows in features]
    padded = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    if min(lengths) == max(lengths):
        return padded, None
    positions = torch.arange(max(lengths), device=padded.device)
    return padded, (positions < torch.tensor(lengths, device=padded.device)[:, None])[:, None, None]


class Infinity(NextScaleModel):
    """The transformer. Build it, load weights, call `set_grids`, then hand it to the sampler."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.config = config
        self.depth, self.width, self.heads = config.depth, config.width, config.heads
        self.head_dim = config.head_dim
        if config.depth % config.chunks:
            raise ValueError(f"depth {config.depth} is not a multiple of {config.chunks} chunks")
        per_chunk = config.depth // config.chunks
        self.chunk_layers = tuple(range(i, i + per_chunk) for i in range(0, config.depth, per_chunk))
        width = config.width

        self.cfg_uncond = nn.Parameter(torch.randn(config.text_maxlen, config.text_dim) / math.sqrt(config.text_dim))
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.text_norm = _Scale(config.text_dim)
        self.text_proj_for_sos = _TextPool(config)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.lvl_embed = nn.Embedding(config.max_scales, width)
        self.word_embed = nn.Linear(config.token_bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.head_nm = _AdaLin(width)
        self.head = nn.Linear(width, 2 * config.token_bits)
        blocks = [Block(config) for _ in range(config.depth)]
        if config.chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.block_chunks = nn.ModuleList(_Chunk([blocks[i] for i in layers]) for layers in self.chunk_layers)
        self.grids: tuple[Grid, ...] = ()
        self._rope: Tensor | None = None

    def layers(self) -> list[Block]:
        """All blocks in order, whatever the chunking."""
        if self.config.chunks == 1:
            return list(self.blocks)
        return [block for chunk in self.block_chunks for block in chunk.module]

    def init_weights(self) -> None:
        """Initialization for training from scratch: small linears, gates open half-way, near-zero modulation and head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        for block in self.layers():
            nn.init.zeros_(block.ada_gss)
            with torch.no_grad():
                block.ada_gss[:, :, :2] = 0.5
                for layer in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                    layer.weight.div_(math.sqrt(2 * self.depth))

    # ---------------------------------------------------------------- positions

    def set_grids(self, grids: Sequence[Grid], rope_grid: Grid | None = None) -> None:
        """Prepares rotary tables; `rope_grid` is the finest grid of the full-resolution schedule (default: the last)."""
        self.grids = tuple(grids)
        device = self.pos_start.device
        table = rope_table(self.grids, rope_grid or self.grids[-1], self.head_dim)
        self._rope = table.to(device if device.type != "meta" else "cpu")

    def _scale_rope(self, scale: int) -> Tensor:
        assert self._rope is not None, "set_grids was not called"
        start = sum(h * w for h, w in self.grids[:scale])
        h, w = self.grids[scale]
        return self._rope[:, start : start + h * w]

    def _rotation(self, cos_sin: Tensor) -> Rotation:
        return Rotation(cos_sin, self.layers()[0].sa.pieces.table)

    # ---------------------------------------------------------------- text

    def condition(self, prompts: Sequence[Tensor], negative: Sequence[Tensor] | None = None) -> InfinityConditioning:
        """Conditioning of 2B rows from ragged text features [(len_i, text_dim)].

        Without negative prompts the unconditional rows read `cfg_uncond[:len_i]`, i.e. as many rows as their prompt has.
        """
        device = self.pos_start.device
        prompts = [rows.to(device, torch.float32) for rows in prompts]
        if negative is None:
            null = [self.cfg_uncond[: rows.shape[0]].float() for rows in prompts]
        else:
            null = [rows.to(device, torch.float32) for rows in negative]
        text_RTD, mask = pad_text([*prompts, *null])
        return self.condition_padded(text_RTD, mask)

    def condition_padded(self, text_RTD: Tensor, mask_R11T: Tensor | None) -> InfinityConditioning:
        """Conditioning of as many rows as given: padded raw text features and their mask."""
        normed = self.text_norm(text_RTD)
        pooled_RC = self.text_proj_for_sos.ca(normed, mask_R11T)
        text_RTC = self.text_proj_for_ca(normed)
        gss = self.shared_ada_lin(pooled_RC).view(-1, 1, 6, self.width)
        head_scale, head_shift = self.head_nm.ada_lin(pooled_RC).view(-1, 1, 2, self.width).unbind(2)
        modulation, text_kv = [], []
        for block in self.layers():
            modulation.append(tuple((block.ada_gss.float() + gss).unbind(2)))
            text_kv.append(block.ca.text_kv(text_RTC))
        bias = (
            None if mask_R11T is None else text_kv[0][0].new_zeros(mask_R11T.shape).masked_fill(~mask_R11T, -math.inf)
        )
        return InfinityConditioning(pooled_RC, modulation, text_kv, bias, (head_scale, head_shift), self.constants())

    def constants(self) -> tuple[LayerConstants, ...]:
        """What the blocks make of their weights alone, as they are now."""
        return tuple(block.constants() for block in self.layers())

    # ---------------------------------------------------------------- forward

    def embed(self, features_BLt: Tensor | None, scale: int, conditioning: InfinityConditioning) -> Tensor:
        if scale == 0:
            return conditioning.pooled_RC[:, None] + self.pos_start
        assert features_BLt is not None
        x_BLC = self.word_embed(features_BLt.to(self.word_embed.weight.dtype))
        return x_BLC.repeat(conditioning.rows // x_BLC.shape[0], 1, 1)

    def trunk(
        self,
        x_RLC: Tensor,
        scale: int,
        conditioning: InfinityConditioning,
        attend: Attend,
        around: Around = around_nothing,
        inner_guidance: dict[int, float] | None = None,
        fuse: tuple[int, float] | None = None,
    ) -> Tensor:
        level_C = self.lvl_embed.weight[scale]
        every_chunk = self.config.level_embedding_every_chunk
        rotation = self._rotation(self._scale_rope(scale))
        blocks, conditioning_of = self.layers(), by_layer(conditioning, fuse)

        chained = blocks[0].pieces.chained
        # Guidance inside the layers, an accelerator at their sublayers and 8-bit entries need what chains leave out.
        plain = inner_guidance or fuse is not None or not leaves_layers_alone(around)
        if plain or not getattr(attend, "takes_products", False):
            chained = None

        def run_chunk(layers: range, x: Tensor, positions: Tensor | None) -> Tensor:
            if chained is not None:
                stream, table = Stream(x.contiguous()), rotation.at(positions)
                for layer in layers:
                    stream = blocks[layer].chain(stream, layer, table, conditioning, attend, chained)
                return stream.whole()
            for layer in layers:
                if fuse is not None and layer == fuse[0]:
                    x = mixed(x, fuse[1])
                x = blocks[layer](x, layer, rotation, positions, conditioning_of(layer), attend, around)
                if inner_guidance and layer in inner_guidance:
                    x = mixed(x, inner_guidance[layer]).repeat(2, 1, 1)
            return x

        def run_trunk(x: Tensor, positions: Tensor | None) -> Tensor:
            for index, layers in enumerate(self.chunk_layers):
                if index and every_chunk:
                    x = x + level_C
                x = around(Site("chunk", index), x, positions, lambda x, p, layers=layers: run_chunk(layers, x, p))
            return x

        return around(Site("trunk"), x_RLC + level_C, None, run_trunk)

    def logits(self, x_RLC: Tensor, conditioning: InfinityConditioning) -> Tensor:
        scale, shift = conditioning.head_modulation
        return self.head(modulated_norm(x_RLC, scale, shift).to(self.head.weight.dtype)).float()

    def draw(self, logits_BLV: Tensor, noise: ScaleNoise, sampling: Sampling) -> Tensor:
        """Bits (B, L, token_bits) as uint8."""
        return draw_bits(logits_BLV.unflatten(-1, (-1, 2)), noise, sampling.top_k, sampling.top_p)

    # ---------------------------------------------------------------- training

    def forward_train(
        self, text_BTD: Tensor, mask_B11T: Tensor | None, inputs: Sequence[Tensor], null_B: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits of all scales at once, (B, L_total, 2 * token_bits), pairs (logit of 0, logit of 1) per bit.

        Args:
            text_BTD: padded raw text features. mask_B11T: bool, True where a row is real.
            inputs: `BitResidual.quantize`'s inputs for scales 1..n-1; fewer than all leave the last scales out.
            null_B: bool, rows whose caption is dropped (their text is replaced by cfg_uncond).
        """
        return self.features_train(text_BTD, mask_B11T, inputs, null_B)[1]

    def features_train(
        self, text_BTD: Tensor, mask_B11T: Tensor | None, inputs: Sequence[Tensor], null_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The trunk's features (B, L_total, C) beside the logits; arguments as for `forward_train`."""
        # On CPU the fused attention kernel's backward costs several times the plain matrix products at these sizes.
        with sdpa_kernel(_CPU_SDPA if text_BTD.device.type == "cpu" else _ANY_SDPA):
            return self._features_train(text_BTD, mask_B11T, inputs, null_B)

    def _features_train(
        self, text_BTD: Tensor, mask_B11T: Tensor | None, inputs: Sequence[Tensor], null_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self._rope is not None, "set_grids was not called"
        if null_B is not None:
            text_BTD = torch.where(null_B[:, None, None], self.cfg_uncond[: text_BTD.shape[1]], text_BTD)
        conditioning = self.condition_padded(text_BTD, mask_B11T)
        sizes = [h * w for h, w in self.grids[: len(inputs) + 1]]
        # One masked call for the small scales, one unmasked call for each large one: a mask over all tokens would spend
        # most of its products on pairs that it hides.
        small = sum(size for size in sizes if size < _LARGE_SCALE)
        large = [size for size in sizes if size >= _LARGE_SCALE]
        levels_L = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(text_BTD.device)
        visible_LL = levels_L[:small, None] >= levels_L[None, :small]
        x = torch.cat([self.embed(None, 0, conditioning), self.word_embed(torch.cat(list(inputs), dim=1))], dim=1)
        level_LC = self.lvl_embed(levels_L)
        rope = self._rope[:, : len(levels_L)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            q, k = q.to(v.dtype), k.to(v.dtype)
            first = slice(0, small)
            parts = [
                F.scaled_dot_product_attention(
                    q[:, :, first], k[:, :, first], v[:, :, first], attn_mask=visible_LL, scale=scale
                )
            ]
            end = small
            for size in large:
                start, end = end, end + size
                parts.append(
                    F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale=scale)
                )
            return torch.cat(parts, dim=2)

        x, rotation = x + level_LC, self._rotation(rope)
        for layer, block in enumerate(self.layers()):
            if layer and layer % len(self.chunk_layers[0]) == 0 and self.config.level_embedding_every_chunk:
                x = x + level_LC
            x = block(x, layer, rotation, None, conditioning, attend, around_nothing)
        return x, self.logits(x, conditioning)


def draw_bits(logits_BLt2: Tensor, noise: ScaleNoise, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Bits (B, L, t), uint8, from pairs of logits: bit = 1 where P(1) > u.

    top_k = 1 takes the likelier bit; any other top_k is no restriction on two values. top_p > 0 fixes a bit whose less
    likely value has probability <= 1 - top_p.
    """
    delta_BLt = (logits_BLt2[..., 1] - logits_BLt2[..., 0]).double()
    if top_k == 1:
        return (delta_BLt > 0).to(torch.uint8)
    p_BLt = torch.sigmoid(delta_BLt)
    u_BN = noise.uniform("bits", tuple(delta_BLt.shape[1:]))
    bits = p_BLt > u_BN.reshape(delta_BLt.shape)
    if 0 < top_p < 1:
        fixed = torch.minimum(p_BLt, 1 - p_BLt) <= 1 - top_p
        bits = torch.where(fixed, delta_BLt > 0, bits)
    return bits.to(torch.uint8)
