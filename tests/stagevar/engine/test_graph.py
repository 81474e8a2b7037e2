"""The graph engine's logic on a CPU: recorded operations are replayed over the same fixed buffers as a CUDA graph's."""

import contextlib
import dataclasses
import gc

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.relaunch import RelaunchRecorder
from stagevar.engine import CudaRecorder, GraphEngine, RecordingFailed, build_engine
from stagevar.errors import UsageError
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, StageSchedule, exact, fastvar
from stagevar.tensors.attention import attend, attention_kernels, order_of, prefer_attention
from stagevar.tensors.noise import PromptNoise
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.fakes.cuda import CUDA, NoWaiting, begin_on_fake_cuda, fake_mode
from tests.stagevar.engine.tape import TapeRecorder

FULL = exact(len(GRIDS)).expand(GRIDS, 2)
SCHEDULES = {
    "full": FULL,
    "paper": StageSchedule(3, cfg_delay=0, rank_ratios=(0.5, 0.2)).expand(GRIDS, 2),
    "rows": StageSchedule(3, rank_ratios=(0.4,), projection="rows", rope="index", site="trunk").expand(GRIDS, 2),
    "top": StageSchedule(3, rank_ratios=(0.4,), projection="top", rope="index").expand(GRIDS, 2),
    "skip": StageSchedule(3, cfg_delay=0, branch="cond", skip=(2, 4)).expand(GRIDS, 2),
    "fused": StageSchedule(3, cfg_delay=0, branch="cond", fuse_layer=3).expand(GRIDS, 2),
    "fastvar": fastvar(GRIDS).expand(GRIDS, 2),
}


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


def test_a_walk_over_a_tree_shares_recordings(model):
    """Depth-first with rewinds, as the tuner walks: every distinct prefix is one recording."""
    from tuner.evaluation.prefix_tree import walk

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


def ratios(*values: float):
    return StageSchedule(3, cfg_delay=0, rank_ratios=values).expand(GRIDS, 2)


def test_decoding_in_the_middle_of_a_walk_spoils_nothing(model):
    """The decoder is recorded before the second prefix, replayed below it, and the prefix is read once more."""
    from tuner.evaluation.prefix_tree import walk

    schedules = [FULL, ratios(0.5, 0.2), ratios(0.5, 0.6), ratios(0.5, 0.9)]
    sampler, _ = graph_sampler(model)
    eager = Sampler(model)
    prompts, seeds = BATCHES[0]
    for _ in range(2):
        got = {}
        walk(sampler, sampler.begin(prompts, seeds), schedules, lambda rows, x: got.update(dict.fromkeys(rows, x)))  # noqa: B023
        for index, steps in enumerate(schedules):
            assert np.array_equal(got[index], images(eager, steps, prompts, seeds, False))


def test_a_prefix_is_not_dropped_while_what_follows_a_skipped_scale_reads_it(model):
    sampler, engine = graph_sampler(model, max_nodes=6)
    eager = Sampler(model)
    prompts, seeds = BATCHES[0]
    early = StageSchedule(1, cfg_delay=0).expand(GRIDS, 2)
    for steps in (SCHEDULES["skip"], early, SCHEDULES["skip"]):
        expected = images(eager, steps, prompts, seeds, False)
        assert np.array_equal(images(sampler, steps, prompts, seeds, False), expected)
        (resident,) = engine._residents.values()
        assert all(engine._rooted(resident, steps) for steps in resident.nodes)


def test_a_recorded_draw_reads_only_what_its_source_keeps():
    """Draws of many other sizes and batches later it still gives what an eager draw gives."""

    def draw(prompts, count):
        noise = PromptNoise(prompts, range(len(prompts)), "cpu")
        return noise, lambda: noise.at(3, BOTH).site_normal("projection", "chunk", (count,))

    noise, run = draw(["a", "b"], 7)
    replay, (out,) = TapeRecorder().record(lambda: [run()], lambda: None)
    for size in range(1, 80):
        draw(["x"] * size, 4 * size)[1]()
    gc.collect()
    replay()
    assert noise is not None and torch.equal(out, run())


