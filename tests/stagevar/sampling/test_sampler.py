"""Contracts of the one loop and its cache."""

import dataclasses

import numpy as np
import pytest
import torch

from stagevar.accelerators import Exact
from stagevar.accelerators.stagevar import draw_indices, highest, project, squared_norms
from stagevar.errors import ScheduleError
from stagevar.models.base import Sampling
from stagevar.models.infinity.transformer import draw_bits
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, LowRank, StageSchedule, exact
from stagevar.tensors.cache import KVCache, step_lengths
from stagevar.tensors.noise import hash_words, key_tensor, uniform
from stagevar.testing.models import fused_and_plain
from stagevar.testing.recorder import largest_difference
from stagevar.testing.tiny import GRIDS, TinyText, tiny_infinity

PROMPTS, SEEDS = ["a red ring", "two blue stars", "a cross"], [3, 4, 5]
FULL = exact(len(GRIDS)).expand(GRIDS, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


class Recorder(Sampler):
    """Keeps the guided logits of every scale; `forced` replaces the drawn tokens in place (teacher forcing)."""

    def __init__(self, model, accelerator=None, forced=None):
        super().__init__(model, accelerator)
        self.logits, self.tokens, self.forced = {}, {}, forced

    def on_scale(self, step, logits_BLV, tokens):
        self.logits[step.scale] = logits_BLV
        if self.forced is not None:
            tokens.copy_(self.forced[step.scale])
        self.tokens[step.scale] = tokens.clone()

    def run(self, steps, prompts=PROMPTS, seeds=SEEDS, **options):
        generation = self.begin(prompts, seeds, **options)
        for step in steps:
            self.advance(generation, step)
        return generation


def low_rank(steps, scales, ranks, **options):
    """Steps with a low-rank reduction at these scales."""
    return tuple(
        dataclasses.replace(s, reduction=LowRank(ranks(s), **options)) if s.scale in scales else s for s in steps
    )


def test_cached_equals_uncached_at_every_scale(model):
    """Guidance off: the teacher-forced pass over all scales at once is the uncached computation."""
    plain = dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, guidance=(1.0,) * len(GRIDS)))
    sampler = Recorder(plain)
    generation = sampler.run(FULL)
    residual, transformer = model.tokenizer.residual, model.transformer
    features = torch.nn.utils.rnn.pad_sequence(TinyText().encode(PROMPTS), batch_first=True)
    lengths = torch.tensor([len(rows) for rows in TinyText().encode(PROMPTS)])
    mask = (torch.arange(features.shape[1]) < lengths[:, None])[:, None, None]
    inputs = [residual.next_input(generation.code_sum_before(s), s) for s in range(1, len(GRIDS))]
    with torch.inference_mode():
        uncached = transformer.forward_train(features, mask, inputs)
    cached = torch.cat([sampler.logits[s] for s in range(len(GRIDS))], dim=1)
    assert (cached - uncached).abs().max() < 1e-5


