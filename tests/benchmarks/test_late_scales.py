"""Several scales in one forward against the same scales one after the other."""

import torch

from benchmarks.late_scales import Together, candidates
from stagevar.schedule import StageSchedule
from stagevar.testing.recorder import SEEDS, Recorder
from stagevar.testing.tiny import GRIDS, tiny_infinity

PROMPTS = ["a red ring", "two blue stars", "a cross"]


class Stale(Recorder):
    """The plain way: scales 3 and 4 one after the other, both reading what was there before scale 3."""

    def _run(self, generation, cache, step, before):
        if step.scale <= 3:
            return super()._run(generation, cache, step, before)
        residual, stale = self.model.tokenizer.residual, generation.code_sum_before(3)
        fresh = residual.next_input
        residual.next_input = lambda _, scale: fresh(stale, scale)
        try:
            return super()._run(generation, cache, step, before)
        finally:
            residual.next_input = fresh


def test_one_forward_is_the_scales_in_turn_on_the_same_input():
    model = tiny_infinity()
    for first in (3, 5):  # conditional from scale 3, and with guidance throughout
        steps = StageSchedule(first, cfg_delay=0 if first == 3 else None, branch="cond").expand(GRIDS, 2)
        plain = Stale(model)
        generation = plain.run(steps, PROMPTS)
        lengths = generation.cache.lengths
        sampler = Together(model, (3, 4))
        together = sampler.begin(PROMPTS, SEEDS)
        sampler.finish(together, steps)
        assert together.cache.lengths == lengths
        assert torch.equal(together.code_sum_BdHW, generation.code_sum_BdHW)
        ordinary = Recorder(model).run(steps, PROMPTS)
        assert not torch.equal(ordinary.code_sum_BdHW, generation.code_sum_BdHW), "knowing the scale before matters"


def test_candidates_say_what_they_do():
    model = tiny_infinity(((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6)))
    schedules, samplers = candidates(model)
    assert samplers.keys() <= schedules.keys()
    expanded = {name: schedule.expand(model.grids, 2) for name, schedule in schedules.items()}
    assert expanded["fused at 4, layer 3"][4].fuse_layer == 3
    assert [s.skipped for s in expanded["without 4, conditional from 5"]] == [False] * 4 + [True, False]
