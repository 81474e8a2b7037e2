"""A sampler that keeps the logits and tokens of every scale, and can be forced to draw given tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stagevar.models.base import LoadedModel
from stagevar.sampling.generation import Generation
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import ScaleStep, Steps

SEEDS = (3, 4, 5)


class Recorder(Sampler):
    """Keeps guided logits and tokens per scale; `forced` replaces the drawn tokens in place (teacher forcing)."""

    def __init__(self, model: LoadedModel, accelerator=None, forced: dict[int, Tensor] | None = None):
        super().__init__(model, accelerator)
        self.logits: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}
        self.forced = forced

    def on_scale(self, step: ScaleStep, logits_BLV: Tensor, tokens: Tensor) -> None:
        self.logits[step.scale] = logits_BLV
        if self.forced is not None:
            tokens.copy_(self.forced[step.scale])
        self.tokens[step.scale] = tokens.clone()

    def run(self, steps: Steps, prompts: Sequence[str], seeds: Sequence[int] = SEEDS, **options) -> Generation:
        generation = self.begin(prompts, seeds, **options)
        for step in steps:
            self.advance(generation, step)
        return generation


def largest_difference(a: dict[int, Tensor], b: dict[int, Tensor]) -> float:
    """Over all scales; both must have run the same ones."""
    assert a.keys() == b.keys()
    return max(float((a[scale] - b[scale]).abs().max()) for scale in a)
