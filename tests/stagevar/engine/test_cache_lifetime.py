"""Caches and recordings die when they are let go: what is looked at here are live objects, not lists of them."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

from benchmarks.relaunch import RelaunchRecorder
from stagevar.engine import GraphEngine, RecordingFailed, first_cause, recorder
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, preset
from stagevar.tensors.cache import KVCache, even, step_lengths
from stagevar.testing.tiny import GRIDS, tiny_infinity

FULL = exact(len(GRIDS)).expand(GRIDS, 2)
OTHER = preset("skip-1", GRIDS).expand(GRIDS, 2)


class Pools(RelaunchRecorder):
    """As torch's allocator has it: a pool whose recordings are all gone cannot be recorded into again."""

    def __init__(self):
        self.pools = {False: [], True: []}

    def new_pool(self, separate_pool):
        self.pools[separate_pool] = []

    def record(self, run, reset, separate_pool=False):
        pool = self.pools[separate_pool]
        if pool and not any(recording() is not None for recording in pool):
            raise RecordingFailed("use_count > 0 INTERNAL ASSERT FAILED")
        replay, outputs = super().record(run, reset, separate_pool)
        pool.append(weakref.ref(replay))
        return replay, outputs


ENGINES = {"eager": lambda: "eager", "graph": lambda: GraphEngine(Pools())}


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


@pytest.fixture
def alive(monkeypatch):
    """Counts living caches; `alive.at_allocation` is how many there were whenever another one was made."""
    references, allocate = [], KVCache.__init__

    def count():
        gc.collect()
        return sum(reference() is not None for reference in references)

    def counted(self, *arguments, **options):
        count.at_allocation.append(count())
        allocate(self, *arguments, **options)
        references.append(weakref.ref(self))

    count.at_allocation = []
    monkeypatch.setattr(KVCache, "__init__", counted)
    return count


def test_the_old_cache_is_gone_before_the_new_one_is_made(model, alive):
    sampler = Sampler(model)
    held = [sampler.begin(["a"] * batch, range(batch)) for batch in (1, 2, 1)]
    sampler.generate(["a"], [0], OTHER)
    assert alive.at_allocation == [0, 0, 0, 0], "though each generation is still held"
    assert [generation.live for generation in held] == [False] * 3


@pytest.mark.parametrize(("card_bytes", "joint"), [(10**9, True), (10**5, False)])
def test_branches_share_a_tensor_where_that_costs_a_card_little(model, monkeypatch, card_bytes, joint):
    """A cache alike in every layer and branch gives the same images."""
    steps = StageSchedule(3, cfg_delay=0, branch="cond", rank_ratios=(0.5, 0.2)).expand(GRIDS, 2)
    expected = Sampler(model).generate(["a", "b"], [0, 1], steps)
    least = step_lengths(steps, model.transformer.chunk_layers)
    monkeypatch.setattr("stagevar.sampling.sampler.total_bytes", lambda device: card_bytes)
    on_card = Sampler(dataclasses.replace(model, device=torch.device("cuda", 0)))
    capacity = on_card._capacity(2, steps)
    assert capacity == (even(least) if joint else least) != (least if joint else even(least))
    sampler = Sampler(model)
    sampler._capacity = lambda batch, steps: capacity
    assert np.array_equal(sampler.generate(["a", "b"], [0, 1], steps), expected)
    assert sampler._caches[0].joint == joint


@pytest.mark.parametrize("engine", ENGINES)
def test_a_released_sampler_holds_no_cache(model, alive, engine):
    sampler = Sampler(model, engine=ENGINES[engine]())
    generation = sampler.begin(["a"], [0])
    sampler.finish(generation, FULL)
    assert alive() == 1
    sampler.release()
    assert alive() == 0
    with pytest.raises(ValueError, match="ended"):
        _ = generation.cache


@pytest.mark.parametrize("engine", ENGINES)
def test_decoding_again_happens_without_a_cache(model, alive, engine, monkeypatch):
    sampler, decode, at_decoding = Sampler(model, engine=ENGINES[engine]()), model.tokenizer.decode, []
    expected = sampler.generate(["a", "b"], [0, 1], FULL)

    def short_of_memory(code_sum):
        at_decoding.append(alive())
        if len(at_decoding) == 1:
            raise torch.OutOfMemoryError("made up")
        return decode(code_sum)

    sampler = Sampler(model, engine=ENGINES[engine]())
    monkeypatch.setattr(model.tokenizer, "decode", short_of_memory)
    assert np.array_equal(sampler.generate(["a", "b"], [0, 1], FULL), expected)
    assert len(at_decoding) == 2 and at_decoding[1] == at_decoding[0] - 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_generation_that_ended_is_not_decoded(model, engine):
    """Recorded graphs would give the later image instead."""
    sampler = Sampler(model, engine=ENGINES[engine]())
    first = sampler.begin(["a red ring"], [1])
    image = sampler.finish(first, FULL)
    assert np.array_equal(sampler.decode(first), image)
    sampler.finish(sampler.begin(["a blue star"], [2]), FULL)
    with pytest.raises(ValueError, match="this generation ended"):
        sampler.decode(first)


@pytest.mark.parametrize("lose", ["release", "forget", "evict"])
def test_a_pool_that_lost_its_last_recording_is_not_recorded_into(model, lose, recwarn):
    engine = GraphEngine(Pools(), max_nodes=1 if lose == "evict" else 256)
    sampler = Sampler(model, engine=engine)
    expected = sampler.generate(["a"], [0], FULL)
    if lose == "release":
        sampler.release()
    elif lose == "forget":
        for _ in range(len(sampler._caches)):
            engine.forget(sampler._caches.pop())
    assert np.array_equal(sampler.generate(["a"], [0], FULL), expected)
    assert engine.fallback_reason is None


def test_a_failed_capture_is_told_by_its_cause():
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory\nTried to allocate")
        finally:
            raise RuntimeError("previous error during capture")
    except RuntimeError as error:
        assert isinstance(first_cause(error), torch.OutOfMemoryError)


def test_memory_that_runs_out_while_recording_is_no_reason_to_stay_eager(model):
    class Short(RelaunchRecorder):
        left = 1

        def record(self, run, reset, separate_pool=False):
            if self.left:
                self.left -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().record(run, reset, separate_pool)

    engine = GraphEngine(Short())
    sampler = Sampler(model, engine=engine)
    with pytest.raises(torch.OutOfMemoryError):
        sampler.generate(["a"], [0], FULL)
    sampler.generate(["a"], [0], FULL)
    assert engine.fallback_reason is None and engine.recorded


@pytest.mark.parametrize(("version", "clean"), [("2.11.0+cu130", False), ("2.12.0", True), ("2.15.0a0", True)])
def test_which_torch_records_again_after_a_failure(version, clean):
    assert recorder.ends_capture_cleanly(version) is clean


def test_nothing_is_collected_while_capturing():
    with recorder.no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
