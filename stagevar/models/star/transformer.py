"""STAR: text-to-image next-scale prediction over VAR's codebook (STAR-1.7B is depth 30).

State-dict names and shapes are the official ones; the forward is our own.

Cross-attention. The reference indexes the cross-attention's output with [0]: the output of batch row 0 is added to
every row. With one prompt this means that the unconditional row receives the conditional row's cross-attention, queries
included, so that guidance comes through the first token alone; the released weights were always run that way. This
implementation makes it the rule for every prompt of a batch: its unconditional row receives what its own conditional
row computed, token by token. Where the two rows hold different tokens (a reduced site that draws per row) they are
matched by position, and an unconditional token whose position its conditional row does not hold queries the prompt's
text itself. After the cutoff whichever branch stays does the same: its own queries, the prompt's text.
`STARConfig.literal_cross_rows` gives the reference's literal behavior, where the prompts of a batch all receive the
first one's output, for parity only.

Source: Davinci-XLab/STAR-T2I, models/var_drop.py and models/basic_var.py (facts only). Differs, besides the above, in
that text K/V are projected once per prompt, and that q and k are normalized before they are rotated (the same, since a
rotation keeps lengths). Its refinement sampler is not included; docs/models_var_star.md says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.errors import UsageError
from stagevar.models.base import (
    Around,
    Attend,
    Conditioning,
    NextScaleModel,
    Sampling,
    Site,
    around_nothing,
    by_layer,
)
from stagevar.models.layers import MAX_SCALE_MUL, FeedForward, Rotation, SelfAttention, linear, run_trunk
from stagevar.models.star.text import PromptText
from stagevar.models.var.transformer import draw_index
from stagevar.schedule.grids import Grid, square
from stagevar.tensors import attention
from stagevar.tensors.noise import ScaleNoise


@dataclass(frozen=True)
class STARConfig:
    """Shape of a STAR transformer.

    Attributes:
        sides: token grid side of each scale.
        text_dim: width of the CLIP features.
        rope_theta: base of the rotary frequencies.
        rope_span: every scale's positions run from 0 to this number.
        literal_cross_rows: see the module docstring.
    """

    depth: int
    width: int
    heads: int
    sides: tuple[int, ...]
    text_dim: int = 1024
    vocabulary: int = 4096
    code_dim: int = 32
    classes: int = 1000
    rope_theta: float = 10000.0
    rope_span: float = 64.0
    literal_cross_rows: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Feed-forward width."""
        return 4 * self.width


def rope_table(grids: Sequence[Grid], head_dim: int, theta: float, span: float) -> Tensor:
    """cos and sin of the 2-D rotary angles of every token, scales concatenated: (2, L_total, head_dim / 2), float32.

    Point i of p sits at i / (p - 1) * span (0 when p is 1), so that all scales' corners coincide. The first half of the
    pairs turns with x, the second with y.
    """
    quarter = head_dim // 4
    frequency = theta ** (-torch.arange(quarter, dtype=torch.float32) * 4 / head_dim)
    angles = []
    for h, w in grids:
        y_angle = torch.outer(torch.linspace(0, span, h) if h > 1 else torch.zeros(1), frequency)
        x_angle = torch.outer(torch.linspace(0, span, w) if w > 1 else torch.zeros(1), frequency)
        pair = [x_angle[None].expand(h, w, -1), y_angle[:, None].expand(h, w, -1)]
        angles.append(torch.cat(pair, dim=-1).reshape(h * w, 2 * quarter))
    angle_Lc = torch.cat(angles)
    return torch.stack([angle_Lc.cos(), angle_Lc.sin()])


