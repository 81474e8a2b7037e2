"""A tiny random Infinity for tests: real architecture, a tokenizer without learned parts, hashed text features."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stagevar.models.base import LoadedModel, Residual, Sampling
from stagevar.models.infinity.bits import BitResidual
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.infinity.transformer import Infinity
from stagevar.schedule.grids import Grid

GRIDS: tuple[Grid, ...] = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6))
TEXT_DIM = 128


class TinyText:
    """Two to six feature rows per prompt, a pure function of its text."""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        features = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            features.append(torch.randn(2 + len(prompt) % 5, TEXT_DIM, generator=generator) * 0.3)
        return features


class TinyTokenizer:
    """The shared residual loop with a decoder that shows the first three channels, four pixels per position."""

    def __init__(self, grids: Sequence[Grid], latent_dim: int = 4, patchify: bool = False):
        self.residual: Residual = BitResidual(grids, latent_dim, patchify)
        self.latent_dim = latent_dim

    def decode(self, code_sum_BdHW: Tensor) -> Tensor:
        return F.interpolate(torch.tanh(code_sum_BdHW[:, :3]), scale_factor=4.0)


def tiny_infinity(
    grids: Sequence[Grid] = GRIDS,
    depth: int = 4,
    chunks: int = 2,
    seed: int = 0,
    guidance: float = 3.0,
    name: str = "tiny",
) -> LoadedModel:
    """Random weights large enough that every branch, position and layer shows in the logits."""
    torch.manual_seed(seed)
    transformer = Infinity(
        InfinityConfig(depth, 32, 2, chunks, token_bits=4, text_dim=TEXT_DIM, text_maxlen=16, ffn_hidden=64)
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    transformer.eval().set_grids(grids)
    sampling = Sampling(Sampling.per_scale(guidance, len(grids)), Sampling.per_scale(1.0, len(grids)))
    pixels = (4 * grids[-1][0], 4 * grids[-1][1])
    return LoadedModel(
        name,
        transformer,
        TinyTokenizer(grids),
        TinyText(),
        sampling,
        tuple(grids),
        pixels,
        torch.device("cpu"),
        torch.float32,
    )
