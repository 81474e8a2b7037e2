"""One batch on its way through the scales: what is kept per scale, so that rewinding costs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stagevar.accelerators.base import Accelerator, Cached, State
from stagevar.engine import Start
from stagevar.models.base import Sampling, Site
from stagevar.schedule import BOTH, Branch, ScaleStep, Steps
from stagevar.tensors.cache import HeadsIntoCache, KVCache, Lengths


@dataclass(frozen=True)
class SavedScale:
    """The whole state of a generation before a scale runs, except for the cache contents."""

    code_sum_BdHW: Tensor
    state: State
    lengths: Lengths
    branches: tuple[Branch, ...]


class Updates(dict[Site, Cached]):
    """What a scale keeps for later ones; with planned schedules only what the accelerator can still use."""

    def __init__(self, accelerator: Accelerator, later: Sequence[Steps] | None):
        super().__init__()
        self.accelerator, self.later = accelerator, later

    def wanted(self, site: Site) -> bool:
        if self.later is None:
            return True
        return any(bool(steps) and self.accelerator.keeps(site, steps) for steps in self.later)

    def __setitem__(self, site: Site, cached: Cached) -> None:
        if self.wanted(site):
            super().__setitem__(site, cached)


class CachedAttention:
    """What a scale's layers attend with: `stagevar.models.base.Attend`, and the same from the qkv product's output."""

    def __init__(self, cache: KVCache, step: ScaleStep):
        self._cache, self._step = cache, step

    @property
    def takes_products(self) -> bool:
        """Whether `heads` can be called: entries in 8 bits are made of finished keys and values."""
        return not self._cache.eight_bit

    def __call__(self, layer: int, q_RHLc: Tensor, k_RHLc: Tensor, v_RHLc: Tensor, scale: float) -> Tensor:
        return self._cache.attend(self._step.branches_at(layer), layer, q_RHLc, k_RHLc, v_RHLc, scale)

    def heads(
        self, layer: int, qkv_RL3C: Tensor, factor_H: Tensor, cos_sin: Tensor, write: HeadsIntoCache, scale: float
    ) -> Tensor:
        return self._cache.attend_heads(self._step.branches_at(layer), layer, qkv_RL3C, factor_H, cos_sin, write, scale)


ENDED = "this generation ended when the sampler began another one or was released"


class Generation:
    """One batch on its way through the scales. Made by `Sampler.begin`.

    Attributes:
        scale: index of the next scale.
        code_sum_BdHW: codes of all scales so far, at the final grid.
        steps: what was run.
        cache: the sampler's; released when the generation ends, so that no cache outlives its use by the sampler.
        live: False once the sampler began another generation or was released.
        outcomes: what the schedule's decision chose per image; None before it, or without one.
    """

    def __init__(
        self,
        start: Start,
        sampling: Sampling,
        batch: int,
        cache: KVCache,
        plans: Sequence[Steps] | None = None,
    ):
        self.conditioning, self.noise, self.resident = start.conditioning, start.noise, start.resident
        self.sampling, self.batch, self.plans = sampling, batch, plans
        self._cache: KVCache | None = cache
        self.live = True
        self.steps: list[ScaleStep] = []
        self.outcomes: tuple[str, ...] | None = None
        self._saved = [SavedScale(start.code_sum_BdHW, {}, cache.lengths, BOTH)]

    @property
    def cache(self) -> KVCache:
        """The sampler's KV cache.

        Raises:
            ValueError: if the generation has ended.
        """
        if self._cache is None:
            raise ValueError(ENDED)
        return self._cache

    def end(self) -> None:
        """Releases the cache and everything else that takes memory; the steps and code sums stay."""
        self.live, self._cache, self.resident = False, None, None
        self._saved = [dataclasses.replace(saved, state={}) for saved in self._saved]

    @property
    def scale(self) -> int:
        return len(self.steps)

    @property
    def code_sum_BdHW(self) -> Tensor:
        return self._saved[-1].code_sum_BdHW

    @property
    def state(self) -> State:
        """Accelerator state after the last run scale."""
        return self._saved[-1].state

    def code_sum_before(self, scale: int) -> Tensor:
        """The code sum as it was before `scale` ran."""
        return self._saved[scale].code_sum_BdHW

    def select(self, rows: list[int]) -> Generation:
        """A separate generation of some of this one's images, with its own copy of their cache."""
        both = [branch * self.batch + row for branch in range(len(BOTH)) for row in rows]
        part = Generation(
            Start(self.conditioning.select(both), self.noise.rows(rows), self.code_sum_BdHW[rows]),
            self.sampling,
            len(rows),
            self.cache.select(rows),
            self.plans,
        )
        part.steps = list(self.steps)
        if self.outcomes is not None:
            part.outcomes = tuple(self.outcomes[row] for row in rows)
        chosen: dict[int, Cached] = {}  # one tensor serves several scales; copy it once

        def choose(cached: Cached) -> Cached:
            if id(cached) not in chosen:
                chosen[id(cached)] = cached.select(rows)
            return chosen[id(cached)]

        part._saved = [
            SavedScale(
                saved.code_sum_BdHW[rows],
                {site: choose(cached) for site, cached in saved.state.items()},
                saved.lengths,
                saved.branches,
            )
            for saved in self._saved
        ]
        return part
