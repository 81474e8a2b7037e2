"""FastVAR: cached token pruning. Each sublayer runs on its pivotal tokens, the others reuse an earlier scale's output.

At a pruned scale every self-attention, cross-attention and feed-forward of the pruned layers scores the tokens of its
own input by their squared distance to the mean token, runs on the `kept` highest, and gives the others its own branch
output from the cache scale, area-resized. Layers outside the range, the embeddings and the head see all tokens.

Source: FastVAR (arXiv 2503.23367), csguoh/FastVAR, FastVAR/Infinity (facts). Differs: pruned, skipped and cached
scales come from the schedule by position, so any aspect ratio works (the reference tests grid widths and a token count
of 576); any batch, with or without guidance; caches belong to the generation, so none leaks from one image to the next;
only the pruned layers are cached.
"""

from __future__ import annotations

from torch import Tensor

from stagevar.accelerators.base import SUBLAYERS, Accelerator, Cached, ScaleContext
from stagevar.accelerators.stagevar import gather_rows, highest, restore, squared_norms
from stagevar.models.base import Around, Site, SiteFn, around_nothing
from stagevar.schedule import Pivotal


def pivotal_indices(x_RLC: Tensor, kept: int) -> Tensor:
    """Positions (R, kept) of the tokens furthest from the row's mean token, furthest first, ties by position."""
    deviation_RLC = x_RLC.float() - x_RLC.float().mean(dim=1, keepdim=True)
    return highest(squared_norms(deviation_RLC), kept)


class FastVAR(Accelerator):
    """Prunes the sublayers of Pivotal steps and keeps the outputs of the scale that they restore from."""

    name = "fastvar"

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        step, reduction = context.step, context.step.reduction
        if reduction is not None and not isinstance(reduction, Pivotal):
            raise ValueError(f"scale {step.scale}: FastVAR cannot apply {type(reduction).__name__}")
        if reduction is None and step.keeps is None:
            return around_nothing
        pruned = range(*reduction.layers) if reduction is not None else range(0)
        kept = range(*step.keeps) if step.keeps is not None else range(0)

        def around(site: Site, x_RLC: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
            if site.kind not in SUBLAYERS:
                return around_nothing(site, x_RLC, positions, run)
            if reduction is not None and site.index in pruned:
                return self._pruned(context, reduction, site, x_RLC, run)
            y_RLC = run(x_RLC, positions)
            if site.index in kept:
                updates[site] = Cached(y_RLC, step.grid, step.branches)
            return y_RLC

        return around

    def _pruned(self, context: ScaleContext, reduction: Pivotal, site: Site, x_RLC: Tensor, run: SiteFn) -> Tensor:
        step = context.step
        cached = context.state.get(site)
        if cached is None:
            raise ValueError(
                f"scale {step.scale} prunes {site.kind} {site.index}, but scale {reduction.cache_scale} did not keep it"
            )
        index_Rk = pivotal_indices(x_RLC, reduction.kept)
        y_RkC = run(gather_rows(x_RLC, index_Rk), index_Rk)
        return restore(y_RkC, index_Rk, cached.resized(step.grid, step.branches))
