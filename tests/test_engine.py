"""The graph engine's logic on a CPU: recorded operations are replayed over the same fixed buffers as a CUDA graph's."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from stagevar.engine import GraphEngine, Recorder, build_engine
from stagevar.errors import UsageError
from stagevar.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, fastvar
from tests.tiny import GRIDS, tiny_infinity

FULL = exact(len(GRIDS)).expand(GRIDS, 2)
SCHEDULES = {
    "full": FULL,
    "paper": StageSchedule(3, cfg_delay=0, rank_ratios=(0.5, 0.2)).expand(GRIDS, 2),
    "rows": StageSchedule(3, rank_ratios=(0.4,), projection="rows", rope="index", site="trunk").expand(GRIDS, 2),
    "skip": StageSchedule(3, cfg_delay=0, branch="cond", skip=(2, 4)).expand(GRIDS, 2),
    "fastvar": fastvar(GRIDS).expand(GRIDS, 2),
}


class Tape(TorchDispatchMode):
    """Keeps every operation with the tensors it touched. Numbers are baked in, tensors outside are held by reference."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self, wanted):
        """Runs the operations again and returns what the wanted results have become."""
        now = {}

        def current(tensor):
            return now.get(id(tensor), tensor)

        for function, args, kwargs, result in self.operations:
            args, kwargs = tree_map_only(torch.Tensor, current, (args, kwargs))
            fresh = function(*args, **kwargs)
            pairs = zip(result, fresh, strict=True) if isinstance(result, tuple | list) else [(result, fresh)]
            now.update((id(old), new) for old, new in pairs if isinstance(old, torch.Tensor))
        return [current(tensor) for tensor in wanted]


class TapeRecorder(Recorder):
    """A CUDA graph's contract on a CPU."""

    def record(self, run, reset):
        run()
        reset()
        with Tape() as tape:
            made = run()
        results = flat(made)
        outputs = [torch.full_like(tensor, float("nan")) for tensor in results]

        def replay():
            for mine, fresh in zip(outputs, tape.replay(results), strict=True):
                mine.copy_(fresh)

        return replay, rebuilt(made, iter(outputs))


