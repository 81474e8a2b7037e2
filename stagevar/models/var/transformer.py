"""VAR: class-conditional next-scale prediction over a codebook (d16 to d36).

State-dict names and shapes are the official ones, so public checkpoints load unchanged (their mask buffers are
dropped); the forward is our own. What VAR shares with STAR (the guidance ramp, the draw from a codebook, the order of
sites) is here too.

Source: FoundationVision/VAR, models/var.py, models/basic_var.py, models/helpers.py (facts only). Differs in that the
class modulation of all layers is computed once per prompt instead of once per scale, tokens are drawn by Gumbel-argmax
(equal in distribution to the reference's multinomial draw), and the sampling loop lives in stagevar.sampling.sampler.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.errors import UsageError, did_you_mean
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
from stagevar.models.layers import PLAIN, FeedForward, SelfAttention, linear, modulated_norm, run_trunk
from stagevar.schedule.grids import Grid, square
from stagevar.tensors.noise import ScaleNoise


def guidance_ramp(strength: float, scales: int) -> tuple[float, ...]:
    """VAR's and STAR's guidance: one s per scale, logits = u + s(c - u), s = 1 + strength * scale / (scales - 1).

    Scale 0 is unguided, the last scale has the full 1 + strength. (The references write (1 + t)c - t u.)
    """
    return tuple(1.0 + strength * scale / max(scales - 1, 1) for scale in range(scales))


def draw_index(logits_BLV: Tensor, noise: ScaleNoise, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Codebook indices (B, L), int64: argmax of logits plus keyed Gumbel noise, restricted to top-k, then to top-p.

    top_k 0 or >= V and top_p 0 or >= 1 restrict nothing. Gumbel noise belongs to (token, codebook entry), so a small
    change of the logits seldom changes the token and trials that differ a little stay paired; one uniform per token,
    pushed through the cumulative distribution, would not give that.
    """
    u_BLV = noise.uniform("gumbel", tuple(logits_BLV.shape[1:]))
    floor = smallest_kept(logits_BLV, top_k, top_p)
    if floor is not None:
        logits_BLV = logits_BLV.masked_fill(logits_BLV < floor, -math.inf)
    return (logits_BLV - torch.log(-torch.log(u_BLV))).argmax(-1)


