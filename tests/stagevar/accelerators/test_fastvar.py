"""FastVAR: which tokens stay, what the others get, and schedules that count by position."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from stagevar.accelerators import FastVAR, StageVAR
from stagevar.accelerators.base import Cached, ScaleContext
from stagevar.accelerators.fastvar import pivotal_indices
from stagevar.errors import ScheduleError
from stagevar.models.base import Site
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, LowRank, Pivotal, ScaleStep, StageSchedule, exact, fastvar, kept_tokens
from stagevar.schedule.grids import INFINITY_GRIDS, infinity_grids, square
from stagevar.tensors.cache import step_lengths
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.golden.fastvar_cases import reference_schedule

SQUARE, _ = infinity_grids("1M")


def test_pivotal_tokens_are_the_furthest_from_the_mean():
    x = torch.zeros(2, 5, 3)
    x[0, :, 0] = torch.tensor([0.0, 9.0, 1.0, -8.0, 0.0])
    x[1, :, 2] = torch.tensor([5.0, 0.0, 0.0, 0.0, 1.0])
    assert pivotal_indices(x, 2).tolist() == [[1, 3], [0, 1]], "per row; ties go to the first position"
    assert pivotal_indices(x + 100, 2).tolist() == [[1, 3], [0, 1]], "a shift of all tokens changes nothing"


def test_pruned_tokens_take_the_area_resized_cache_and_kept_ones_run():
    x = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    cache = torch.randn(2, 36, 4, generator=torch.Generator().manual_seed(1))
    site, seen = Site("mlp", 2), {}
    step = ScaleStep(3, (4, 4), BOTH, Pivotal(5, (1, 3), 2))
    context = ScaleContext(step, None, {site: Cached(cache, (6, 6), BOTH)})

    def run(small, positions):
        seen["x"], seen["positions"] = small, positions
        return small * 10

    y = FastVAR().around(context, {})(site, x, None, run)
    area = F.interpolate(cache.transpose(1, 2).reshape(2, 4, 6, 6), size=(4, 4), mode="area").flatten(2).transpose(1, 2)
    for row in range(2):
        kept = seen["positions"][row].tolist()
        assert len(set(kept)) == 5
        for position in range(16):
            expected = x[row, position] * 10 if position in kept else area[row, position]
            assert torch.allclose(y[row, position], expected)
    untouched = FastVAR().around(context, {})(Site("mlp", 0), x, None, lambda small, positions: small + 1)
    assert torch.equal(untouched, x + 1), "layers outside the range run in full"


def test_kept_count_is_the_reference_rule():
    assert [kept_tokens(0.6, 1024), kept_tokens(0.5, 1600)] == [615, 800]
    assert kept_tokens(0.9, 1000) == 900, "1 - 0.9 falls short of 0.1 in binary"
    assert kept_tokens(1e-6, 10) == 1 and kept_tokens(1, 10) == 10


def test_preset_is_the_released_setting_on_square_grids():
    steps = fastvar(SQUARE).expand(SQUARE, 8)
    assert steps == reference_schedule(SQUARE).expand(SQUARE, 8)
    assert [s.scale for s in steps if s.skipped] == [11, 12]
    assert [steps[9].reduction, steps[10].reduction] == [Pivotal(615, (3, 28), 8), Pivotal(800, (3, 28), 8)]
    assert [s.scale for s in steps if s.keeps] == [8]
    # The released code's cache lengths after side 40, of a pruned and of a full layer.
    lengths = step_lengths(steps, [range(4 * i, 4 * i + 4) for i in range(8)])["cond"]
    assert lengths[3] == lengths[27] == 2912 and lengths[2] == lengths[28] == 4121


@pytest.mark.parametrize("ratio", sorted(INFINITY_GRIDS))
def test_every_ratio_skips_only_the_end_and_prunes_what_has_a_cache(ratio):
    """The released code prunes and skips by grid width: most ratios are not accelerated, some lose a middle scale."""
    grids = INFINITY_GRIDS[ratio]
    steps = fastvar(grids).expand(grids, 8)
    assert [s.skipped for s in steps] == [False] * 11 + [True] * 2
    for scale, share in ((9, 0.6), (10, 0.5)):
        reduction = steps[scale].reduction
        assert reduction.kept == kept_tokens(share, steps[scale].tokens) and reduction.cache_scale == 8
    full = sum(s.processed_tokens() for s in exact(13).expand(grids, 8))
    assert sum(s.processed_tokens() for s in steps) < 0.35 * full


def test_cache_is_the_last_scale_that_ran_in_full():
    grids = square((1, 2, 3, 4, 6, 8))
    mixed = StageSchedule(2, accelerator=("fastvar", "exact", "stagevar", "fastvar"), rank_ratios=(0.5,))
    steps = mixed.expand(grids, 1)
    assert [type(s.reduction) for s in steps[2:]] == [Pivotal, type(None), LowRank, Pivotal]
    assert (steps[2].reduction.cache_scale, steps[5].reduction.cache_scale) == (1, 3)
    assert [s.scale for s in steps if s.keeps] == [1, 3]
    skipped = dataclasses.replace(mixed, skip=(3,)).expand(grids, 1)
    assert skipped[5].reduction.cache_scale == 1


def test_chunk_ratios_are_averaged_and_layers_matter():
    grids = square((1, 2, 4, 8))
    schedule = StageSchedule(3, accelerator="fastvar", rank_ratios=((0.2, 0.6),))
    assert schedule.expand(grids, 2)[3].reduction.kept == kept_tokens(0.4, 64)
    assert dataclasses.replace(schedule, layers=(0, 2)).expand(grids, 2) != schedule.expand(grids, 2)
    # Keeping everything is no reduction at all.
    assert StageSchedule(3, accelerator="fastvar", rank_ratios=(1,)).expand(grids, 2) == exact(4).expand(grids, 2)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"accelerator": "fastvr"}, "accelerator 'fastvr'.*did you mean fastvar"),
        ({"accelerator": ("fastvar", "none")}, "accelerator 'none'"),
        ({"accelerator": ()}, "must name at least one"),
        ({"layers": (3,)}, "two layer numbers"),
        ({"layers": (3, 3)}, "stop layer 3"),
        ({"layers": (-1, 3)}, "first layer -1"),
    ],
)
def test_refusals(parameters, message):
    with pytest.raises(ScheduleError, match=message):
        StageSchedule(2, **parameters)


def test_a_scale_that_nothing_was_kept_for_is_refused():
    model = tiny_infinity()
    steps = list(exact(5).expand(GRIDS, 2))
    steps[4] = dataclasses.replace(steps[4], reduction=Pivotal(9, (0, 4), 3))
    with pytest.raises(ValueError, match="scale 4 prunes attn 0, but scale 3 did not keep it"):
        Sampler(model, FastVAR()).generate(["a"], [0], tuple(steps))


def test_methods_refuse_each_others_steps():
    pruned = StageSchedule(3, accelerator="fastvar", rank_ratios=(0.5,)).expand(GRIDS, 2)
    projected = StageSchedule(3, rank_ratios=(0.5,)).expand(GRIDS, 2)
    with pytest.raises(ValueError, match="StageVAR cannot apply Pivotal"):
        Sampler(tiny_infinity(), StageVAR()).generate(["a"], [0], pruned)
    with pytest.raises(ValueError, match="FastVAR cannot apply LowRank"):
        Sampler(tiny_infinity(), FastVAR()).generate(["a"], [0], projected)


def test_branches_and_prompts_keep_their_own_tokens():
    """The reference repeats one table for two rows; here every row has its own kept set."""
    kept = []

    class Spy(FastVAR):
        def around(self, context, updates):
            hook = super().around(context, updates)

            def around(site, x, positions, run):
                def spied(small, small_positions):
                    if small_positions is not None:
                        kept.append(small_positions.sort(dim=1).values)
                    return run(small, small_positions)

                return hook(site, x, positions, spied)

            return around

    steps = StageSchedule(4, accelerator="fastvar", rank_ratios=(0.3,), layers=(2, 4)).expand(GRIDS, 2)
    sampler = Sampler(tiny_infinity(), Spy())
    sampler.generate(["a red ring", "two stars"], [0, 1], steps)
    assert len(kept) == 2 * 3 and all(index.shape == (4, kept_tokens(0.3, 36)) for index in kept)
    # Rows: both prompts with guidance, then both without.
    assert any(not torch.equal(index[0], index[1]) for index in kept), "prompts differ"
    assert any(not torch.equal(index[:2], index[2:]) for index in kept), "branches differ"


def test_only_what_a_planned_schedule_restores_from_is_kept():
    sampler = Sampler(tiny_infinity())
    steps = StageSchedule(3, accelerator="fastvar", rank_ratios=(0.5,), layers=(1, 3)).expand(GRIDS, 2)
    kept = {}
    for planned in (None, steps):
        generation = sampler.begin(["a"], [0], steps=planned)
        for step in steps[:3]:
            sampler.advance(generation, step)
        kept[planned] = set(generation.state)
    sublayers = {Site(kind, layer) for kind in ("attn", "cross", "mlp") for layer in (1, 2)}
    assert kept[steps] == sublayers
    assert kept[None] == sublayers | {Site("trunk"), Site("chunk", 0), Site("chunk", 1)}
    plain = sampler.begin(["a"], [0], steps=exact(5).expand(GRIDS, 2))
    sampler.advance(plain, exact(5).expand(GRIDS, 2)[0])
    assert plain.state == {}