class CrossAttention(nn.Module):
    """Cosine attention from image tokens to a prompt's CLIP features, with a learned scale per head."""

    zero_k_bias: Tensor

    def __init__(self, config: STARConfig):
        super().__init__()
        width, self.heads, self.head_dim = config.width, config.heads, config.head_dim
        self.mat_q = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.mat_kv = nn.Linear(config.text_dim, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def text_kv(self, text_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normalized) and values (B, H, T, c) of text features."""
        weight = self.mat_kv.weight
        bias = torch.cat([self.zero_k_bias, self.v_bias])
        kv = F.linear(text_BTD.to(weight.dtype), weight, bias.to(weight.dtype))
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.normalize(k.float(), dim=-1, eps=1e-12).to(v.dtype), v

    def forward(self, x_BLC: Tensor, text_kv: tuple[Tensor, Tensor], mask_B11T: Tensor) -> Tensor:
        k, v = text_kv
        q = linear(x_BLC, self.mat_q, self.q_bias)
        q = q.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2).float()
        q = F.normalize(q, dim=-1, eps=1e-12) * self.scale_mul_1H11.float().clamp_max(MAX_SCALE_MUL).exp()
        out = attention.attend(q.to(v.dtype), k, v, mask_B11T, scale=1.0)
        return linear(out.transpose(1, 2).flatten(2), self.proj)


@dataclass
class STARConditioning(Conditioning):
    """The text of a batch as STAR reads it.

    Attributes:
        first_RC: embedded pooled text.
        text_kv: per layer, two (B, H, T, c) of the B prompts, which both branches read.
        mask_B11T: bool, True for real text rows.
    """

    first_RC: Tensor
    text_kv: list[tuple[Tensor, Tensor]]
    mask_B11T: Tensor

    @property
    def rows(self) -> int:
        return self.first_RC.shape[0]

    @property
    def prompts(self) -> int:
        """B: equal to `rows` when one branch runs, half of it when both do."""
        return self.text_kv[0][0].shape[0]

    def select(self, rows: slice | list[int]) -> STARConditioning:
        if rows == slice(0, self.rows):
            return self
        chosen = list(range(self.rows)[rows]) if isinstance(rows, slice) else rows
        texts = [row % self.prompts for row in chosen]
        half = len(texts) // 2
        if half and texts[:half] == texts[half:]:  # both branches of the same prompts
            texts = texts[:half]
        text: slice | list[int] = texts
        if texts == list(range(texts[0], texts[-1] + 1)):
            text = slice(texts[0], texts[-1] + 1)
        return STARConditioning(
            self.first_RC[rows],
            [(k[text], v[text]) for k, v in self.text_kv],
            self.mask_B11T[text],
        )


def shared_by_position(
    cond_BrC: Tensor, own_BrC: Tensor, cond_positions_Br: Tensor, positions_Br: Tensor, tokens: int
) -> Tensor:
    """For each position the row of `cond` that sits there, or the row's own where `cond` does not hold the position."""
    order_Br = torch.arange(cond_positions_Br.shape[1], device=cond_BrC.device).expand_as(cond_positions_Br)
    where_BM = torch.full((len(order_Br), tokens), -1, device=cond_BrC.device).scatter(1, cond_positions_Br, order_Br)
    found_Br = where_BM.gather(1, positions_Br)
    taken_BrC = cond_BrC.gather(1, found_Br.clamp_min(0)[..., None].expand_as(own_BrC))
    return torch.where((found_Br >= 0)[..., None], taken_BrC, own_BrC)


def plain_norm(x_RLC: Tensor) -> Tensor:
    """LayerNorm without affine, in float32."""
    return F.layer_norm(x_RLC.float(), x_RLC.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a norm without weights; nothing is modulated."""

    def __init__(self, config: STARConfig):
        super().__init__()
        self.literal_cross_rows = config.literal_cross_rows
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x_RLC: Tensor,
        layer: int,
        rotation: Rotation,
        positions: Tensor | None,
        conditioning: STARConditioning,
        attend: Attend,
        around: Around,
    ) -> Tensor:
        def attention(x: Tensor, positions: Tensor | None) -> Tensor:
            q, k, v = self.attn.qkv(plain_norm(x), rotation.at(positions), self.attn.constants())
            return linear(attend(layer, q, k, v, 1.0).transpose(1, 2).flatten(2), self.attn.proj)

        def cross(x: Tensor, positions: Tensor | None) -> Tensor:
            return self._cross(x, positions, conditioning, layer, rotation.tokens)

        def feed_forward(x: Tensor, positions: Tensor | None) -> Tensor:
            return self.ffn(plain_norm(x))

        x_RLC = x_RLC + around(Site("attn", layer), x_RLC, positions, attention)
        x_RLC = x_RLC + around(Site("cross", layer), x_RLC, positions, cross)
        return x_RLC + around(Site("mlp", layer), x_RLC, positions, feed_forward)

    def _cross(
        self, x: Tensor, positions: Tensor | None, conditioning: STARConditioning, layer: int, tokens: int
    ) -> Tensor:
        (k, v), mask = conditioning.text_kv[layer], conditioning.mask_B11T
        if self.literal_cross_rows:
            first = self.cross_attn(plain_norm(x[:1]), (k[:1], v[:1]), mask[:1])
            return first.expand(x.shape[0], -1, -1)
        batch = conditioning.prompts
        cond = self.cross_attn(plain_norm(x[:batch]), (k, v), mask)
        if x.shape[0] == batch:
            return cond
        if positions is None or positions.ndim == 1:
            return cond.repeat(2, 1, 1)
        own = self.cross_attn(plain_norm(x[batch:]), (k, v), mask)
        return torch.cat([cond, shared_by_position(cond, own, positions[:batch], positions[batch:], tokens)])


class STAR(NextScaleModel[STARConditioning]):
    """The transformer. Build it, load weights, call `set_grids`, then hand it to the sampler.

    Every block is its own chunk, as in StageVAR's released code for this model.
    """

    def __init__(self, config: STARConfig):
        super().__init__()
        self.config = config
        self.depth, self.width, self.heads, self.head_dim = config.depth, config.width, config.heads, config.head_dim
        self.chunk_layers = tuple(range(i, i + 1) for i in range(config.depth))
        width = config.width
        self.encoder_proj = nn.Linear(config.text_dim, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)  # never read; public files have it
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.lvl_embed = nn.Embedding(len(config.sides), width)
        self.word_embed = nn.Linear(config.code_dim, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_logits = nn.Linear(width, config.vocabulary)
        self.grids: tuple[Grid, ...] = ()
        self._rope: Tensor | None = None

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Prepares rotary tables. Raises UsageError when the scales are not the model's."""
        self.grids = tuple(grids)
        if self.grids != square(self.config.sides):
            raise UsageError(
                f"this STAR model has scales of sides {', '.join(map(str, self.config.sides))}; got {list(grids)}"
            )
        device = self.pos_start.device
        table = rope_table(self.grids, self.head_dim, self.config.rope_theta, self.config.rope_span)
        self._rope = table.to(device if device.type != "meta" else "cpu")

    def _scale_rope(self, scale: int) -> Tensor:
        assert self._rope is not None, "set_grids was not called"
        start = sum(h * w for h, w in self.grids[:scale])
        h, w = self.grids[scale]
        return self._rope[:, start : start + h * w]

    def condition(
        self, prompts: Sequence[PromptText], negative: Sequence[PromptText] | None = None
    ) -> STARConditioning:
        """Conditioning of 2B rows from CLIP features; without negatives the unconditional rows are the empty prompt.

        Only the pooled features of the unconditional side are read (see the module docstring).
        """
        device = self.pos_start.device
        null = [text.null_pooled_D for text in prompts] if negative is None else [text.pooled_D for text in negative]
        pooled_RD = torch.stack([*(text.pooled_D for text in prompts), *null]).to(device, torch.float32)
        text_BTD = torch.stack([text.features_TD for text in prompts]).to(device, torch.float32)
        mask_B11T = torch.stack([text.mask_T for text in prompts]).bool().to(device)[:, None, None]
        blocks = cast(list[Block], list(self.blocks))
        kv = [block.cross_attn.text_kv(text_BTD) for block in blocks]
        return STARConditioning(linear(pooled_RD, self.encoder_proj).float(), kv, mask_B11T)

    def embed(self, features_BLt: Tensor | None, scale: int, conditioning: STARConditioning) -> Tensor:
        level_C = self.lvl_embed.weight[scale]
        if scale == 0:
            return conditioning.first_RC[:, None] + self.pos_start + level_C
        assert features_BLt is not None
        x_BLC = linear(features_BLt, self.word_embed) + level_C
        return x_BLC.repeat(conditioning.rows // x_BLC.shape[0], 1, 1)

    def trunk(
        self,
        x_RLC: Tensor,
        scale: int,
        conditioning: STARConditioning,
        attend: Attend,
        around: Around = around_nothing,
        inner_guidance: dict[int, float] | None = None,
        fuse: tuple[int, float] | None = None,
    ) -> Tensor:
        conditioning_of = by_layer(conditioning, fuse)
        rotation = Rotation(self._scale_rope(scale), cast(Block, self.blocks[0]).attn.pieces.table)

        def run_layer(layer: int, x: Tensor, positions: Tensor | None) -> Tensor:
            return self.blocks[layer](x, layer, rotation, positions, conditioning_of(layer), attend, around)

        return run_trunk(x_RLC, self.chunk_layers, run_layer, around, inner_guidance, fuse)

    def logits(self, x_RLC: Tensor, conditioning: STARConditioning) -> Tensor:
        return linear(plain_norm(x_RLC), self.head_logits).float()

    def draw(self, logits_BLV: Tensor, noise: ScaleNoise, sampling: Sampling) -> Tensor:
        """Codebook indices (B, L), int64."""
        return draw_index(logits_BLV, noise, sampling.top_k, sampling.top_p)
