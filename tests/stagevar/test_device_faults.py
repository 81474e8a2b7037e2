"""A broken device or too little memory is never a schedule's failure; memory is tried in smaller parts first."""

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch

from stagevar.device_faults import is_broken, is_out_of_memory, told_apart
from stagevar.errors import DeviceBroken, OutOfDeviceMemory
from stagevar.schedule import StageSchedule, exact
from stagevar.schedule.grids import square
from stagevar.tensors.cache import KVCache, step_lengths
from stagevar.testing.tiny import tiny_infinity
from tests.fakes.studies import FakeEvaluator, study, tokens
from tuner.config.prompts import load_prompts
from tuner.config.space import PromptSource
from tuner.evaluation.executor import Failed, NotMeasured, QualityTask
from tuner.evaluation.local import LocalExecutor
from tuner.evaluation.model_evaluator import ModelEvaluator
from tuner.metrics.quality_spec import QualitySpec
from tuner.results.candidate import Finalist

CPU = torch.device("cpu")
GRIDS = square((1, 2, 3, 4, 6))
FULL = exact(5).expand(GRIDS, 2)
FAST = [
    StageSchedule(3, cfg_delay=0, branch="cond", rank_ratios=(0.4,), site="trunk").expand(GRIDS, 2),
    StageSchedule(4, skip=(4,)).expand(GRIDS, 2),
    StageSchedule(3, cfg_delay=0, rank_ratios=(0.4, 0.2)).expand(GRIDS, 2),
]


@pytest.fixture(scope="module")
def model():
    return tiny_infinity(GRIDS)


@pytest.fixture
def prompts():
    return load_prompts(PromptSource(search=6, heldout=4, micro_batch=4))


@pytest.fixture
def room(monkeypatch):
    """`room(bytes)` lets KV caches take so much together; `room.refused` counts those that found too little."""
    booked, allocate = [0], KVCache.__init__

    def give(limit):
        def allocated(self, *arguments, **options):
            allocate(self, *arguments, **options)
            size = self.memory_bytes
            gc.collect()
            if booked[0] + size > limit:
                give.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            booked[0] += size
            weakref.finalize(self, lambda: booked.__setitem__(0, booked[0] - size))

        monkeypatch.setattr(KVCache, "__init__", allocated)

    give.refused = 0
    return give


def cache_bytes(model, batch, steps=FULL):
    from stagevar.models.memory import kv_cache_bytes

    return kv_cache_bytes(model.transformer, steps, batch, 4, "model")


def test_errors_are_told_apart():
    broken = pytest.raises(DeviceBroken, match=r"cpu is broken \(CUDA error: an illegal memory access\).*same command")
    with broken, told_apart(CPU, "x"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore lines")
    short = pytest.raises(
        OutOfDeviceMemory, match=r"^drawing needs more memory than is free on cpu \(CUDA out of memory"
    )
    with short, told_apart(CPU, "drawing"):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("previous error during capture")
    with pytest.raises(ValueError, match="mine"), told_apart(CPU, "x"):
        raise ValueError("mine")
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


@pytest.mark.parametrize(
    ("raised", "broken"), [(None, False), (torch.OutOfMemoryError("full"), False), (RuntimeError("CUDA error"), True)]
)
def test_a_cuda_device_is_asked_whatever_the_error_was(monkeypatch, raised, broken):
    class Value:
        def add_(self, _):
            return self

        def item(self):
            if raised is not None:
                raise raised

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: Value())
    assert is_broken(RuntimeError("an unspecific one"), torch.device("cuda", 0)) is broken


CALLS = {
    "quality": lambda e: e.quality([FULL, FAST[0]], "search", 0),
    "images": lambda e: e.images(FULL, "heldout", 0),
    "latency": lambda e: e.latency({"baseline": FULL, "a": FAST[0]}, 1, 1),
    "step_ms": lambda e: e.step_ms([FULL, FAST[0]], 1),
    "scale_ms": lambda e: e.scale_ms({"a": FULL}, 1),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_broken_device_is_said_wherever_it_shows(model, prompts, monkeypatch, call):
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()})
    CALLS[call](evaluator)

    def broken(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(KVCache, "_attend", broken)
    with pytest.raises(DeviceBroken):
        CALLS[call](evaluator)
    if call == "quality":
        with pytest.raises(DeviceBroken):
            list(LocalExecutor(evaluator).run([QualityTask((FULL, FAST[0]), "search", 0)]))


def test_fewer_images_are_drawn_at_once_where_memory_runs_out(model, prompts, room):
    schedules = [FULL, *FAST]
    expected = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, {"ssim": 0.1}).quality(schedules, "search", 0)
    expected_images = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}).images(FAST[0], "search", 0)
    room(cache_bytes(model, 1))
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, {"ssim": 0.1}, keep_bytes=0)
    with pytest.warns(UserWarning, match="drawing 1 at once"):
        found = evaluator.quality(schedules, "search", 0)
    assert evaluator.rows_at_once == 1 and room.refused == 2  # of four and of two
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[m], other[m]) for m in one)
    assert np.array_equal(evaluator.images(FAST[0], "search", 0), expected_images)
    assert room.refused == 2, "what fits is remembered"


