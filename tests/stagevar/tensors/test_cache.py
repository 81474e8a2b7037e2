"""The static KV cache against a growing one, its branches apart and joined, and its 8-bit store."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.growing_cache import GrowingSampler
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, StageSchedule, exact
from stagevar.tensors.cache import KVCache
from stagevar.testing.recorder import Recorder, largest_difference
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.stagevar.engine.test_graph import SCHEDULES, graph_sampler

PROMPTS, SEEDS = ["a red ring", "two stars", "a very long prompt"], [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


def rows(seed: int, tokens: int, count: int = 4) -> tuple[torch.Tensor, ...]:
    """q, k, v (R, H, L, c)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, 2, tokens, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize("planned", [True, False], ids=["deployed", "tuned"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_static_equals_growing(model, name, planned):
    """Buffers filled by length pointers against concatenated tensors."""
    steps = SCHEDULES[name]
    plan = {"steps": steps} if planned else {}
    static, growing = Sampler(model), GrowingSampler(model)
    expected = growing.finish(growing.begin(PROMPTS, SEEDS, **plan), steps)
    assert np.array_equal(static.finish(static.begin(PROMPTS, SEEDS, **plan), steps), expected)


def test_branches_joined_are_branches_apart():
    """The full schedule's cache is one tensor for both branches, a deployed one is not; both attend alike."""
    joined = KVCache(2, 2, 8, {"cond": [9], "uncond": [9]}, "cpu", torch.float32)
    apart = KVCache(2, 2, 8, {"cond": [9], "uncond": [7]}, "cpu", torch.float32)
    assert joined.joint and not apart.joint
    for step, (branches, tokens) in enumerate([(BOTH, 3), (BOTH, 4), (("cond",), 2)]):
        q, k, v = rows(step, tokens, 2 * len(branches))
        ours, theirs = (cache.attend(branches, 0, q, k, v, 1.0) for cache in (joined, apart))
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert joined.lengths == apart.lengths == ((9,), (7,))
    for branch in BOTH:
        assert torch.equal(joined.storage(branch, 0), apart.storage(branch, 0))
    assert joined.memory_bytes - apart.memory_bytes == 2 * 2 * 2 * 2 * 8 * 4


def test_guidance_cannot_come_back_over_a_gap():
    cache = KVCache(2, 2, 8, {"cond": [9], "uncond": [9]}, "cpu", torch.float32)
    cache.attend(("cond",), 0, *rows(0, 2, 2), 1.0)
    with pytest.raises(RuntimeError, match="rewind to before one was dropped"):
        cache.attend(BOTH, 0, *rows(1, 2), 1.0)


@pytest.mark.parametrize("capacity", [[9], [7]], ids=["joint", "apart"])
def test_eight_bits_are_within_half_a_step(capacity):
    """Every stored number is off by at most 1/254 of the largest of its token and head."""
    cache = KVCache(2, 2, 8, {"cond": [9], "uncond": capacity}, "cpu", torch.float32, eight_bit=True)
    _, k, v = rows(0, 7)
    v *= 300  # keys have length one in practice, values any
    cache.attend(BOTH, 0, torch.zeros_like(k), k, v, 1.0)
    for index, branch in enumerate(BOTH):
        wanted = torch.stack([k, v])[:, 2 * index : 2 * index + 2]
        stored = cache.storage(branch, 0).float() * cache._scales[branch][0][..., :7, :]
        assert ((stored - wanted).abs() <= wanted.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)).all()
    exact_cache = KVCache(2, 2, 8, {"cond": [9], "uncond": capacity}, "cpu", torch.float32)
    exact_cache.attend(BOTH, 0, torch.zeros_like(k), k, v, 1.0)
    q, k, v = rows(1, 2, 2)
    ours, exactly = (c.attend(("cond",), 0, q, k, v, 0.1) for c in (cache, exact_cache))
    assert 0 < (ours - exactly).abs().max() < 0.02 * exactly.abs().max()
    # 8 numbers of one byte and a scale of four, instead of 8 of four.
    assert cache.memory_bytes * 32 == exact_cache.memory_bytes * 12


def test_eight_bits_in_a_generation(model):
    """Whole generations: near the exact ones, the same again after rewinding, in a split, and when replayed."""
    small = dataclasses.replace(model, kv_cache="int8")
    steps = exact(len(GRIDS)).expand(GRIDS, 2)
    plain = Recorder(model)
    plain.run(steps, PROMPTS)
    ours = Recorder(small, forced=plain.tokens)
    generation = ours.run(steps, PROMPTS)
    logits = dict(ours.logits)
    spread = max(float(x.std()) for x in plain.logits.values())
    assert 0 < largest_difference(logits, plain.logits) < 0.2 * spread
    ours.rewind(generation, 2)
    for step in steps[2:]:
        ours.advance(generation, step)
    assert largest_difference(ours.logits, logits) == 0
    kept = ours.split(generation, [0, 1, 2])
    ours.rewind(generation, 2)
    ours.advance_like(generation, kept)
    for step in steps[3:]:
        ours.advance(generation, step)
    assert largest_difference(ours.logits, logits) == 0
    ours.rewind(generation, 3)
    part = ours.split(generation, [2, 0])
    ours.forced = {scale: tokens[[2, 0]] for scale, tokens in plain.tokens.items()}
    for step in steps[3:]:
        ours.advance(part, step)
        assert (ours.logits[step.scale] - logits[step.scale][[2, 0]]).abs().max() < 1e-4


def test_eight_bits_are_recorded_and_replayed(model):
    small = dataclasses.replace(model, kv_cache="int8")
    steps = StageSchedule(3, cfg_delay=0, rank_ratios=(0.5,)).expand(GRIDS, 2)
    sampler, _ = graph_sampler(small)
    for seeds in ([1, 2, 3], [4, 5, 6]):
        assert np.array_equal(sampler.generate(PROMPTS, seeds, steps), Sampler(small).generate(PROMPTS, seeds, steps))