def flat(value):
    """Tensors of a sampler's saved state, or of a decoded image."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [value.code_sum_BdHW, *(cached.y_RLC for cached in value.state.values())]


def rebuilt(value, tensors):
    if isinstance(value, torch.Tensor):
        return next(tensors)
    code_sum = next(tensors)
    state = {site: dataclasses.replace(cached, y_RLC=next(tensors)) for site, cached in value.state.items()}
    return dataclasses.replace(value, code_sum_BdHW=code_sum, state=state)


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


def graph_sampler(model, **options) -> tuple[Sampler, GraphEngine]:
    engine = GraphEngine(TapeRecorder(), **options)
    return Sampler(model, engine=engine), engine


def images(sampler: Sampler, steps, prompts, seeds, planned: bool) -> np.ndarray:
    if planned:
        return sampler.generate(prompts, seeds, steps)
    return sampler.finish(sampler.begin(prompts, seeds), steps)


BATCHES = [(["a red ring", "two stars"], [1, 2]), (["a blue cross", "a very long prompt indeed"], [3, 4])]


@pytest.mark.parametrize("planned", [True, False], ids=["deployed", "tuned"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_replayed_is_eager(model, name, planned):
    """Recorded with one batch, replayed with others: the pixels are those of the eager engine."""
    sampler, engine = graph_sampler(model)
    eager = Sampler(model)
    for prompts, seeds in [*BATCHES, BATCHES[0]]:
        expected = images(eager, SCHEDULES[name], prompts, seeds, planned)
        assert np.array_equal(images(sampler, SCHEDULES[name], prompts, seeds, planned), expected)
    run = sum(not step.skipped for step in SCHEDULES[name])
    assert engine.recorded == run, "each step was recorded once, though three batches ran"
    assert engine.replayed == 3 * run


def test_padded_text_changes_logits_by_rounding_only(model):
    """Buckets against exact length: masked text rows add nothing."""
    encoded = model.text.encode(["a red ring", "a blue cross"])
    exact_length = model.transformer.condition(encoded)
    padded = exact_length.padded(32)
    assert padded.text_kv[0][0].shape[2] == 32 and padded.mask_R11T.shape[-1] == 32
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    attention = model.transformer.layers()[0].ca
    for row in (exact_length, padded):
        assert row.text_kv[0][0].shape[0] == 4
    with torch.inference_mode():
        one = attention(x, *exact_length.text_kv[0], exact_length.mask_R11T)
        other = attention(x, *padded.text_kv[0], padded.mask_R11T)
    assert (one - other).abs().max() < 1e-6


def test_a_walk_over_a_tree_shares_recordings(model):
    """Depth-first with rewinds, as the tuner walks: every distinct prefix is one recording."""
    from tuner.evaluate import walk

    schedules = list(SCHEDULES.values())
    sampler, engine = graph_sampler(model)
    eager = Sampler(model)
    for prompts, seeds in BATCHES * 2:
        got, expected = {}, {}
        walk(
            sampler,
            sampler.begin(prompts, seeds),
            schedules,
            lambda rows, x, out=got: out.update(dict.fromkeys(rows, x)),
        )
        walk(
            eager,
            eager.begin(prompts, seeds),
            schedules,
            lambda rows, x, out=expected: out.update(dict.fromkeys(rows, x)),
        )
        assert got.keys() == expected.keys() == set(range(len(schedules)))
        assert all(np.array_equal(got[i], expected[i]) for i in got)
    prefixes = {s[: d + 1] for s in schedules for d in range(len(GRIDS)) if not s[d].skipped}
    assert engine.recorded == len(prefixes)


def test_a_full_tree_drops_leaves_and_records_again(model):
    sampler, engine = graph_sampler(model, max_nodes=6)
    eager = Sampler(model)
    prompts, seeds = BATCHES[0]
    for name in ("full", "paper", "rows", "full", "paper"):
        expected = images(eager, SCHEDULES[name], prompts, seeds, False)
        assert np.array_equal(images(sampler, SCHEDULES[name], prompts, seeds, False), expected)
    (resident,) = engine._residents.values()
    assert len(resident.nodes) <= 6
    assert engine.recorded > 9, "five schedules have nine distinct steps; evicted ones were recorded again"


def test_batches_have_buffers_of_their_own(model):
    """Quality runs at one batch size, latency at another: going back and forth records nothing twice."""
    sampler, engine = graph_sampler(model)
    eager = Sampler(model)
    one = (["a red ring"], [1])
    for prompts, seeds in (BATCHES[0], one, BATCHES[1], one):
        expected = images(eager, FULL, prompts, seeds, False)
        assert np.array_equal(images(sampler, FULL, prompts, seeds, False), expected)
    assert engine.recorded == 2 * len(GRIDS)
    sampler.release()
    assert not engine._residents


def test_injected_noise_runs_eagerly(model):
    class Half:
        def at(self, scale, branches):
            return self

        def uniform(self, purpose, shape):
            return torch.full((1, *shape), 0.5)

    sampler, engine = graph_sampler(model)
    got = sampler.generate(["a"], [0], FULL, noise=Half())
    assert np.array_equal(got, Sampler(model).generate(["a"], [0], FULL, noise=Half()))
    assert engine.recorded == 0


def test_engines_by_name():
    assert build_engine("eager", torch.device("cpu")).name == "eager"
    with pytest.raises(UsageError, match="engine graph needs a CUDA device, not cpu"):
        build_engine("graph", torch.device("cpu"))
    with pytest.raises(UsageError, match="unknown engine 'fast'"):
        build_engine("fast", torch.device("cpu"))
