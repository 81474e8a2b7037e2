"""What every model family must satisfy under the one sampler and all accelerators, as a class to inherit.

A family's tests give a tiny random `model` and the same forward pass without a cache; the rest is here.

    class TestMine(ModelContract):
        prompts = ("a cat", "a dog", "two birds")

        @pytest.fixture(scope="class")
        def model(self):
            return my_family(depth=4)

        def uncached_logits(self, model, x_RLC, conditioning):
            ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from stagevar.accelerators import Exact
from stagevar.models.base import LoadedModel
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, PROJECTIONS, LowRank, Pivotal, StageSchedule, Steps, exact
from stagevar.testing.recorder import SEEDS, Recorder, largest_difference


def fused_and_plain(model: LoadedModel, prompts: Sequence[str], fuse_layer: int) -> tuple[Recorder, Recorder]:
    """A schedule that fuses the branches at the second to last scale, and what it must equal on the same tokens.

    The plain run keeps both branches at that scale, mixes their streams after the preceding layer (Infinity's inner
    guidance, which has goldens) and reads the conditional rows; the last scale runs those alone.
    """
    grids = model.grids
    at = len(grids) - 2
    chunks = len(model.transformer.chunk_layers)
    fused = Recorder(model)
    steps = StageSchedule(at, cfg_delay=0, branch="cond", fuse_layer=fuse_layer).expand(grids, chunks)
    fused.run(steps, prompts)
    plain = Recorder(model, forced=fused.tokens)
    generation = plain.begin(prompts, SEEDS)
    for step in StageSchedule(at + 1, cfg_delay=0, branch="cond").expand(grids, chunks):
        layers = (fuse_layer - 1,) if step.scale == at else ()
        generation.sampling = dataclasses.replace(
            model.sampling, inner_guidance_layers=layers, logits_guidance=not layers
        )
        plain.advance(generation, step)
    return fused, plain


def masked_attend(sizes: list[int]):
    """An uncached `Attend` over all scales at once, in which a token sees its own scale and earlier ones."""
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    visible = levels[:, None] >= levels[None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)

    return attend


class ModelContract:
    """Inherit, give the fixture `model` and `uncached_logits`, and name three prompts that the model understands."""

    prompts: tuple[str, ...]

    def uncached_logits(self, model: LoadedModel, x_RLC: Tensor, conditioning) -> Tensor:
        """Unguided logits (R, L_total, V) of all scales at once, from the trunk inputs of all scales."""
        raise NotImplementedError

    @staticmethod
    def full(model: LoadedModel) -> Steps:
        return exact(len(model.grids)).expand(model.grids, len(model.transformer.chunk_layers))

    @staticmethod
    def expand(model: LoadedModel, *args, **parameters) -> Steps:
        schedule = StageSchedule(*args, **parameters)
        return schedule.expand(model.grids, len(model.transformer.chunk_layers))

    def staged(self, model: LoadedModel) -> Steps:
        """Both branches reduced at one scale, then one branch reduced further."""
        return self.expand(model, 2, cfg_delay=1, rank_ratios=(0.6, 0.3), projection="rows", rope="index")

    def pruned(self, model: LoadedModel) -> Steps:
        """FastVAR in every layer of the last two scales, guided."""
        layers = (0, model.transformer.depth)
        return self.expand(model, 2, accelerator="fastvar", rank_ratios=(0.6, 0.5), layers=layers)

    # ------------------------------------------------------------------------------------------------ caching

    @torch.inference_mode()
    def test_cached_equals_uncached_at_every_scale(self, model):
        sampler = Recorder(model)
        generation = sampler.run(self.full(model), self.prompts)
        residual, transformer = model.tokenizer.residual, model.transformer
        conditioning = transformer.condition(model.text.encode(self.prompts))
        inputs = [
            transformer.embed(
                None if s == 0 else residual.next_input(generation.code_sum_before(s), s), s, conditioning
            )
            for s in range(len(model.grids))
        ]
        logits = self.uncached_logits(model, torch.cat(inputs, dim=1), conditioning)
        for scale, both in enumerate(logits.split([h * w for h, w in model.grids], dim=1)):
            cond, uncond = both.chunk(2)
            mixed = uncond + model.sampling.guidance[scale] * (cond - uncond)
            assert (sampler.logits[scale] - mixed).abs().max() < 1e-4

    @pytest.mark.parametrize("name", ["full", "staged", "pruned"])
    def test_rewind_then_replay_is_a_straight_run(self, model, name):
        steps = getattr(self, name)(model)
        sampler = Recorder(model)
        straight = sampler.run(steps, self.prompts).code_sum_BdHW.clone()
        image = sampler.decode(sampler._current)
        generation = sampler.run(steps, self.prompts)
        for scale in (0, 1, len(steps) - 1):
            sampler.rewind(generation, scale)
            # Something else happens in between and writes over the cache.
            for step in self.expand(model, 1, cfg_delay=0, rank_ratios=(0.9,))[scale:]:
                sampler.advance(generation, step)
            sampler.rewind(generation, scale)
            for step in steps[scale:]:
                sampler.advance(generation, step)
            assert torch.equal(generation.code_sum_BdHW, straight)
            assert np.array_equal(sampler.decode(generation), image)

    @torch.inference_mode()
    @pytest.mark.parametrize("branch", BOTH)
    def test_a_dropped_branch_is_neither_read_nor_written(self, model, branch):
        steps = self.expand(model, 2, cfg_delay=0, branch=branch, rank_ratios=(0.5,))
        dropped = "uncond" if branch == "cond" else "cond"
        sampler = Recorder(model)
        clean = sampler.run(steps, self.prompts).code_sum_BdHW.clone()
        generation = sampler.run(steps[:2], self.prompts)
        for tensor in generation.cache._store[dropped]:
            tensor.fill_(float("nan"))
        lengths = generation.cache.lengths[BOTH.index(dropped)]
        for step in steps[2:]:
            sampler.advance(generation, step)
        assert torch.equal(generation.code_sum_BdHW, clean)
        assert all(tensor.isnan().all() for tensor in generation.cache._store[dropped])
        assert generation.cache.lengths[BOTH.index(dropped)] == lengths

    # ------------------------------------------------------------------------------------------------ batches

    @pytest.mark.parametrize("name", ["full", "staged", "pruned"])
    def test_batch_row_equals_single_prompt(self, model, name):
        steps = getattr(self, name)(model)
        batch = Recorder(model)
        batch.run(steps, self.prompts)
        for row, (prompt, seed) in enumerate(zip(self.prompts, SEEDS, strict=True)):
            single = Recorder(model, forced={s: t[row : row + 1] for s, t in batch.tokens.items()})
            single.run(steps, [prompt], [seed])
            assert largest_difference(single.logits, {s: x[row : row + 1] for s, x in batch.logits.items()}) < 1e-4

    def test_split_rows_go_on_as_they_would_have(self, model):
        steps = self.staged(model)
        batch = Recorder(model)
        batch.run(steps, self.prompts)
        start = Recorder(model)
        generation = start.run(steps[:2], self.prompts)
        rows = [2, 0]
        part = start.split(generation, rows)
        start.forced = {s: t[rows] for s, t in batch.tokens.items()}
        for step in steps[2:]:
            start.advance(part, step)
            wanted = batch.logits[step.scale][rows]
            assert (start.logits[step.scale] - wanted).abs().max() < 1e-4

    def test_same_prompt_same_image_in_any_batch(self, model):
        sampler = Sampler(model)
        together = sampler.generate(self.prompts, SEEDS, self.full(model))
        turned = sampler.generate(self.prompts[::-1], SEEDS[::-1], self.full(model))
        assert np.array_equal(together, turned[::-1])

    # ------------------------------------------------------------------------------------------------ accelerators

    @pytest.mark.parametrize("branches", [BOTH, ("cond",), ("uncond",)], ids=["both", "cond", "uncond"])
    @pytest.mark.parametrize("site", ["chunk", "trunk", "sublayers"])
    def test_keeping_all_tokens_is_exact(self, model, site, branches):
        """Row selection of every token, in drawn order, and FastVAR with nothing pruned change nothing but rounding."""
        last = len(model.grids) - 1
        layers = (0, model.transformer.depth)
        plain = list(self.full(model))
        plain[last] = dataclasses.replace(plain[last], branches=branches)

        def reduced(kept: int) -> Steps:
            steps = list(plain)
            if site == "sublayers":
                steps[last - 1] = dataclasses.replace(steps[last - 1], keeps=layers)
                steps[last] = dataclasses.replace(steps[last], reduction=Pivotal(kept, layers, last - 1))
            else:
                ranks = (kept,) * (len(model.transformer.chunk_layers) if site == "chunk" else 1)
                steps[last] = dataclasses.replace(steps[last], reduction=LowRank(ranks, "rows", "index", site))
            return tuple(steps)

        full = Recorder(model, Exact())
        full.run(tuple(plain), self.prompts)
        tokens = plain[last].tokens
        neutral = Recorder(model, forced=full.tokens)
        neutral.run(reduced(tokens), self.prompts)
        assert largest_difference(neutral.logits, full.logits) < 1e-4
        # The path was really taken: the same steps with fewer tokens differ.
        fewer = Recorder(model, forced=full.tokens)
        fewer.run(reduced(tokens // 2), self.prompts)
        assert (fewer.logits[last] - full.logits[last]).abs().max() > 1e-3

    @pytest.mark.parametrize("projection", PROJECTIONS)
    @pytest.mark.parametrize("rope", ["first", "index"])
    @pytest.mark.parametrize("site", ["chunk", "trunk"])
    def test_every_reduction_runs_with_and_without_guidance(self, model, projection, rope, site):
        options = {"rank_ratios": (0.4,), "projection": projection, "rope": rope, "site": site}
        steps = self.expand(model, 2, cfg_delay=1, **options)
        assert [len(s.branches) for s in steps[2:4]] == [2, 1] and steps[2].reduction and steps[3].reduction
        sampler = Recorder(model)
        generation = sampler.run(steps, self.prompts)
        assert all(logits.isfinite().all() for logits in sampler.logits.values())
        kept = steps[2].tokens + steps[3].tokens
        kept += model.transformer.prefix_tokens
        assert generation.cache.lengths[1][0] < sum(s.tokens for s in steps[:2]) + kept
        assert len(np.unique(sampler.decode(generation))) > 1

    def test_schedules_that_agree_up_to_a_scale_have_equal_code_sums(self, model):
        sampler = Recorder(model)
        sums = {}
        for structure_end in (1, 2, 3):
            generation = sampler.run(self.expand(model, structure_end, cfg_delay=0, rank_ratios=(0.4,)), self.prompts)
            sums[structure_end] = [generation.code_sum_before(s).clone() for s in range(len(model.grids))]
        assert torch.equal(sums[1][1], sums[3][1]) and torch.equal(sums[2][2], sums[3][2])
        assert not torch.equal(sums[1][2], sums[3][2])

    # ------------------------------------------------------------------------------------------------ guidance

    def test_fusing_is_inner_guidance_without_the_rows_that_nobody_reads(self, model):
        for fuse_layer in range(1, model.transformer.depth):
            fused, plain = fused_and_plain(model, self.prompts, fuse_layer)
            assert largest_difference(fused.logits, plain.logits) < 1e-4, fuse_layer

    def test_guidance_is_the_stated_mix_and_inner_guidance_counts(self, model):
        full = self.full(model)
        both = Recorder(model)
        both.run(full, self.prompts)
        off = dataclasses.replace(model.sampling, guidance=(1.0,) * len(full))
        cond = Recorder(model, forced=both.tokens)
        cond.run(full, self.prompts, sampling=off)
        twice = dataclasses.replace(model.sampling, guidance=tuple(2 * s - 1 for s in model.sampling.guidance))
        doubled = Recorder(model, forced=both.tokens)
        doubled.run(full, self.prompts, sampling=twice)
        # c + (s - 1)(c - u): twice the strength is twice the distance from the conditional logits.
        for scale in both.logits:
            once, far = both.logits[scale] - cond.logits[scale], doubled.logits[scale] - cond.logits[scale]
            assert (far - 2 * once).abs().max() < 2e-4
        assert (both.logits[3] - cond.logits[3]).abs().max() > 1e-2
        inner = Recorder(model, forced=both.tokens)
        mixed = dataclasses.replace(model.sampling, logits_guidance=False, inner_guidance_layers=(-2,))
        inner.run(full, self.prompts, sampling=mixed)
        assert (inner.logits[3] - both.logits[3]).abs().max() > 1e-3
        assert (inner.logits[3] - cond.logits[3]).abs().max() > 1e-3
