"""What begins a generation as a recording of its own: one per shape of the text, read in place by the steps' recordings."""

import gc
import weakref

import numpy as np
import pytest
import torch

from benchmarks.relaunch import RelaunchRecorder
from stagevar.engine import GraphEngine, Recorder
from stagevar.models.base import Conditioning
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact
from stagevar.testing.tiny import GRIDS, TEXT_DIM, tiny_infinity
from tests.fakes.cuda import NoWaiting, begin_on_fake_cuda, fake_mode
from tests.stagevar.engine.tape import TapeRecorder
from tuner.evaluation.prefix_tree import walk

FULL = exact(len(GRIDS)).expand(GRIDS, 2)
EARLY = StageSchedule(1, cfg_delay=0).expand(GRIDS, 2)
PAPER = StageSchedule(3, cfg_delay=0, rank_ratios=(0.5, 0.2)).expand(GRIDS, 2)
PROMPTS, SEEDS = ["a red ring", "two stars"], [1, 2]


@pytest.fixture(scope="module")
def model():
    return tiny_infinity(depth=2)


def text(*lengths: int) -> list[torch.Tensor]:
    """Features of so many rows, which depend on all lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, TEXT_DIM, generator=generator) * 0.3 for length in lengths]


#: Each pair of lengths is of another bucket.
SHORT, LONG = text(3, 7), text(40, 5)


def graph_sampler(model, recorder=None, **options) -> tuple[Sampler, GraphEngine]:
    engine = GraphEngine(recorder or TapeRecorder(), **options)
    return Sampler(model, engine=engine), engine


def largest_gap(got, expected) -> float:
    return max((mine - other).abs().max().item() for mine, other in zip(got, expected, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("lengths", "negative"), [((3, 7), None), ((40, 5), None), ((3, 7), (9, 1)), ((4, 4), (40, 4))]
)
def test_padded_text_gives_the_conditioning_of_the_text_alone(model, lengths, negative):
    """Also where a prompt has more rows than there is null text, 16."""
    transformer, given = model.transformer, text(*lengths)
    others = None if negative is None else text(*negative)
    alone, inputs = transformer.condition(given, others), transformer.text_inputs(given, others, 32)
    padded = inputs.conditioner()(*inputs.tensors)
    longest, total = max(lengths + (negative or ())), padded.text_kv[0][0].shape[2]
    assert total == padded.bias_R11T.shape[-1] == -(-longest // 32) * 32
    assert (padded.bias_R11T == 0).any(-1).all(), "a row without text would give NaN"
    if alone.bias_R11T is not None:
        assert torch.equal(padded.bias_R11T[..., :longest], alone.bias_R11T)
    assert padded.bias_R11T[..., longest:].isneginf().all()
    assert largest_gap([padded.pooled_RC], [alone.pooled_RC]) < 1e-5
    assert largest_gap(padded.head_modulation, alone.head_modulation) < 1e-5
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    for layer, block in enumerate(transformer.layers()):
        assert largest_gap(padded.modulation[layer], alone.modulation[layer]) < 1e-5
        one, other = (block.ca(x, *each.text_kv[layer], each.bias_R11T) for each in (padded, alone))
        assert largest_gap([one], [other]) < 1e-5
        for mine, theirs in zip(padded.constants, alone.constants, strict=True):
            assert torch.equal(mine.heads[0], theirs.heads[0]) and torch.equal(mine.norm_weight_C, theirs.norm_weight_C)


@pytest.mark.parametrize("recorder", [TapeRecorder, RelaunchRecorder])
def test_a_shape_of_text_is_recorded_once_for_all_schedules(model, recorder):
    """Its outputs are the buffers that every schedule's recordings read; nothing of it is copied."""
    sampler, engine = graph_sampler(model, recorder())
    eager = Sampler(model)
    for steps in (FULL, EARLY):
        for seed, encoded in enumerate((SHORT, LONG, text(6, 2))):
            expected = eager.generate(PROMPTS, [seed, 5], steps, encoded=encoded)
            generation = sampler.begin(PROMPTS, [seed, 5], steps=steps, encoded=encoded)
            assert any(generation.conditioning is recorded.outputs for recorded in engine.texts.values())
            assert np.array_equal(sampler.finish(generation, steps), expected)
    assert len(engine.texts) == 2 and engine.recorded == 2 * (len(FULL) + len(EARLY))


