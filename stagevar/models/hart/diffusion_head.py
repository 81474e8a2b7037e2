"""HART's diffusion head: the continuous part of the last scale's tokens, drawn by a small denoiser per token.

What the codebook cannot express about a token is drawn in eight steps from noise, given the transformer's output for
that token and the code that was drawn for it. Steps, sizes and draws are fixed, so the head can be recorded with its
scale.

Source: mit-han-lab/hart, hart/modules/diffusion (facts): a cosine schedule of 1000 steps cut to eight, learned variances,
predictions of the clean residual clamped to [-1, 1], residuals stored at 1 / 0.6. Differs in that the noise is an argument,
that what does not change from step to step is computed once, and that the unconditional rows, whose states the reference
overwrites with the conditional ones at every step, have none of their own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.models.layers import linear

#: Denoising steps of the released model.
STEPS = 8
#: Steps of the schedule that they are taken from.
_TRAINED_STEPS = 1000
#: Residuals are what the denoiser works on times this.
_SPREAD = 0.6
#: Numbers that a time is spread to before it is embedded.
_WAVES = 256


@dataclass(frozen=True)
class DenoisingStep:
    """Constants of one step from x to the next: time of the trained schedule, then factors in order of use.

    clean residual = clean_x * x - clean_noise * predicted noise; mean = mean_clean * clean residual + mean_x * x; the
    logarithm of the variance lies between log_low and log_high. In the last step nothing is added to the mean.
    """

    time: int
    clean_x: float
    clean_noise: float
    mean_clean: float
    mean_x: float
    log_low: float
    log_high: float
    last: bool


@cache
def denoising_steps(steps: int = STEPS) -> tuple[DenoisingStep, ...]:
    """The steps in the order in which they run, noisiest first; at least two."""

    def remaining(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    times = [i / _TRAINED_STEPS for i in range(_TRAINED_STEPS + 1)]
    betas = [min(1 - remaining(end) / remaining(start), 0.999) for start, end in itertools.pairwise(times)]
    kept = [round(i * (_TRAINED_STEPS - 1) / (steps - 1)) for i in range(steps)]
    alpha = [float(value) for value in np.cumprod(1 - np.array(betas))[kept]]
    before = [1.0, *alpha[:-1]]
    beta = [1 - now / then for now, then in zip(alpha, before, strict=True)]
    variance = [b * (1 - then) / (1 - now) for b, now, then in zip(beta, alpha, before, strict=True)]
    variance[0] = variance[1]  # of the last step to run it is 0, and unused
    return tuple(
        DenoisingStep(
            time=kept[i],
            clean_x=math.sqrt(1 / alpha[i]),
            clean_noise=math.sqrt(1 / alpha[i] - 1),
            mean_clean=beta[i] * math.sqrt(before[i]) / (1 - alpha[i]),
            mean_x=(1 - before[i]) * math.sqrt(1 - beta[i]) / (1 - alpha[i]),
            log_low=math.log(variance[i]),
            log_high=math.log(beta[i]),
            last=i == 0,
        )
        for i in reversed(range(steps))
    )


class TimeEmbedding(nn.Module):
    """A number, spread to cosines and sines, through two layers: (width,)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: float) -> Tensor:
        half = _WAVES // 2
        order = torch.arange(half, dtype=torch.float32, device=cast(nn.Linear, self.mlp[0]).weight.device)
        angle = time * torch.exp(order * (-math.log(10000.0) / half))
        return linear(F.silu(linear(torch.cat([angle.cos(), angle.sin()]), self.mlp[0])), self.mlp[2])


class _Block(nn.Module):
    """Two layers in a residual, shifted, scaled and gated by token and time."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        shift, scale, gate = linear(active, self.adaLN_modulation[1]).chunk(3, dim=-1)
        norm = self.in_ln
        h = F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        h = torch.addcmul(shift.float(), h, 1 + scale.float())
        return x + gate * linear(F.silu(linear(h, self.mlp[0])), self.mlp[2])


class _Output(nn.Module):
    def __init__(self, width: int, out_dim: int):
        super().__init__()
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        shift, scale = linear(active, self.adaLN_modulation[1]).chunk(2, dim=-1)
        h = torch.addcmul(shift.float(), F.layer_norm(x.float(), x.shape[-1:], eps=1e-6), 1 + scale.float())
        return linear(h, self.linear).float()


class Denoiser(nn.Module):
    """Noise and variance of every token's residual at a time."""

    def __init__(self, code_dim: int, condition_dim: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(code_dim, width)
        self.res_blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.final_layer = _Output(width, 2 * code_dim)

    def forward(self, x_BLd: Tensor, time: int, condition_RLw: Tensor) -> tuple[Tensor, Tensor]:
        """(predicted noise (R, L, d), position (B, L, d) of the variance in its range, -1 to 1, of the first B rows)."""
        batch = x_BLd.shape[0]
        active = F.silu(self.time_embed(time) + condition_RLw)
        h = linear(x_BLd, self.input_proj).repeat(condition_RLw.shape[0] // batch, 1, 1)
        for block in self.res_blocks:
            h = block(h, active)
        noise_RLd, variance_RLd = self.final_layer(h, active).chunk(2, dim=-1)
        return noise_RLd, variance_RLd[:batch]


class DiffusionHead(nn.Module):
    """Draws the continuous residual of the last scale's tokens."""

    def __init__(self, code_dim: int, condition_dim: int, width: int, depth: int):
        super().__init__()
        self.net = Denoiser(code_dim, condition_dim, width, depth)

    def forward(self, condition_RLC: Tensor, noise_BSLd: Tensor, guidance: float) -> Tensor:
        """Residuals (B, L, d), float32.

        Args:
            condition_RLC: what each token's residual depends on; R is B, or 2B with the conditional rows first.
            noise_BSLd: standard normal draws, the start and then one per step but the last (S = STEPS).
            guidance: s of u + s(c - u), applied to the predicted noise if there are 2B rows.
        """
        condition_RLw = linear(condition_RLC, self.net.cond_embed)
        x_BLd = noise_BSLd[:, 0]
        for index, step in enumerate(denoising_steps()):
            noise, place_BLd = self.net(x_BLd, step.time, condition_RLw)
            if noise.shape[0] > x_BLd.shape[0]:
                cond, uncond = noise.chunk(2)
                noise = guidance * cond + (1 - guidance) * uncond
            clean_BLd = (step.clean_x * x_BLd - step.clean_noise * noise).clamp(-1, 1)
            x_BLd_mean = step.mean_clean * clean_BLd + step.mean_x * x_BLd
            if step.last:
                return _SPREAD * x_BLd_mean
            share_BLd = (place_BLd + 1) / 2
            log_variance = share_BLd * step.log_high + (1 - share_BLd) * step.log_low
            x_BLd = x_BLd_mean + torch.exp(0.5 * log_variance) * noise_BSLd[:, index + 1]
        raise AssertionError("no step is the last")
