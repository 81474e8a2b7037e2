"""The Infinity transformer: bitwise next-scale prediction with text cross-attention.

State-dict names and shapes are the official ones, so public checkpoints load unchanged; the forward is our own. The same
class serves the public sizes and `nano` (a small preset of it).

Source: FoundationVision/Infinity, models/infinity.py and models/basic.py (facts only), following the `fused_norm=True`
path that official inference uses. Differs in that cross-attention stays in the weights' precision (the reference casts
to bfloat16 for its attention kernel), text K/V are projected once per prompt instead of once per scale, and the sampling
loop lives in stagevar.sampling.sampler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stagevar.models.base import (
    Around,
    Attend,
    Grid,
    NextScaleModel,
    Sampling,
    TextInputs,
    around_nothing,
    by_layer,
    leaves_layers_alone,
)
from stagevar.models.infinity.blocks import (
    AdaLin,
    Block,
    Chunk,
    InfinityConditioning,
    LayerConstants,
    Scale,
    Stream,
    TextPool,
)
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.layers import Rotation, modulated_norm, rope_table, run_trunk
from stagevar.tensors.noise import ScaleNoise

_LARGE_SCALE = 64  # tokens; see `Infinity.features_train`
_CPU_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
_ANY_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


def pad_text(features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Ragged text rows [(len_i, D)] to (R, T, D) with T the longest, and a bool mask (R, 1, 1, T), None if none is needed."""
    lengths = [int(rows.shape[0]) for rows in features]
    padded = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    if min(lengths) == max(lengths):
        return padded, None
    positions = torch.arange(max(lengths), device=padded.device)
    return padded, (positions < torch.tensor(lengths, device=padded.device)[:, None])[:, None, None]


class Infinity(NextScaleModel[InfinityConditioning]):
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
        self.text_norm = Scale(config.text_dim)
        self.text_proj_for_sos = TextPool(config)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.lvl_embed = nn.Embedding(config.max_scales, width)
        self.word_embed = nn.Linear(config.token_bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.head_nm = AdaLin(width)
        self.head = nn.Linear(width, 2 * config.token_bits)
        blocks = [Block(config) for _ in range(config.depth)]
        if config.chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.block_chunks = nn.ModuleList(Chunk([blocks[i] for i in layers]) for layers in self.chunk_layers)
        self.grids: tuple[Grid, ...] = ()
        self._rope: Tensor | None = None

    def layers(self) -> list[Block]:
        """All blocks in order, whatever the chunking."""
        if self.config.chunks == 1:
            return cast(list[Block], list(self.blocks))
        return [block for chunk in cast(list[Chunk], list(self.block_chunks)) for block in chunk.layers()]

    def init_weights(self) -> None:
        """Initialization for training from scratch: small linears, gates half open, near-zero modulation and head."""
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

    def text_inputs(
        self, prompts: Sequence[Tensor], negative: Sequence[Tensor] | None = None, multiple: int = 1
    ) -> TextInputs[InfinityConditioning]:
        """Padded raw text (2B, T, text_dim), float32, and its mask (2B, 1, 1, T), which hides no row's first text row.

        Few operations, since they are launched for every image: prompts are padded where they are, and the rows of
        `cfg_uncond` that a prompt does not reach are masked instead of left out.
        """
        given = [rows.to(prompts[0].device, torch.float32) for rows in (*prompts, *(negative or ()))]
        lengths = [int(rows.shape[0]) for rows in given]
        longest, null_TD = max(lengths), self.cfg_uncond
        if negative is None:
            lengths += [min(length, len(null_TD)) for length in lengths]
        total = -(-longest // multiple) * multiple
        text_RTD = torch.zeros(len(lengths), total, null_TD.shape[1], device=self.pos_start.device)
        padded = nn.utils.rnn.pad_sequence(given, batch_first=True)
        text_RTD[: len(given)] = F.pad(padded, (0, 0, 0, total - longest))
        if negative is None:
            text_RTD[len(given) :, : len(null_TD)] = null_TD[:total]
        mask_RT = torch.arange(total) < torch.tensor(lengths)[:, None]
        return TextInputs((text_RTD, mask_RT[:, None, None]), self._conditioner)

    def _conditioner(self) -> Callable[[Tensor, Tensor], InfinityConditioning]:
        return functools.partial(self.condition_padded, constants=self.constants())

    def condition_padded(
        self, text_RTD: Tensor, mask_R11T: Tensor | None, constants: tuple[LayerConstants, ...] | None = None
    ) -> InfinityConditioning:
        """Conditioning of as many rows as given: padded raw text features and their mask; with `constants()`, made earlier."""
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
        constants = self.constants() if constants is None else constants
        return InfinityConditioning(pooled_RC, modulation, text_kv, bias, (head_scale, head_shift), constants)

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
        rotation = self._rotation(self._scale_rope(scale))
        blocks, conditioning_of = self.layers(), by_layer(conditioning, fuse)

        chained = blocks[0].pieces.chained
        # Guidance inside the layers, an accelerator at their sublayers and 8-bit entries need what chains leave out.
        plain = inner_guidance or fuse is not None or not leaves_layers_alone(around)
        if plain or not getattr(attend, "takes_products", False):
            chained = None

        def run_layer(layer: int, x: Tensor, positions: Tensor | None) -> Tensor:
            return blocks[layer](x, layer, rotation, positions, conditioning_of(layer), attend, around)

        def run_chained(layers: range, x: Tensor, positions: Tensor | None) -> Tensor:
            assert chained is not None
            stream, table = Stream(x.contiguous()), rotation.at(positions)
            for layer in layers:
                stream = blocks[layer].chain(stream, layer, table, conditioning, attend, chained)
            return stream.whole()

        return run_trunk(
            x_RLC + level_C,
            self.chunk_layers,
            run_layer,
            around,
            inner_guidance,
            fuse,
            before_chunk=(lambda x: x + level_C) if self.config.level_embedding_every_chunk else None,
            whole_chunk=None if chained is None else run_chained,
        )

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
            text_BTD: padded raw text features.
            mask_B11T: bool, True for real text rows.
            inputs: `BitResidual.quantize`'s inputs for scales 1..n-1; fewer of them leave the last scales out.
            null_B: bool, rows whose caption is dropped (their text is replaced by cfg_uncond).
        """
        return self.features_train(text_BTD, mask_B11T, inputs, null_B)[1]

    def features_train(
        self, text_BTD: Tensor, mask_B11T: Tensor | None, inputs: Sequence[Tensor], null_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The trunk's features (B, L_total, C) and the logits; arguments as for `forward_train`."""
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
