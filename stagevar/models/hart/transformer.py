"""HART: text-to-image next-scale prediction over hybrid tokens (HART-0.7B is depth 24).

State-dict names and shapes are the official ones; the forward is our own. Two things set the family apart.

The text is a prefix. A prompt's features (300 rows, padding included) are the first tokens of the sequence: the first scale
runs them all, its one image token is the last of them, and later scales attend to them in the KV cache. No mask hides the
padding. The unconditional row's features are zeros.

Tokens are hybrid. A token is a codebook entry or, as all of the released scripts draw it, a blend of entries
(`HARTConfig.smooth`); to those of the last scale the diffusion head adds a continuous residual, which it draws given the
transformer's output and a hard draw of the token's code. So `scale_tokens` takes the place of plain `draw`.

Quirks of the reference that are kept, since the weights were used with them: the last scale has the guidance and the
smoothness of the one before; attention logits have a quarter of the usual scale; see also stagevar.models.hart.rotary.

Source: mit-han-lab/hart, hart/modules/models/transformer and hart/modules/networks/basic_hart.py (facts only), for the
settings of the released model: Llama-style attention and feed-forward, nothing modulated inside blocks, the last scale in
one pass. Differs in that codes are drawn by Gumbel-argmax (equal in distribution to the reference's multinomial draw), and
that the hard draw is made only where it is read.
"""

from __future__ import annotations

import dataclasses
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
    Residual,
    Sampling,
    Site,
    SiteFn,
    around_nothing,
    by_layer,
)
from stagevar.models.hart.diffusion_head import STEPS, DiffusionHead, TimeEmbedding
from stagevar.models.hart.rotary import TextTurning, Turning, turn_halves
from stagevar.models.hart.text import HARTText
from stagevar.models.hart.tokenizer import HybridResidual
from stagevar.models.layers import MAX_SCALE_MUL, linear, run_trunk
from stagevar.models.var.transformer import draw_index, smallest_kept
from stagevar.schedule.grids import Grid, square
from stagevar.tensors.noise import ScaleNoise

#: Scales that draw from `Sampling.top_k` codes; the later ones draw from half as many.
_WIDE_SCALES = 7


@dataclass(frozen=True)
class HARTConfig:
    """Shape of a HART transformer.

    Attributes:
        sides: token grid side of each scale.
        text_dim, text_tokens: shape of a prompt's features.
        head_width, head_depth: of the diffusion head.
        smooth: blend codes instead of choosing one.
        context_norm: whether features are normalized.
        level_table: whether levels have learned rows instead of an embedded number.
        cosine: whether q and k have unit length and a learned scale per head.
    """

    depth: int
    width: int
    heads: int
    sides: tuple[int, ...]
    text_dim: int = 1536
    text_tokens: int = 300
    vocabulary: int = 4096
    code_dim: int = 32
    head_width: int = 1024
    head_depth: int = 6
    smooth: bool = True
    context_norm: bool = True
    level_table: bool = False
    cosine: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Feed-forward width: two thirds of four times the model's, rounded up to a multiple of 256."""
        return int(8 * self.width / 3 + 255) // 256 * 256


class Norm(nn.Module):
    """Root-mean-square norm with a weight, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-6)


def beside_text(around: Around) -> Around:
    """The hook for the first scale: it sees the image token alone, and the text tokens take part in what it wraps."""
    if around is around_nothing:
        return around

    def hook(site: Site, x_RLC: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
        text: list[Tensor] = []

        def run_whole(image_R1C: Tensor, positions: Tensor | None) -> Tensor:
            y_RLC = run(torch.cat([x_RLC[:, :-1], image_R1C], dim=1), positions)
            text.append(y_RLC[:, :-1])
            return y_RLC[:, -1:]

        image_R1C = around(site, x_RLC[:, -1:], positions, run_whole)
        return torch.cat([text[0], image_R1C], dim=1)

    return hook


class Attention(nn.Module):
    """Self-attention over everything cached, without a mask."""

    zero_k_bias: Tensor

    def __init__(self, config: HARTConfig):
        super().__init__()
        width, self.heads, self.cosine = config.width, config.heads, config.cosine
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        if self.cosine:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)
        self.softmax_scale = 1.0 if self.cosine else 0.25 / math.sqrt(config.head_dim)

    def qkv(self, x_RLC: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (turned, float32) and v, each (R, H, L, c)."""
        bias_3C = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = linear(x_RLC, self.qkv_proj, bias_3C).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = qkv[:2].float().unbind(0)
        if self.cosine:
            q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
            q = q * self.scale_mul_1H11.float().clamp_max(MAX_SCALE_MUL).exp()
        return turn_halves(q, cos_sin), turn_halves(k, cos_sin), qkv[2]


class FeedForward(nn.Module):
    """A gated linear unit with SiLU."""

    def __init__(self, config: HARTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_RLC: Tensor) -> Tensor:
        return linear(F.silu(linear(x_RLC, self.gate_proj)) * linear(x_RLC, self.up_proj), self.down_proj)


