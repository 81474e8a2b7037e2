"""The interface of accelerators: what may happen around a site, with run state as a value.

An accelerator acts at four places only: run or skip a scale, drop a branch (both are in the ScaleStep and belong to the
sampler), reduce the tokens before a site, restore them after it (here). Its state is a mapping from site to tensor that is
never changed in place: the sampler keeps one per scale, so rewinding means forgetting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from stagevar.models.base import Around, Grid, LoadedModel, Site
from stagevar.schedule import Branch, Decision, ScaleStep, Steps
from stagevar.tensors.noise import ScaleNoise

#: Kinds of site inside a layer; the others, chunk and trunk, wrap whole layers.
SUBLAYERS = frozenset({"attn", "cross", "mlp"})


@dataclass(frozen=True)
class Cached:
    """A full-grid output kept for later scales: y (R, h*w, C) of these branches."""

    y_RLC: Tensor
    grid: Grid
    branches: tuple[Branch, ...]

    def rows(self, branches: tuple[Branch, ...]) -> Tensor:
        """Rows of the branches that still run."""
        if branches == self.branches:
            return self.y_RLC
        batch = self.y_RLC.shape[0] // len(self.branches)
        first = self.branches.index(branches[0])
        return self.y_RLC[first * batch : (first + len(branches)) * batch]

    def select(self, rows: Sequence[int]) -> Cached:
        """The rows of these images of the batch, all branches; a copy."""
        batch = self.y_RLC.shape[0] // len(self.branches)
        chosen = [branch * batch + row for branch in range(len(self.branches)) for row in rows]
        return Cached(self.y_RLC[chosen], self.grid, self.branches)

    def resized(self, grid: Grid, branches: tuple[Branch, ...]) -> Tensor:
        """(R, h*w, C) on another grid by adaptive average pooling ('area')."""
        y_RLC = self.rows(branches)
        if grid == self.grid:
            return y_RLC
        y_RChw = y_RLC.transpose(1, 2).unflatten(2, self.grid)
        return F.adaptive_avg_pool2d(y_RChw, grid).flatten(2).transpose(1, 2)


State = Mapping[Site, Cached]


@dataclass(frozen=True)
class ScaleContext:
    """What an accelerator may know at a scale: the step, its randomness and the state after the last run scale."""

    step: ScaleStep
    noise: ScaleNoise
    state: State


class Accelerator(ABC):
    """Builds the `around` hook of one scale and, if the method has one, takes the schedule's decision."""

    name: ClassVar[str]

    @abstractmethod
    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        """The hook for this scale. Whatever later scales need is put into `updates`."""

    def keeps(self, site: Site, later: Steps) -> bool:
        """Whether these later steps can use a full output of this site; in deployment, unusable outputs are freed."""
        return True

    def check(self, model: LoadedModel, decision: Decision) -> None:
        """Checks that this accelerator can take the decision on this model, and raises an error if not."""
        raise ValueError(f"the {self.name} accelerator takes no decisions")

    def decide(self, model: LoadedModel, decision: Decision, before_BdHW: Tensor, after_BdHW: Tensor) -> Sequence[str]:
        """One of `decision.outcomes` per image, from the code sums before and after the scale it follows."""
        raise ValueError(f"the {self.name} accelerator takes no decisions")
