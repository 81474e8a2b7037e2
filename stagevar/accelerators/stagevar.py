"""StageVAR: random projection of the token axis (RP) and representative token restoration (RTR).

At a reduced site with M tokens and rank r: draw r distinct positions I with probability proportional to the squared norm
of the tokens; replace X by Q^T X (Gaussian Q / sqrt(r), or the rows at I themselves); run the site on r tokens; put output
row j at position I_j of the same site's output at the previously run scale, area-resized to this grid. Projection "top"
draws nothing: its tokens and positions are the r of the largest norm.

Source: arXiv 2512.16483 section 4 and sen-mao/FasterVAR infinity.py (facts). Differs: any batch (draws are per row and
keyed by seed, prompt, scale, site and branch), either branch may stay, row selection (drawn or by norm), the trunk as one
site, rotary positions at I, any aspect ratio, no state on modules. The index draw is Gumbel top-r, equal in distribution to
drawing without replacement.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stagevar.accelerators.base import Accelerator, Cached, ScaleContext
from stagevar.models.base import Around, Site, SiteFn, around_nothing
from stagevar.schedule import LowRank


def squared_norms(x_RMC: Tensor) -> Tensor:
    """Squared norm of every token (R, M), in float32."""
    return x_RMC.float().square().sum(-1)


def highest(score_RM: Tensor, count: int) -> Tensor:
    """Positions (R, count) of the highest scores per row, highest first, ties by position."""
    return score_RM.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def draw_indices(x_RMC: Tensor, rank: int, uniform_RM: Tensor) -> Tensor:
    """r distinct positions per row (R, r), probability proportional to the squared token norm, in draw order."""
    energy_RM = squared_norms(x_RMC)
    probability_RM = energy_RM / energy_RM.sum(-1, keepdim=True)
    score_RM = probability_RM.double().log() - torch.log(-torch.log(uniform_RM.double()))
    return highest(score_RM, rank)


def project(x_RMC: Tensor, normal_RMr: Tensor) -> Tensor:
    """Q^T X with Q = normal / sqrt(r): (R, M, C) to (R, r, C)."""
    q_RMr = normal_RMr / math.sqrt(normal_RMr.shape[-1])
    return torch.matmul(q_RMr.transpose(1, 2).to(x_RMC.dtype), x_RMC)


def gather_rows(x_RMC: Tensor, index_Rr: Tensor) -> Tensor:
    """Rows of x at per-row positions: (R, r, C)."""
    return x_RMC.gather(1, index_Rr[..., None].expand(-1, -1, x_RMC.shape[-1]))


def restore(y_RrC: Tensor, index_Rr: Tensor, background_RMC: Tensor) -> Tensor:
    """The background with row j of y at position index[j]: (R, M, C)."""
    return background_RMC.to(y_RrC.dtype).scatter(1, index_Rr[..., None].expand_as(y_RrC), y_RrC)


class StageVAR(Accelerator):
    """RP and RTR at the chunks or around the whole trunk, as the step says."""

    name = "stagevar"

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        step = context.step
        reduction = step.reduction
        if reduction is not None and not isinstance(reduction, LowRank):
            raise ValueError(f"scale {step.scale}: StageVAR cannot apply {type(reduction).__name__}")

        def around(site: Site, x: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
            if site.kind not in ("chunk", "trunk"):
                return around_nothing(site, x, positions, run)
            if reduction is None or site.kind != reduction.site:
                y = run(x, positions)
            else:
                y = self._reduced(context, reduction, site, x, run)
            # A chunk inside a reduced trunk sees r tokens: nothing there that a later scale could be restored from.
            if y.shape[1] == step.tokens:
                updates[site] = Cached(y, step.grid, step.branches)
            return y

        around.leaves_layers_alone = True  # type: ignore[attr-defined]
        return around

    def _reduced(self, context: ScaleContext, reduction: LowRank, site: Site, x: Tensor, run: SiteFn) -> Tensor:
        step, noise = context.step, context.noise
        tokens = x.shape[1]
        rank = reduction.ranks[site.index if reduction.site == "chunk" else 0]
        if reduction.projection == "top":
            index = highest(squared_norms(x), rank)
        else:
            index = draw_indices(x, rank, noise.site_uniform("index", site, (tokens,)))
        if reduction.projection == "gaussian":
            small = project(x, noise.site_normal("projection", site, (tokens, rank)))
        else:
            small = gather_rows(x, index)
        if reduction.rope == "first":
            positions = torch.arange(rank, device=x.device)
        else:
            positions = index
        y = run(small, positions)
        cached = context.state.get(site)
        if cached is None:
            raise ValueError(
                f"scale {step.scale} restores {site.kind} {site.index} but no earlier scale ran it in full"
            )
        return restore(y, index, cached.resized(step.grid, step.branches))
