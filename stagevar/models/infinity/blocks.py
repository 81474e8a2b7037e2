"""Blocks of Infinity's transformer: text attention and pooling, the block itself, what it takes of a prompt batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.models.base import (
    Around,
    Attend,
    Conditioning,
    Site,
)
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.layers import PLAIN, Chained, FeedForward, Rotation, SelfAttention, linear
from stagevar.tensors import attention


class CrossAttention(nn.Module):
    """Attention from image tokens to the text rows of the same prompt."""

    zero_k_bias: Tensor

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

    zero_k_bias: Tensor

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


class TextPool(nn.Module):
    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.ca = AttentivePool(config)


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
        """`forward` in pieces across sublayers; the last sublayer's output is added by the next block or the head."""
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
        assert self.gate_R1C is not None
        return torch.addcmul(self.x_RLC, self.update_RLC, self.gate_R1C)


@dataclass(frozen=True)
class LayerConstants:
    """What a block derives from its weights alone. Prompts do not change it, so a recorded graph reads it in place.

    Attributes:
        heads: `SelfAttention.constants`.
        norm_weight_C, norm_bias_C: of the norm before cross-attention, float32 like the residual stream.
    """

    heads: tuple[Tensor, Tensor]
    norm_weight_C: Tensor
    norm_bias_C: Tensor


class Chunk(nn.Module):
    """A run of blocks; the reference wraps each one, hence the extra `module` in the state-dict names."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        self.module = nn.ModuleList(blocks)

    def layers(self) -> list[Block]:
        """Its blocks in order."""
        return cast(list[Block], list(self.module))


class AdaLin(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class Scale(nn.Module):
    """RMSNorm weight of the text features."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-6)


@dataclass
class InfinityConditioning(Conditioning):
    """The text of a batch as Infinity reads it.

    Attributes:
        pooled_RC: pooled text.
        modulation: six (R, 1, C) per layer.
        text_kv: two (R, H, T, c) per layer.
        bias_R11T: added to cross-attention's scores, 0 for real text rows and -inf for padding, in the precision of
            text_kv, so that no scale converts a mask; None without padding.
        constants: per layer.
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