class Refusing(TapeRecorder):
    """Records so many computations, then nothing more."""

    def __init__(self, accepts: int):
        super().__init__()
        self.accepts = accepts

    def record(self, run, reset, separate_pool=False):
        self.accepts -= 1
        if self.accepts < 0:
            run()  # the warm-up, after which the capture fails
            reset()
            raise RecordingFailed("operation not permitted when stream is capturing")
        return super().record(run, reset, separate_pool)


@pytest.mark.parametrize("accepts", [0, 1, 3, 4])
def test_what_cannot_be_recorded_runs_eagerly_and_says_why(model, accepts):
    engine = GraphEngine(Refusing(accepts))
    sampler, eager = Sampler(model, engine=engine), Sampler(model)
    with pytest.warns(UserWarning, match="engine graph falls back to eager: operation not permitted") as warned:
        for prompts, seeds in (*BATCHES, BATCHES[0]):
            expected = images(eager, SCHEDULES["skip"], prompts, seeds, True)
            assert np.array_equal(images(sampler, SCHEDULES["skip"], prompts, seeds, True), expected)
    assert len([w for w in warned if "falls back to eager" in str(w.message)]) == 1
    assert engine.fallback_reason == "operation not permitted when stream is capturing"
    assert engine.recorded == max(0, accepts - 1), "the first recording is the text's"
    assert engine.recording_s > 0


def test_errors_of_a_scale_itself_are_not_taken_for_failed_recordings(model):
    sampler, engine = graph_sampler(model)
    generation = sampler.begin(["a"], [0], steps=ratios(0.5))
    with pytest.raises(RuntimeError, match="KV cache of"):
        for step in FULL:
            sampler.advance(generation, step)
    assert engine.fallback_reason is None


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


def test_kernels_launched_one_by_one_over_the_same_buffers(model):
    """What benchmarks.engine --check compares graphs with."""
    sampler, eager = Sampler(model, engine=GraphEngine(RelaunchRecorder())), Sampler(model)
    for prompts, seeds in (*BATCHES, BATCHES[0]):
        for steps in (FULL, SCHEDULES["paper"]):
            expected = images(eager, steps, prompts, seeds, False)
            assert np.array_equal(images(sampler, steps, prompts, seeds, False), expected)


@pytest.fixture
def cudnn_preferred():
    prefer_attention("cudnn")
    yield
    prefer_attention("flash")


def priorities():
    return [torch.nn.attention.SDPBackend(value).name for value in torch._C._get_sdp_priority_order()]


def test_a_card_tries_flash_attention_first_and_never_cudnn_unless_told_otherwise():
    before = torch._C._get_sdp_priority_order()
    with attention_kernels(torch.device("cuda")):
        assert priorities()[:3] == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before, "nothing is left behind"
    with pytest.raises(UsageError, match="unknown attention 'fast'; use flash, cudnn, efficient, math"):
        prefer_attention("fast")


def test_masked_and_small_calls_never_take_cudnn(cudnn_preferred):
    """It would build a plan of a third of a second for every new shape."""
    assert order_of(masked=True, queries=4096) == order_of(masked=False, queries=256) == ["flash", "efficient", "math"]
    assert order_of(masked=False, queries=257) == ["cudnn", "flash", "efficient", "math"]
    with attention_kernels(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_large_calls_without_a_mask_take_cudnn_where_it_is_preferred(cudnn_preferred, monkeypatch):
    enabled, plain = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, **options):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return arguments[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with FakeTensorMode():
        large, small = (torch.empty(1, 2, n, 8, device="cuda:0") for n in (300, 200))
        with attention_kernels(torch.device("cuda")):
            attend(large, large, large)
            attend(small, small, small)
            attend(large, large, large, torch.empty(1, 1, 1, 300, device="cuda:0"))
    assert enabled == [True, False, False] and plain is not spy


class StandInCuda:
    """torch.cuda as far as CudaRecorder uses it: keeps the order of calls, and the stream that is current."""

    def __init__(self, monkeypatch, capture_fails: bool):
        self.calls, self.current, self.fails = [], "main", capture_fails
        for name in ("device", "stream", "graph", "set_stream", "synchronize", "graph_pool_handle", "memory_snapshot"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: StandInStream(self, self.current))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: StandInStream(self, "side"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device_now)
        monkeypatch.setattr(CudaRecorder, "_sides", {})
        self.device_now = 0
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda _: None})())
        self.pools = 0

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    @contextlib.contextmanager
    def device(self, device):
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.calls.append(("capture", pool, stream.name, capture_error_mode))
        self.current = stream.name
        yield
        if self.fails:
            raise RuntimeError("CUDA error: operation failed\nand much more")
        self.current = "main"

    def set_stream(self, stream):
        self.current = stream.name

    def synchronize(self):
        self.calls.append("synchronize")

    def memory_snapshot(self):
        return [{"segment_pool_id": (0, pool), "total_size": 10**pool} for pool in (0, 1, 2, 3)]