def test_negative_prompts_replay_what_was_recorded_without(model):
    sampler, engine = graph_sampler(model)
    eager = Sampler(model)
    for negative in (None, ["blurry", "a long list of what is unwanted"], None):
        expected = eager.generate(PROMPTS, SEEDS, PAPER, negative=negative)
        assert np.array_equal(sampler.generate(PROMPTS, SEEDS, PAPER, negative=negative), expected)
    assert engine.recorded == len(PAPER) and len(engine.texts) == 1


def walked(sampler: Sampler, encoded, schedules) -> dict[int, np.ndarray]:
    images: dict[int, np.ndarray] = {}
    generation = sampler.begin(PROMPTS, SEEDS, encoded=encoded)
    walk(sampler, generation, schedules, lambda rows, image: images.update(dict.fromkeys(rows, image)))
    return images


class Misplaced(TapeRecorder):
    """Texts in the decoder's pool, which must show if `test_two_shapes_...` is worth anything."""

    def record(self, run, reset, separate_pool=False):
        is_text = isinstance(run(), Conditioning)
        reset()
        return super().record(run, reset, separate_pool or is_text)


@pytest.mark.parametrize(("recorder", "sound"), [(TapeRecorder, True), (Misplaced, False)])
def test_two_shapes_alternate_with_decoding_in_the_middle_of_walks(model, recorder, sound):
    """The second text is recorded after the decoder, which is replayed in the middle of the walk that reads this text."""
    schedules = [
        FULL,
        *(StageSchedule(3, cfg_delay=0, rank_ratios=(0.5, last)).expand(GRIDS, 2) for last in (0.2, 0.6)),
    ]
    sampler, _ = graph_sampler(model, recorder())
    eager, same = Sampler(model), []
    for encoded in (SHORT, LONG, SHORT):
        got, expected = walked(sampler, encoded, schedules), walked(eager, encoded, schedules)
        same.append(all(np.array_equal(got[index], expected[index]) for index in expected))
    assert all(same) if sound else not all(same)


def test_texts_are_dropped_with_the_last_recordings_over_them(model):
    """Four schedules share three caches: with a cache its steps go, and a text that no others read; both are recorded again."""
    sampler, engine = graph_sampler(model)
    eager, counts, outputs = Sampler(model), [], []
    skipping = StageSchedule(2, cfg_delay=0, skip=(4,)).expand(GRIDS, 2)
    order = [
        (FULL, SHORT),
        (FULL, LONG),
        (EARLY, SHORT),
        (PAPER, SHORT),
        (skipping, SHORT),
        (FULL, LONG),
        (FULL, SHORT),
    ]
    for steps, encoded in order:
        expected = eager.generate(PROMPTS, SEEDS, steps, encoded=encoded)
        assert np.array_equal(sampler.generate(PROMPTS, SEEDS, steps, encoded=encoded), expected)
        counts.append(len(engine.texts))
        outputs += [weakref.ref(recorded.outputs) for recorded in engine.texts.values()]
        gc.collect()
        assert len({id(made()) for made in outputs if made() is not None}) == counts[-1]
    assert counts == [1, 2, 2, 2, 1, 2, 2]
    sampler.release()
    gc.collect()
    assert not any(made() for made in outputs)


def test_what_was_split_off_outlives_the_text_of_the_next_generation(model):
    sampler, eager = graph_sampler(model)[0], Sampler(model)
    expected = eager.generate(PROMPTS, SEEDS, FULL, encoded=SHORT)
    for _ in range(2):
        generation = sampler.begin(PROMPTS, SEEDS, encoded=SHORT)
        for step in FULL[:2]:
            sampler.advance(generation, step)
        part = sampler.split(generation, [1])
        for encoded in (LONG, text(2, 2)):
            sampler.generate(PROMPTS, [3, 4], FULL, encoded=encoded)
        assert np.array_equal(sampler.finish(part, FULL)[0], expected[1])


def test_a_recorded_text_never_waits_for_the_device(model):
    """As in a scale: no value is read, no size depends on one, nothing is copied between host and card."""
    kernels = []

    class Watched(Recorder):
        def record(self, run, reset, separate_pool=False):
            with NoWaiting() as seen:
                made = run()
            kernels.append(seen.kernels)
            return lambda: None, made

    with fake_mode(), torch.inference_mode():
        on_card, _ = begin_on_fake_cuda(model, PROMPTS, FULL)
        sampler = Sampler(on_card.model, engine=GraphEngine(Watched()))
        sampler.begin(PROMPTS, SEEDS, encoded=SHORT)
        sampler.begin(PROMPTS, SEEDS, encoded=SHORT, encoded_negative=text(4, 2))
    assert len(kernels) == 1 and kernels[0] > 20