def test_kept_scales_are_let_go_before_images_are_drawn_in_parts(model, prompts, room):
    room(2 * cache_bytes(model, 4))
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, keep_bytes=10**9)
    evaluator.quality([FULL], "search", 0)
    assert set(evaluator._kept) == {0} and not room.refused
    capacity = step_lengths(FULL, model.transformer.chunk_layers)
    evaluator.sampler.release()
    other = KVCache(1, 2, 16, capacity, "cpu", torch.float32)
    evaluator.quality([FULL], "search", 1)  # of two images: beside the kept one, its own and the other no more is kept
    assert other.batch == 1 and room.refused == 1 and not evaluator._kept and evaluator.rows_at_once is None


def test_a_schedule_that_does_not_fit_alone_is_not_measured_and_takes_no_other_with_it(model, prompts, room):
    room(cache_bytes(model, 1) - 1)
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, keep_bytes=0)
    evaluator._references["search", 0] = np.zeros((4, 24, 24, 3), dtype=np.uint8)
    with pytest.warns(UserWarning):
        ((_, outcomes),) = LocalExecutor(evaluator).run([QualityTask((FULL, FAST[0]), "search", 0)])
    assert all(isinstance(outcome, NotMeasured) for outcome in outcomes)
    assert "drawing 1 images at once needs more memory than is free on cpu" in outcomes[0].error


def test_schedules_are_timed_in_groups_that_fit(model, prompts, room):
    schedules = {"baseline": FULL, **{str(i): steps for i, steps in enumerate(FAST)}}
    room(cache_bytes(model, 1) + max(cache_bytes(model, 1, steps) for steps in FAST))
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()})
    groups, timings = [], evaluator.timer.timings

    def spy(group, *arguments):
        groups.append(tuple(group))
        return timings(group, *arguments)

    evaluator.timer.timings = spy
    found = evaluator.latency(schedules, 2, 1)
    assert list(found) == list(schedules) and all(len(t.samples_ms) == 2 for t in found.values())
    assert groups[0] == ("baseline", "0", "1", "2")
    assert groups[-2:] == [("baseline", "1"), ("baseline", "2")] and ("baseline", "0") in groups
    room(cache_bytes(model, 1))
    with pytest.raises(OutOfDeviceMemory, match="timing 2 schedules in turn"):
        evaluator.latency({"baseline": FULL, "0": FAST[0]}, 1, 1)


class Short(FakeEvaluator):
    """Has too little memory for some schedules, beside whatever else."""

    def __init__(self, whole, method, needs_too_much):
        self.__dict__.update(whole.__dict__)
        self.method, self.needs_too_much, self.refused = method, needs_too_much, set()

    def _check(self, method, schedules):
        found = {steps for steps in schedules if self.needs_too_much(steps)}
        if method == self.method and found:
            self.refused |= found
            raise OutOfDeviceMemory("this needs more memory than is free")

    def quality(self, schedules, split, batch):
        self._check("quality", schedules)
        return super().quality(schedules, split, batch)

    def latency(self, schedules, *arguments):
        self._check("latency", schedules.values())
        return super().latency(schedules, *arguments)


def short_study(folder, method, needs_too_much, **options):
    made = study(folder, **{"trials": 8, "budget": "80%", **options})
    made.evaluator = made.executor.evaluator = Short(made.evaluator, method, needs_too_much)
    return made


@pytest.mark.parametrize("method", ["quality", "latency"])
def test_too_little_memory_leaves_a_trial_unmeasured_and_a_resume_measures_it(tmp_path, method):
    most = 0.5 * tokens(exact(6).expand(square((1, 2, 3, 4, 6, 8)), 3))
    short = short_study(tmp_path / "run", method, lambda steps: tokens(steps) < most)
    first = short.run()
    refused = short.evaluator.refused
    assert refused and first.failures and all("not measured here" in f.error for f in first.failures)
    assert {c.state for c in first.candidates} == {"complete", "not measured"}
    again = study(tmp_path / "run", trials=8, budget="80%").run()
    assert not again.failures and {c.state for c in again.candidates} == {"complete"}
    missed = {c.key for c in first.candidates if c.state == "not measured"}
    assert missed <= {c.key for c in again.candidates}


def test_a_study_of_which_nothing_fits_ends_as_infrastructure(tmp_path):
    full = tokens(exact(6).expand(square((1, 2, 3, 4, 6, 8)), 3))
    for name, needs_too_much in {"others": lambda steps: tokens(steps) < full, "all": lambda steps: True}.items():
        with pytest.raises(OutOfDeviceMemory):
            short_study(tmp_path / name, "latency", needs_too_much, trials=3).run()


def test_a_finalist_that_finds_too_little_memory_leaves_the_others(tmp_path):
    made = short_study(
        tmp_path / "run", "latency", lambda steps: False, evaluator_options={"drop": lambda steps: 0.0}, trials=12
    )
    finalists = made.finalists

    def chosen():
        found = finalists()
        assert len(found) > 1
        made.evaluator.needs_too_much = lambda steps: steps == made.ledger.steps[found[0].key]
        return found

    made.finalists = chosen
    result = made.run()
    verified = [c for c in result.candidates if isinstance(c, Finalist)]
    assert verified and result.verdict == "verified"
    assert [f.error for f in result.failures] == ["not measured here: this needs more memory than is free"]


def test_failures_and_missing_memory_are_two_things():
    assert issubclass(NotMeasured, Failed) and not issubclass(OutOfDeviceMemory, DeviceBroken)
