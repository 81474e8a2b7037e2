"""All methods at once: each step is carried out by the accelerator that it names, so a schedule alone is enough to run.

One schedule may mix methods over its scales: drop a branch, then prune, then project, then skip. What each method needs
from earlier scales is kept no matter which method ran them, provided that they ran in full at that site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from stagevar.accelerators.base import SUBLAYERS, Accelerator, Cached, ScaleContext
from stagevar.accelerators.fastvar import FastVAR
from stagevar.accelerators.plugged import plugged
from stagevar.accelerators.skipvar import SkipVAR
from stagevar.accelerators.stagevar import StageVAR
from stagevar.models.base import Around, LoadedModel, Site, SiteFn, around_nothing, leaves_layers_alone
from stagevar.schedule import Decision, LowRank, Pivotal, Plugged, Steps


class Composite(Accelerator):
    """StageVAR at chunks and trunk, FastVAR or a plug-in at sublayers, SkipVAR at the decision.

    Args:
        plugged: accelerators by the names that steps use; other names are looked up among installed packages.
    """

    name = "composite"

    def __init__(self, plugged: Mapping[str, Accelerator] | None = None) -> None:
        self.stagevar, self.fastvar, self.skipvar = StageVAR(), FastVAR(), SkipVAR()
        self._plugged = dict(plugged or {})

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        wide = self.stagevar.around(_without(context, Pivotal), updates)
        narrow = self._narrow(_without(context, LowRank), updates)

        def around(site: Site, x_RLC: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
            return (narrow if site.kind in SUBLAYERS else wide)(site, x_RLC, positions, run)

        around.leaves_layers_alone = leaves_layers_alone(narrow)  # type: ignore[attr-defined]
        return around

    def _narrow(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        reduction = context.step.reduction
        if not isinstance(reduction, Plugged):
            return self.fastvar.around(context, updates)
        name, layers = reduction.accelerator, range(*reduction.layers)
        if name not in self._plugged:
            self._plugged[name] = plugged(name)
        hook = self._plugged[name].around(context, updates)

        def around(site: Site, x_RLC: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
            return (hook if site.index in layers else around_nothing)(site, x_RLC, positions, run)

        return around

    def keeps(self, site: Site, later: Steps) -> bool:
        kind = Pivotal if site.kind in SUBLAYERS else LowRank
        reductions = [step.reduction for step in later if isinstance(step.reduction, kind)]
        return any(isinstance(r, Pivotal) or r.site == site.kind for r in reductions)

    def check(self, model: LoadedModel, decision: Decision) -> None:
        self.skipvar.check(model, decision)

    def decide(self, model: LoadedModel, decision: Decision, before_BdHW: Tensor, after_BdHW: Tensor) -> Sequence[str]:
        return self.skipvar.decide(model, decision, before_BdHW, after_BdHW)


def _without(context: ScaleContext, kind: type) -> ScaleContext:
    """The same scale as one method sees it: without the other's reduction."""
    if not isinstance(context.step.reduction, kind):
        return context
    return dataclasses.replace(context, step=dataclasses.replace(context.step, reduction=None))