class Block(nn.Module):
    """Self-attention and feed-forward, both after the same norm; nothing is modulated."""

    def __init__(self, config: HARTConfig):
        super().__init__()
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        self.ln_wo_grad = Norm(config.width)

    def forward(
        self,
        x_RLC: Tensor,
        layer: int,
        turning: Turning | TextTurning,
        positions: Tensor | None,
        attend: Attend,
        around: Around,
    ) -> Tensor:
        def attention(x: Tensor, positions: Tensor | None) -> Tensor:
            q, k, v = self.attn.qkv(self.ln_wo_grad(x), turning.at(positions))
            out_RHLc = attend(layer, q, k, v, self.attn.softmax_scale)
            return linear(out_RHLc.transpose(1, 2).flatten(2), self.attn.proj)

        def feed_forward(x: Tensor, positions: Tensor | None) -> Tensor:
            return self.ffn(self.ln_wo_grad(x))

        x_RLC = x_RLC + around(Site("attn", layer), x_RLC, positions, attention)
        return x_RLC + around(Site("mlp", layer), x_RLC, positions, feed_forward)


@dataclass
class HARTConditioning(Conditioning):
    """The text of a batch as HART reads it.

    Attributes:
        text_RTC: embedded features.
        place_RT: their places, float32, as the rotary tables take them.
        head_scale_R1C, head_shift_R1C: of the norm before the head.
    """

    text_RTC: Tensor
    place_RT: Tensor
    head_scale_R1C: Tensor
    head_shift_R1C: Tensor

    @property
    def rows(self) -> int:
        return self.text_RTC.shape[0]

    def select(self, rows: slice | list[int]) -> HARTConditioning:
        if rows == slice(0, self.rows):
            return self
        return HARTConditioning(*(part[rows] for part in vars(self).values()))


