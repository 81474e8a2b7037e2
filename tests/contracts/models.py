"""The published contract of model families, and what their engines ask of them beyond it."""

import numpy as np
import pytest
import torch

from stagevar.sampling.sampler import Sampler
from stagevar.testing import models
from tests.fakes.cuda import CUDA, NoWaiting, begin_on_fake_cuda, fake_mode
from tests.stagevar.engine.test_graph import graph_sampler


class ModelContract(models.ModelContract):
    """As stagevar.testing.models; besides, every scale can be recorded as a graph."""

    @pytest.mark.parametrize("name", ["full", "staged", "pruned"])
    def test_recorded_steps_replay_as_the_eager_ones(self, model, name):
        """Nothing in a scale depends on the values of tensors, so what was recorded for one batch serves the next."""
        steps = getattr(self, name)(model)
        recorded, engine = graph_sampler(model)
        eager = Sampler(model)
        for prompts, seeds in ((self.prompts[:2], (1, 2)), (self.prompts[1:], (7, 8))):
            wanted = eager.generate(prompts, seeds, steps)
            assert np.array_equal(recorded.generate(prompts, seeds, steps), wanted)
        assert (engine.recorded, engine.replayed) == (len(steps), 2 * len(steps))

    @pytest.mark.parametrize("name", ["full", "staged", "pruned"])
    def test_a_scale_never_waits_for_the_device(self, model, name):
        """No value is read, no size depends on one, nothing is copied between host and card: what a graph needs."""
        steps = getattr(self, name)(model)
        with fake_mode(), torch.inference_mode():
            sampler, generation = begin_on_fake_cuda(model, self.prompts[:2], steps)
            for step in steps:
                with NoWaiting() as seen:
                    sampler.advance(generation, step)
                assert seen.kernels > 0
            assert generation.code_sum_BdHW.device == CUDA