def smallest_kept(logits_BLV: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """The smallest logit (B, L, 1) that top-k and top-p leave; None when both are off."""
    size = logits_BLV.shape[-1]
    keep_k, keep_p = 0 < top_k < size, 0 < top_p < 1
    if not keep_k and not keep_p:
        return None
    best_BLk = logits_BLV.topk(top_k if keep_k else size, dim=-1).values
    if not keep_p:
        return best_BLk[..., -1:]
    # An entry goes when it and everything below it weigh at most 1 - top_p; the best one always stays.
    weight_of_rest = best_BLk.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    kept = (weight_of_rest > 1 - top_p).sum(-1, keepdim=True).clamp_min(1)
    return best_BLk.gather(-1, kept - 1)


@dataclass(frozen=True)
class VARConfig:
    """Shape of a VAR transformer.

    Attributes:
        sides: token grid side of each scale, which the learned positions fix.
        vocabulary, code_dim: size of the tokenizer's codebook.
        classes: not counting the null class, which takes the last row.
        shared_adaln: whether all blocks share one modulation layer (d36).
    """

    depth: int
    width: int
    heads: int
    sides: tuple[int, ...]
    vocabulary: int = 4096
    code_dim: int = 32
    classes: int = 1000
    shared_adaln: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Feed-forward width."""
        return 4 * self.width


class Block(nn.Module):
    """Self-attention and feed-forward, both modulated by the class."""

    pieces = PLAIN

    def __init__(self, config: VARConfig):
        super().__init__()
        self.attn = SelfAttention(config)
        self.ffn = FeedForward(config)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / math.sqrt(config.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def modulation(self, class_RC: Tensor, shared_R16C: Tensor | None) -> tuple[Tensor, ...]:
        """Two gates, two scales, two shifts, each (R, 1, C) float32."""
        if shared_R16C is not None:
            parts = self.ada_gss.float() + shared_R16C
        else:
            parts = linear(F.silu(class_RC), self.ada_lin[1]).float().unflatten(-1, (1, 6, -1))
        return tuple(parts.unbind(2))

    def forward(
        self,
        x_RLC: Tensor,
        layer: int,
        modulation: tuple[Tensor, ...],
        positions: Tensor | None,
        attend: Attend,
        around: Around,
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation

        def attention(x: Tensor, positions: Tensor | None) -> Tensor:
            normed = self.pieces.modulated_norm(x, scale1, shift1)
            q, k, v = self.attn.qkv(normed, None, self.attn.constants())
            return linear(attend(layer, q, k, v, 1.0).transpose(1, 2).flatten(2), self.attn.proj) * gamma1

        def feed_forward(x: Tensor, positions: Tensor | None) -> Tensor:
            return self.ffn(self.pieces.modulated_norm(x, scale2, shift2)) * gamma2

        x_RLC = x_RLC + around(Site("attn", layer), x_RLC, positions, attention)
        return x_RLC + around(Site("mlp", layer), x_RLC, positions, feed_forward)


@dataclass
class VARConditioning(Conditioning):
    """The classes of a batch as VAR reads them.

    Attributes:
        class_RC: class embeddings.
        modulation: six (R, 1, C) per layer.
        head_modulation: scale and shift (R, 1, C).
    """

    class_RC: Tensor
    modulation: list[tuple[Tensor, ...]]
    head_modulation: tuple[Tensor, Tensor]

    @property
    def rows(self) -> int:
        return self.class_RC.shape[0]

    def select(self, rows: slice | list[int]) -> VARConditioning:
        if rows == slice(0, self.rows):
            return self
        return VARConditioning(
            self.class_RC[rows],
            [tuple(part[rows] for part in layer) for layer in self.modulation],
            (self.head_modulation[0][rows], self.head_modulation[1][rows]),
        )


class VAR(NextScaleModel[VARConditioning]):
    """The transformer. Build it, load weights, then hand it to the sampler.

    Positions are learned and already part of the trunk's input, so a reduced site's tokens carry theirs and the
    `positions` of a site are not needed. Every block is its own chunk.
    """

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = config
        self.depth, self.width, self.heads, self.head_dim = config.depth, config.width, config.heads, config.head_dim
        self.chunk_layers = tuple(range(i, i + 1) for i in range(config.depth))
        width = config.width
        self.grids = square(config.sides)
        tokens = sum(h * w for h, w in self.grids)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_1LC = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.lvl_embed = nn.Embedding(len(config.sides), width)
        self.word_embed = nn.Linear(config.code_dim, width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = nn.ModuleDict({"ada_lin": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})
        self.head = nn.Linear(width, config.vocabulary)

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Checks the scales; VAR's learned positions allow no others. Raises UsageError."""
        if tuple(grids) != self.grids:
            raise UsageError(
                f"VAR's learned positions fix its scales to sides {', '.join(map(str, self.config.sides))}; "
                f"got {list(grids)}"
            )

    def condition(self, prompts: Sequence[int], negative: Sequence[int] | None = None) -> VARConditioning:
        """Conditioning of 2B rows from class indices; without negatives the unconditional rows are the null class.

        Raises:
            UsageError: for an index outside the classes.
        """
        null = [self.config.classes] * len(prompts) if negative is None else list(negative)
        for label in (*prompts, *([] if negative is None else null)):
            if not 0 <= label < self.config.classes:
                raise UsageError(f"class {label} does not exist; use 0 to {self.config.classes - 1}")
        labels = torch.tensor([*prompts, *null], device=self.class_emb.weight.device)
        class_RC = self.class_emb(labels).float()
        shared = None
        if self.config.shared_adaln:
            shared = linear(F.silu(class_RC), self.shared_ada_lin[1]).float().unflatten(-1, (1, 6, -1))
        ada_lin = cast(nn.Sequential, self.head_nm["ada_lin"])
        head = linear(F.silu(class_RC), ada_lin[1]).float().unflatten(-1, (1, 2, -1))
        head_scale, head_shift = head.unbind(2)
        blocks = cast(list[Block], list(self.blocks))
        modulation = [block.modulation(class_RC, shared) for block in blocks]
        return VARConditioning(class_RC, modulation, (head_scale, head_shift))

    def embed(self, features_BLt: Tensor | None, scale: int, conditioning: VARConditioning) -> Tensor:
        start = sum(h * w for h, w in self.grids[:scale])
        stop = start + self.grids[scale][0] * self.grids[scale][1]
        place_1LC = self.pos_1LC[:, start:stop] + self.lvl_embed.weight[scale]
        if scale == 0:
            return conditioning.class_RC[:, None] + self.pos_start + place_1LC
        assert features_BLt is not None
        x_BLC = linear(features_BLt, self.word_embed) + place_1LC
        return x_BLC.repeat(conditioning.rows // x_BLC.shape[0], 1, 1)

    def trunk(
        self,
        x_RLC: Tensor,
        scale: int,
        conditioning: VARConditioning,
        attend: Attend,
        around: Around = around_nothing,
        inner_guidance: dict[int, float] | None = None,
        fuse: tuple[int, float] | None = None,
    ) -> Tensor:
        conditioning_of = by_layer(conditioning, fuse)

        def run_layer(layer: int, x: Tensor, positions: Tensor | None) -> Tensor:
            return self.blocks[layer](x, layer, conditioning_of(layer).modulation[layer], positions, attend, around)

        return run_trunk(x_RLC, self.chunk_layers, run_layer, around, inner_guidance, fuse)

    def logits(self, x_RLC: Tensor, conditioning: VARConditioning) -> Tensor:
        scale, shift = conditioning.head_modulation
        return linear(modulated_norm(x_RLC, scale, shift), self.head).float()

    def draw(self, logits_BLV: Tensor, noise: ScaleNoise, sampling: Sampling) -> Tensor:
        """Codebook indices (B, L), int64."""
        return draw_index(logits_BLV, noise, sampling.top_k, sampling.top_p)


# ---------------------------------------------------------------------------------------------------- prompts


@cache
def class_names() -> tuple[str, ...]:
    """ImageNet's 1000 class names in index order, empty when torchvision is not installed (nothing is shipped here)."""
    try:
        from torchvision.models._meta import _IMAGENET_CATEGORIES
    except ImportError:
        return ()
    return tuple(_IMAGENET_CATEGORIES)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


class ClassLabels:
    """VAR's stand-in for a text encoder: a prompt is a class index ("207") or an ImageNet name ("golden retriever").

    Args:
        classes: number of classes; names are known for ImageNet's 1000 only.
    """

    def __init__(self, classes: int = 1000):
        self.classes = classes

    def encode(self, prompts: Sequence[str | int]) -> list[int]:
        """Class indices. Raises UsageError for a prompt that is neither an index in range nor a class name."""
        return [self._label(str(prompt)) for prompt in prompts]

    def _label(self, prompt: str) -> int:
        span = f"0 to {self.classes - 1}"
        if prompt.strip().lstrip("-").isdigit():
            label = int(prompt)
            if not 0 <= label < self.classes:
                raise UsageError(f"class {label} does not exist; this model's prompts are class indices {span}")
            return label
        names = class_names() if self.classes == 1000 else ()
        if not names:
            reason = "; class names need torchvision: pip install 'stagevar-tune[tune]'" if self.classes == 1000 else ""
            raise UsageError(f"prompt {prompt!r} is not a class index ({span}){reason}")
        plain = [_plain(name) for name in names]
        if _plain(prompt) in plain:
            return plain.index(_plain(prompt))
        near = did_you_mean(_plain(prompt), plain)
        raise UsageError(f"prompt {prompt!r} is not an ImageNet class name or index {span}{near}")


class RandomLabels:
    """For `--weights random`: an index as is, any other prompt as an arbitrary class; no meaning."""

    def __init__(self, classes: int = 1000):
        self.labels = ClassLabels(classes)

    def encode(self, prompts: Sequence[str]) -> list[int]:
        """Class indices, a pure function of each prompt."""
        return [self._label(prompt) for prompt in prompts]

    def _label(self, prompt: str) -> int:
        try:
            return self.labels.encode([prompt])[0]
        except UsageError:
            return zlib.crc32(prompt.encode()) % self.labels.classes