class HART(NextScaleModel[HARTConditioning]):
    """The transformer. Build it, load weights, call `set_grids`, then hand it to the sampler.

    Every block is its own chunk, as in StageVAR's released code for this model.
    """

    def __init__(self, config: HARTConfig):
        super().__init__()
        self.config = config
        self.depth, self.width, self.heads, self.head_dim = config.depth, config.width, config.heads, config.head_dim
        self.chunk_layers = tuple(range(i, i + 1) for i in range(config.depth))
        self.prefix_tokens = config.text_tokens - 1
        width = config.width
        self.word_embed = nn.Linear(config.code_dim, width)
        self.context_embed = nn.Linear(config.text_dim, width)
        self.context_norm = Norm(config.text_dim) if config.context_norm else nn.Identity()
        self.lvl_embed = nn.Embedding(len(config.sides), width) if config.level_table else TimeEmbedding(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head_nm = nn.ModuleDict({"ln_wo_grad": Norm(width), "ada_lin": ada_lin})
        self.head = nn.Linear(width, config.vocabulary)
        self.decoder_norm = Norm(width)
        self.diffloss = DiffusionHead(config.code_dim, width, config.head_width, config.head_depth)
        self.grids: tuple[Grid, ...] = ()
        self._coordinates: tuple[Tensor, ...] = ()

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Prepares the coordinates of every scale. Raises UsageError when the scales are not the model's."""
        self.grids = tuple(grids)
        if self.grids != square(self.config.sides):
            raise UsageError(
                f"this HART model has scales of sides {', '.join(map(str, self.config.sides))}; got {list(grids)}"
            )
        device = self.word_embed.weight.device
        span = self.config.sides[-1]
        coordinates = []
        for side in self.config.sides:
            place = torch.arange(side, device=device if device.type != "meta" else "cpu") / side * span
            coordinates.append(torch.cartesian_prod(place, place) if side > 1 else place.new_zeros(1, 2))
        self._coordinates = tuple(coordinates)

    def condition(self, prompts: Sequence[HARTText], negative: Sequence[HARTText] | None = None) -> HARTConditioning:
        """Conditioning of 2B rows from the language model's features; without negatives the unconditional rows are zeros."""
        device = self.word_embed.weight.device
        text_RTD = torch.stack([text.features_TD.float() for text in (*prompts, *(negative or ()))]).to(device)
        place_RT = torch.stack([text.place_T.float() for text in (*prompts, *(negative or ()))]).to(device)
        if negative is None:
            text_RTD = torch.cat([text_RTD, torch.zeros_like(text_RTD)])
            place_RT = torch.cat([place_RT, torch.zeros_like(place_RT)])
        text_RTC = linear(self.context_norm(text_RTD), self.context_embed).float()
        pooled_RC = text_RTC.amax(dim=1)
        ada_lin = cast(nn.Sequential, self.head_nm["ada_lin"])
        head = linear(F.silu(pooled_RC), ada_lin[1]).float().unflatten(-1, (1, 2, -1))
        return HARTConditioning(text_RTC, place_RT, *head.unbind(2))

    def _level(self, scale: int) -> Tensor:
        if isinstance(self.lvl_embed, TimeEmbedding):
            return self.lvl_embed(scale).float()
        return self.lvl_embed.weight[scale]

    def embed(self, features_BLt: Tensor | None, scale: int, conditioning: HARTConditioning) -> Tensor:
        """See `NextScaleModel.embed`; at scale 0 all text tokens, (R, T, C)."""
        if scale == 0:
            return conditioning.text_RTC + self._level(0)
        assert features_BLt is not None
        x_BLC = linear(features_BLt, self.word_embed) + self._level(scale)
        return x_BLC.repeat(conditioning.rows // x_BLC.shape[0], 1, 1)

    def turning(self, scale: int, conditioning: HARTConditioning) -> Turning | TextTurning:
        """The rotary tables of a scale."""
        if scale == 0:
            return TextTurning(conditioning.place_RT, self.head_dim)
        return Turning(self._coordinates[scale], conditioning.place_RT[:, -1], self.head_dim)

    def trunk(
        self,
        x_RLC: Tensor,
        scale: int,
        conditioning: HARTConditioning,
        attend: Attend,
        around: Around = around_nothing,
        inner_guidance: dict[int, float] | None = None,
        fuse: tuple[int, float] | None = None,
    ) -> Tensor:
        if scale == 0:
            around = beside_text(around)
        before = self.turning(scale, conditioning)
        behind = before if fuse is None else self.turning(scale, by_layer(conditioning, fuse)(fuse[0]))

        def run_layer(layer: int, x: Tensor, positions: Tensor | None) -> Tensor:
            turning = behind if fuse is not None and layer >= fuse[0] else before
            return self.blocks[layer](x, layer, turning, positions, attend, around)

        x_RLC = run_trunk(x_RLC, self.chunk_layers, run_layer, around, inner_guidance, fuse)
        return x_RLC[:, -1:] if scale == 0 else x_RLC

    def logits(self, x_RLC: Tensor, conditioning: HARTConditioning) -> Tensor:
        normed = self.head_nm["ln_wo_grad"](x_RLC)
        modulated = torch.addcmul(conditioning.head_shift_R1C, normed, 1 + conditioning.head_scale_R1C)
        return linear(modulated, self.head).float()

    def draw(self, logits_BLV: Tensor, noise: ScaleNoise, sampling: Sampling) -> Tensor:
        """Codebook indices (B, L), int64."""
        return draw_index(logits_BLV, noise, sampling.top_k, sampling.top_p)

    def scale_tokens(
        self,
        logits_BLV: Tensor,
        x_RLC: Tensor,
        scale: int,
        noise: ScaleNoise,
        sampling: Sampling,
        residual: Residual,
    ) -> Tensor:
        """Vectors (B, L, d), float32: codes, blended if the model is smooth, and at the last scale their residuals."""
        assert isinstance(residual, HybridResidual)  # HART's tokenizer has it
        last = scale == len(self.grids) - 1
        if scale >= _WIDE_SCALES:
            sampling = dataclasses.replace(sampling, top_k=sampling.top_k // 2)
        chosen = None
        if last or not self.config.smooth:
            chosen = residual.codes(self.draw(logits_BLV, noise, sampling))
        codes_BLd = self._blend(logits_BLV, scale, noise, sampling, residual) if self.config.smooth else chosen
        assert codes_BLd is not None
        if not last:
            return codes_BLd
        assert chosen is not None
        rows = x_RLC.shape[0] // codes_BLd.shape[0]
        condition_RLC = self.decoder_norm(x_RLC + linear(chosen, self.word_embed).repeat(rows, 1, 1))
        normal_BSLd = noise.normal("diffusion", (STEPS, *codes_BLd.shape[1:]))
        return codes_BLd + self.diffloss(condition_RLC, normal_BSLd, sampling.guidance[scale])

    def _blend(
        self, logits_BLV: Tensor, scale: int, noise: ScaleNoise, sampling: Sampling, residual: HybridResidual
    ) -> Tensor:
        """Gumbel-softmax over the codes that top-k and top-p leave, sharper from scale to scale."""
        scales = len(self.grids)
        depth = min(scale, scales - 2) / (scales - 1)
        floor = smallest_kept(logits_BLV, sampling.top_k, sampling.top_p)
        if floor is not None:
            logits_BLV = logits_BLV.masked_fill(logits_BLV < floor, -math.inf)
        gumbel_BLV = -torch.log(-torch.log(noise.uniform("smooth", tuple(logits_BLV.shape[1:]))))
        sharpness = 1 / max(0.27 * (1 - 0.95 * depth), 0.005)
        weight_BLV = (sharpness * ((1 + depth) * logits_BLV + gumbel_BLV)).softmax(-1)
        return residual.blend(weight_BLV)


def guidance_ramp(strength: float, scales: int) -> tuple[float, ...]:
    """HART's guidance: one s per scale, logits = u + s(c - u), s = 1 + strength * scale / (scales - 1).

    The last scale has that of the one before it. (The reference writes (1 + t)c - t u.)
    """
    return tuple(1.0 + strength * min(scale, scales - 2) / (scales - 1) for scale in range(scales))