@pytest.mark.parametrize("projection", ["rows", "top"])
@pytest.mark.parametrize("site", ["chunk", "trunk"])
def test_row_selection_of_all_tokens_is_exact(model, site, projection):
    chunks = 2 if site == "chunk" else 1
    steps = low_rank(FULL, {3, 4}, lambda s: (s.tokens,) * chunks, projection=projection, rope="index", site=site)
    reduced, full = Recorder(model), Recorder(model, Exact())
    generation = full.run(FULL)
    reduced.forced = full.tokens
    assert torch.equal(reduced.run(steps).code_sum_BdHW, generation.code_sum_BdHW)
    for scale in range(len(GRIDS)):
        assert (reduced.logits[scale] - full.logits[scale]).abs().max() < 1e-5
    # The path was really taken: the same steps with fewer rows differ.
    fewer = Recorder(model, forced=full.tokens)
    fewer.run(
        low_rank(FULL, {3, 4}, lambda s: (s.tokens // 2,) * chunks, projection=projection, rope="index", site=site)
    )
    assert (fewer.logits[4] - full.logits[4]).abs().max() > 1e-3


def test_gaussian_projection_against_float64():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 16, generator=generator)
    q = torch.randn(3, 40, 9, generator=generator)
    exact64 = np.einsum("bmr,bmc->brc", q.double().numpy(), x.double().numpy()) / np.sqrt(9)
    assert np.abs(project(x, q).numpy() - exact64).max() < 1e-5


def test_index_draw_is_distinct_and_follows_the_norms():
    x = torch.ones(1, 4, 1) * torch.tensor([1.0, 2.0, 3.0, 0.0]).view(1, 4, 1)
    draws = uniform(key_tensor([(i, "") for i in range(20_000)]), 4, hash_words("index"))
    index = draw_indices(x.expand(20_000, -1, -1), 3, draws)
    assert (index.sort(dim=1).values == torch.tensor([0, 1, 2])).all(), "distinct, and norm 0 is never drawn"
    first = torch.bincount(index[:, 0], minlength=4) / 20_000
    assert (first - torch.tensor([1, 4, 9, 0]) / 14).abs().max() < 4 * 0.5 / 20_000**0.5


def test_the_largest_norms_come_first_and_ties_by_position():
    x = torch.tensor([[[1.0], [-3.0], [3.0], [2.0], [0.0]], [[5.0], [0.0], [0.0], [-6.0], [0.0]]])
    assert highest(squared_norms(x), 3).tolist() == [[1, 2, 3], [3, 0, 1]]


STAGED = StageSchedule(structure_end=3, cfg_delay=0, rank_ratios=(0.5, 0.2)).expand(GRIDS, 2)


@pytest.mark.parametrize("steps", [FULL, STAGED], ids=["full", "staged"])
@pytest.mark.parametrize("scale", [0, 2, 3, 4])
def test_rewind_then_replay_is_a_straight_run(model, steps, scale):
    sampler = Recorder(model)
    straight = sampler.run(steps).code_sum_BdHW.clone()
    image = sampler.decode(sampler._current)
    generation = sampler.run(steps)
    sampler.rewind(generation, scale)
    # Something else happens in between and writes over the cache.
    other = StageSchedule(structure_end=2, cfg_delay=0, rank_ratios=(0.9,)).expand(GRIDS, 2)
    for step in other[scale:]:
        sampler.advance(generation, step)
    sampler.rewind(generation, scale)
    for step in steps[scale:]:
        sampler.advance(generation, step)
    assert torch.equal(generation.code_sum_BdHW, straight)
    assert np.array_equal(sampler.decode(generation), image)


@pytest.mark.parametrize("steps", [FULL, STAGED], ids=["full", "staged"])
def test_batch_row_equals_single_prompt(model, steps):
    batch = Recorder(model)
    batch.run(steps)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        single = Recorder(model, forced={s: t[row : row + 1] for s, t in batch.tokens.items()})
        single.run(steps, [prompt], [seed])
        for scale in batch.logits:
            assert (single.logits[scale][0] - batch.logits[scale][row]).abs().max() < 1e-4


def test_schedules_that_agree_up_to_a_scale_have_equal_code_sums(model):
    sampler = Recorder(model)
    sums = {}
    for structure_end in (2, 3, 4):
        steps = StageSchedule(structure_end, cfg_delay=0, rank_ratios=(0.4,)).expand(GRIDS, 2)
        generation = sampler.run(steps)
        sums[structure_end] = [generation.code_sum_before(s) for s in range(len(GRIDS))] + [generation.code_sum_BdHW]
    for scale in range(3):
        assert torch.equal(sums[2][scale], sums[4][scale])
    for scale in range(4):
        assert torch.equal(sums[3][scale], sums[4][scale])
    assert not torch.equal(sums[2][3], sums[4][3])


@torch.inference_mode()
@pytest.mark.parametrize("branch", BOTH)
def test_dropped_branch_is_neither_read_nor_written(model, branch):
    steps = StageSchedule(structure_end=3, cfg_delay=0, branch=branch, rank_ratios=(0.5,)).expand(GRIDS, 2)
    dropped = "uncond" if branch == "cond" else "cond"
    sampler = Recorder(model)
    clean = sampler.run(steps).code_sum_BdHW.clone()
    generation = sampler.run(steps[:3])
    before = [generation.cache.storage(dropped, layer).clone() for layer in range(4)]
    for tensor in generation.cache._store[dropped]:  # also beyond the filled part
        tensor.fill_(float("nan"))
    lengths = generation.cache.lengths[BOTH.index(dropped)]
    for step in steps[3:]:
        sampler.advance(generation, step)
    assert torch.equal(generation.code_sum_BdHW, clean), "no NaN came through: the branch was not read"
    assert all(generation.cache.storage(dropped, layer).isnan().all() for layer in range(4)), "nor written"
    assert generation.cache.lengths[BOTH.index(dropped)] == lengths
    # Rewinding to before the cutoff finds the branch whole again.
    for layer, stored in enumerate(before):
        generation.cache.storage(dropped, layer).copy_(stored)
    sampler.rewind(generation, 3)
    for step in FULL[3:]:
        sampler.advance(generation, step)
    assert torch.equal(generation.code_sum_BdHW, sampler.run(FULL).code_sum_BdHW)


@pytest.mark.parametrize("fuse_layer", [1, 2, 3])
def test_fusing_is_inner_guidance_without_the_rows_that_nobody_reads(model, fuse_layer):
    """At the edge of a chunk and inside one."""
    fused, plain = fused_and_plain(model, PROMPTS, fuse_layer)
    assert largest_difference(fused.logits, plain.logits) < 1e-4


FUSED = StageSchedule(3, cfg_delay=0, branch="cond", fuse_layer=2).expand(GRIDS, 2)


def test_fusing_leaves_the_dropped_branch_whole_up_to_there(model):
    """Behind the fusing layer the cache of the dropped branch ends one scale earlier; rewinding finds everything."""
    sampler = Recorder(model)
    images = sampler.finish(sampler.begin(PROMPTS, SEEDS), FULL)
    generation = sampler.run(FUSED)
    cond, uncond = generation.cache.lengths
    assert cond == (1 + 4 + 9 + 16 + 36,) * 4
    assert uncond == (1 + 4 + 9 + 16,) * 2 + (1 + 4 + 9,) * 2
    assert uncond == tuple(step_lengths(FUSED, model.transformer.chunk_layers)["uncond"])
    sampler.rewind(generation, 4)
    with pytest.raises(ValueError, match="scale 4 needs the uncond branch, which an earlier scale dropped"):
        sampler.advance(generation, FULL[4])
    sampler.rewind(generation, 3)
    assert np.array_equal(sampler.finish(generation, FULL), images)


def test_fusing_that_a_model_cannot_do_is_refused(model):
    sampler = Sampler(model)
    deep = StageSchedule(3, cfg_delay=0, branch="cond", fuse_layer=4).expand(GRIDS, 2)
    with pytest.raises(ScheduleError, match="fuse_layer 4 is beyond the 4 layers of tiny; use 0 to 3"):
        sampler.generate(PROMPTS, SEEDS, deep)
    mixing = dataclasses.replace(model.sampling, inner_guidance_layers=(1,), logits_guidance=False)
    with pytest.raises(ScheduleError, match=r"mix the branches again: this sampling mixes them after layers \[1\]"):
        sampler.generate(PROMPTS, SEEDS, FUSED, sampling=mixing)


def test_a_dropped_branch_cannot_come_back(model):
    sampler = Sampler(model)
    generation = sampler.begin(PROMPTS, SEEDS)
    for step in STAGED[:4]:
        sampler.advance(generation, step)
    with pytest.raises(ValueError, match="needs the cond branch"):
        sampler.advance(generation, FULL[4])


def test_deployment_cache_is_smaller_and_enough(model):
    sampler = Sampler(model)
    tuning = sampler.begin(PROMPTS, SEEDS).cache.memory_bytes
    image = sampler.generate(PROMPTS, SEEDS, STAGED)
    cache = sampler._current.cache
    assert cache.memory_bytes < tuning
    assert cache.lengths == tuple(cache.capacity[b] for b in BOTH), "every allocated entry is used"
    # cond is dropped before scale 3 and needs room for 1 + 4 + 9 tokens only.
    assert set(cache.capacity["cond"]) == {14}
    assert np.array_equal(image, sampler.generate(PROMPTS, SEEDS, STAGED))


def test_lengths_are_per_layer(model):
    steps = StageSchedule(structure_end=4, rank_ratios=((0.25, 0.5),)).expand(GRIDS, 2)
    assert steps[4].reduction.ranks == (10, 19)
    sampler = Recorder(model)
    generation = sampler.run(steps)
    before = 1 + 4 + 9 + 16
    assert generation.cache.lengths[0] == (before + 10, before + 10, before + 19, before + 19)
    assert step_lengths(steps, model.transformer.chunk_layers)["cond"] == list(generation.cache.lengths[0])


def test_cache_refuses_more_than_its_capacity():
    cache = KVCache(1, 2, 4, {"cond": [3], "uncond": [3]}, "cpu", torch.float32)
    kv = torch.zeros(1, 2, 4, 4)
    with pytest.raises(RuntimeError, match=r"3 entries.*cannot take entry 4"):
        cache.attend(("cond",), 0, kv, kv, kv, 1.0)


def test_decoding_gets_the_memory_of_the_cache_where_it_needs_it(model, monkeypatch):
    sampler = Sampler(model)
    wanted = sampler.generate(PROMPTS, SEEDS, STAGED)
    decode, caches = model.tokenizer.decode, []

    def scarce(code_sum):
        caches.append(len(sampler._caches))
        if sampler._caches:
            raise torch.OutOfMemoryError("no room beside the cache")
        return decode(code_sum)

    monkeypatch.setattr(model.tokenizer, "decode", scarce)
    assert np.array_equal(sampler.generate(PROMPTS, SEEDS, STAGED), wanted)
    assert caches == [1, 0]


def test_skipped_scales_leave_the_code_sum(model):
    steps = StageSchedule(structure_end=4, skip=(2, 4)).expand(GRIDS, 2)
    sampler = Recorder(model)
    generation = sampler.run(steps)
    assert sorted(sampler.logits) == [0, 1, 3]
    assert torch.equal(generation.code_sum_before(3), generation.code_sum_before(2))
    assert sampler.decode(generation).shape == (3, 24, 24, 3)


def test_only_the_latest_generation_is_live(model):
    sampler = Sampler(model)
    first = sampler.begin(PROMPTS, SEEDS)
    sampler.begin(PROMPTS, SEEDS)
    with pytest.raises(ValueError, match="ended"):
        sampler.advance(first, FULL[0])


def test_steps_must_follow(model):
    sampler = Sampler(model)
    generation = sampler.begin(PROMPTS, SEEDS)
    with pytest.raises(ValueError, match="does not follow 0 scales"):
        sampler.advance(generation, FULL[1])


def test_exact_accelerator_refuses_reduced_steps(model):
    sampler = Sampler(model, Exact())
    with pytest.raises(ValueError, match="exact accelerator does not"):
        sampler.generate(PROMPTS, SEEDS, STAGED)


def test_guidance_lists_negative_prompts_and_inner_guidance(model):
    """Each changes the result, and each is a fixed function of its arguments."""

    def codes(**options):
        sampler = Recorder(model)
        return sampler.run(FULL, **options).code_sum_BdHW

    base = codes()
    changed = {
        "list": dataclasses.replace(model.sampling, guidance=(3.0, 1.0, 2.0, 3.0, 4.0)),
        "temperature": dataclasses.replace(model.sampling, temperature=(0.5,) * 5),
        "inner": dataclasses.replace(model.sampling, logits_guidance=False, inner_guidance_layers=(-2,)),
    }
    for sampling in changed.values():
        assert not torch.equal(codes(sampling=sampling), base)
        assert torch.equal(codes(sampling=sampling), codes(sampling=sampling))
    assert not torch.equal(codes(negative=["blur", "noise", "text, letters"]), base)


def test_guidance_is_the_stated_mix(model):
    """logits = u + s(c - u), from two runs that see one branch each."""
    scale_one = {}
    forced = None
    for name, steps in {
        "both": FULL,
        "cond": StageSchedule(0, cfg_delay=0, branch="cond").expand(GRIDS, 2),
        "uncond": StageSchedule(0, cfg_delay=0, branch="uncond").expand(GRIDS, 2),
    }.items():
        sampler = Recorder(model, forced=forced)
        sampler.run(steps)
        forced = sampler.tokens
        scale_one[name] = sampler.logits[4]
    mixed = scale_one["uncond"] + 3.0 * (scale_one["cond"] - scale_one["uncond"])
    assert (scale_one["both"] - mixed).abs().max() < 1e-4


class _Draws:
    """Uniforms for 60,000 independent bits."""

    def uniform(self, purpose, shape):
        return uniform(key_tensor([(0, "")]), int(np.prod(shape)), hash_words("bits"))


@pytest.mark.parametrize("p", [0.01, 0.03, 0.031, 0.2, 0.5, 0.8, 0.985])
def test_bit_distribution_with_top_p(p):
    count = 60_000
    logit = float(np.log(p / (1 - p)))
    logits = torch.tensor([0.0, logit]).expand(1, count, 1, 2)
    minority = min(p, 1 - p)
    expected = p if minority > 0.03 else float(p > 0.5)
    share = draw_bits(logits, _Draws(), top_k=900, top_p=0.97).double().mean().item()
    if expected in (0.0, 1.0):
        assert share == expected
    else:
        assert abs(share - expected) < 4 * (p * (1 - p) / count) ** 0.5
    untouched = draw_bits(logits, _Draws()).double().mean().item()
    assert abs(untouched - p) < 4 * (p * (1 - p) / count) ** 0.5
    assert draw_bits(logits, _Draws(), top_k=1).double().mean().item() == float(p > 0.5)


def test_sampling_expands_lists():
    assert Sampling.per_scale(3, 2) == (3.0, 3.0)
    assert Sampling.per_scale([4, 2], 4) == (4.0, 2.0, 2.0, 2.0)


def test_same_prompt_same_image_in_any_batch(model):
    sampler = Sampler(model)
    together = sampler.generate(PROMPTS, SEEDS, FULL)
    reversed_batch = sampler.generate(PROMPTS[::-1], SEEDS[::-1], FULL)
    # Rounding may move a draw that sits on its threshold; at this size none does.
    assert np.array_equal(together, reversed_batch[::-1])