@dataclasses.dataclass
class StandInStream:
    cuda: StandInCuda
    name: str

    def wait_stream(self, other):
        self.cuda.calls.append((self.name, "waits for", other.name))


@pytest.mark.parametrize("separate_pool", [False, True])
def test_a_card_warms_up_and_captures_on_one_side_stream(monkeypatch, separate_pool):
    cuda = StandInCuda(monkeypatch, capture_fails=False)
    recorder = CudaRecorder(torch.device("cuda"))
    _, outputs = recorder.record(
        lambda: cuda.calls.append(("run", cuda.current)) or "outputs", lambda: cuda.calls.append("reset"), separate_pool
    )
    assert outputs == "outputs" and cuda.current == "main"
    warm_up = [("side", "waits for", "main"), ("run", "side"), ("main", "waits for", "side")]
    capture = ("capture", (0, 1 + separate_pool), "side", "thread_local")
    assert cuda.calls == [*warm_up, "reset", capture, ("run", "side")]
    assert recorder.memory_bytes() == 110, "segments of both pools, nobody else's"


def test_recorders_of_a_device_share_a_side_stream(monkeypatch):
    cuda = StandInCuda(monkeypatch, capture_fails=False)
    one, other = CudaRecorder(torch.device("cuda")), CudaRecorder(torch.device("cuda"))
    cuda.device_now = 1
    elsewhere = CudaRecorder(torch.device("cuda", 1))
    assert one._side is other._side and elsewhere._side is not one._side, "a workspace per sampler stays for good"
    assert len({*one._pools.values(), *other._pools.values()}) == 4


def test_a_failed_capture_leaves_the_card_usable(monkeypatch):
    cuda = StandInCuda(monkeypatch, capture_fails=True)
    with pytest.raises(RecordingFailed, match=r"^RuntimeError: CUDA error: operation failed$"):
        CudaRecorder(torch.device("cuda")).record(lambda: None, lambda: None)
    assert cuda.current == "main" and cuda.calls[-1] == "synchronize"


def test_engines_by_name():
    assert build_engine("eager", torch.device("cpu")).name == "eager"
    with pytest.raises(UsageError, match="engine graph needs a CUDA device, not cpu"):
        build_engine("graph", torch.device("cpu"))
    with pytest.raises(UsageError, match="unknown engine 'fast'"):
        build_engine("fast", torch.device("cpu"))


@pytest.mark.parametrize("kv_cache", ["model", "int8"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scale_never_waits_for_the_device(model, name, kv_cache):
    """As in the models' contract: no value is read, no size depends on one, nothing is copied between host and card."""
    with fake_mode(), torch.inference_mode():
        stored = dataclasses.replace(model, kv_cache=kv_cache)
        sampler, generation = begin_on_fake_cuda(stored, ["a red ring", "two stars"], SCHEDULES[name])
        for step in SCHEDULES[name]:
            with NoWaiting() as seen:
                sampler.advance(generation, step)
            assert (seen.kernels == 0) == step.skipped


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0], device=x.device),
        lambda x: x + torch.ones(3),
    ],
    ids=["item", "mask", "nonzero", "to host", "from host", "mixed"],
)
def test_waiting_for_the_device_is_noticed(wait):
    """What tests.fakes.cuda must refuse, lest the contract's test of it pass for nothing."""
    with fake_mode(), torch.inference_mode():
        x = torch.empty(3, device=CUDA)
        with pytest.raises((AssertionError, RuntimeError)), NoWaiting():  # fake tensors raise RuntimeErrors
            wait(x)
        with NoWaiting() as seen:
            (x * 2).sum()
        assert seen.kernels == 2
