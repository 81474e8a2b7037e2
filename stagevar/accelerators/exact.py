"""No acceleration: every site runs on all tokens."""

from __future__ import annotations

from stagevar.accelerators.base import Accelerator, Cached, ScaleContext
from stagevar.models.base import Around, Site, around_nothing


class Exact(Accelerator):
    """The baseline. Steps with a reduction are refused: silently running them in full would falsify a comparison."""

    name = "exact"

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        if context.step.reduction is not None:
            raise ValueError(f"scale {context.step.scale} reduces tokens; the exact accelerator does not")
        return around_nothing
