"""What happens at one scale, fully decided, hashable and free of torch: what a sampler runs and a latency table keys on.

Source: StageVAR (arXiv 2512.16483) for low ranks and the branch that is dropped; FastVAR (arXiv 2503.23367) for pivotal tokens;
SkipVAR (arXiv 2506.08908) for decisions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from stagevar.schedule.grids import Grid

Branch = Literal["cond", "uncond"]
BOTH: tuple[Branch, ...] = ("cond", "uncond")


@dataclass(frozen=True)
class LowRank:
    """Random projection of the token axis and representative token restoration.

    Attributes:
        ranks: one per chunk (site "chunk") or a single one (site "trunk").
        projection: "gaussian" mixes tokens, "rows" keeps the drawn ones, "top" keeps those with the largest norm and
            draws nothing.
        rope: rotary positions of the r tokens: the scale's "first" r, or their own ("index").
        site: where tokens are reduced, "chunk" or "trunk".
    """

    ranks: tuple[int, ...]
    projection: str = "gaussian"
    rope: str = "first"
    site: str = "chunk"


@dataclass(frozen=True)
class Pivotal:
    """FastVAR's cached token pruning: each sublayer of these layers runs on its `kept` most deviating tokens.

    The pruned tokens take the branch output of scale `cache_scale`, area-resized. Layers are [first, stop); a stop
    beyond the model's depth means its last layer.
    """

    kept: int
    layers: tuple[int, int]
    cache_scale: int


@dataclass(frozen=True)
class Plugged(Pivotal):
    """The same places and tokens, reduced by the accelerator that an installed package offers under this name."""

    accelerator: str = ""


Reduction = LowRank | Pivotal


@dataclass(frozen=True)
class Decision:
    """Each image's continuation is chosen after this scale, from its partial images before and after the scale.

    Attributes:
        rule: name of a packaged classifier, or path of a refitted one.
        outcomes: (name, steps of all later scales) pairs. The first is the fullest, and is what the schedule states for
            those scales.
    """

    rule: str
    outcomes: tuple[tuple[str, tuple[ScaleStep, ...]], ...]

    def continuation(self, outcome: str) -> tuple[ScaleStep, ...]:
        """Steps of one outcome. Raises KeyError for an unknown name."""
        return dict(self.outcomes)[outcome]


@dataclass(frozen=True)
class ScaleStep:
    """What happens at one scale, fully decided and hashable.

    Attributes:
        stage: a label; steps that differ only in it are equal.
        keeps: layers [first, stop) whose sublayer outputs a later Pivotal step restores from.
        decision: set if the continuation after this scale is chosen per image.
        precision: of the blocks' matrix products.
        fuse_layer: if above 0, layers [0, fuse_layer) run both branches, then guidance mixes their streams, and the
            other layers and the head run the conditional rows alone.
    """

    scale: int
    grid: Grid
    branches: tuple[Branch, ...] = BOTH
    reduction: Reduction | None = None
    skipped: bool = False
    stage: str = field(default="fidelity", compare=False)
    keeps: tuple[int, int] | None = None
    decision: Decision | None = None
    precision: str = "model"
    fuse_layer: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the full grid."""
        return self.grid[0] * self.grid[1]

    @property
    def rest(self) -> ScaleStep:
        """The step after its fusing layer: the conditional branch alone."""
        return dataclasses.replace(self, branches=BOTH[:1], fuse_layer=0)

    def branches_at(self, layer: int) -> tuple[Branch, ...]:
        """The branches that a layer runs."""
        return self.rest.branches if 0 < self.fuse_layer <= layer else self.branches

    def processed_tokens(self, chunks: int = 1) -> float:
        """Token rows that enter the trunk, averaged over chunks: the cost proxy if nothing was measured."""
        if self.skipped:
            return 0.0
        tokens: float = self.tokens
        if isinstance(self.reduction, LowRank):
            tokens = sum(self.reduction.ranks) / len(self.reduction.ranks)
        elif isinstance(self.reduction, Pivotal):
            tokens = self.reduction.kept
        return tokens * len(self.branches)


Steps = tuple[ScaleStep, ...]
