"""Where workers are started and what a study waits for, with a cluster and a clock that are told what happens."""

import os
import sys
from types import SimpleNamespace

import pytest

from stagevar.errors import UsageError
from stagevar.models.request import ModelRequest
from tests.fakes.ray import Affinity, FakeRay
from tests.fakes.studies import CHUNKS, GRIDS
from tuner import cli
from tuner.cluster import executor as executor_module
from tuner.cluster.executor import PLACING_S, RayExecutor
from tuner.cluster.worker import Recipe, Worker
from tuner.config import checks
from tuner.evaluation.evaluator import EvaluationInfo
from tuner.evaluation.executor import WorkersLost

FACTS = EvaluationInfo("fake", GRIDS, CHUNKS, (48, 48), {})


@pytest.fixture
def begin(monkeypatch):
    """Starts an executor on a fake cluster; its lines are kept in `lines`."""

    def started(listed, free, arguments=None, events=(), **options):
        ray = FakeRay(listed, FACTS, free, list(events))
        monkeypatch.setattr(executor_module, "connect", lambda address: lambda: None)
        monkeypatch.setattr(executor_module, "require", lambda: ray)
        monkeypatch.setattr(executor_module, "time", ray)
        monkeypatch.setitem(
            sys.modules, "ray.util.scheduling_strategies", SimpleNamespace(NodeAffinitySchedulingStrategy=Affinity)
        )
        started.ray, started.lines = ray, []
        return RayExecutor(Recipe("a:b", arguments or {}), say=started.lines.append, **options)

    return started


def states(executor):
    return [slot.state for slot in executor.dispatcher.slots.values()]


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_a_study_starts_on_the_gpu_that_is_free_and_times_there(begin, engine):
    """The first of two GPUs is somebody else's."""
    executor = begin({"taken": {"GPU": 1}, "free": {"GPU": 1}}, {"taken": 0, "free": 1}, {"engine": engine})
    assert executor.time("latency", [()])[0][1].node == "free"
    while executor.dispatcher.slots["taken:0"].state == "placing":
        executor.advance(grow=True)
    assert states(executor) == ["waiting", "ready"]
    for _ in range(100):
        executor.advance(grow=True)
    assert [line for line in begin.lines if "waits" in line] == ["worker taken:0 waits for a free GPU"]
    assert not executor.dispatcher.counts, "a worker that waits has not failed"
    begin.ray.free["taken"] = 1
    while states(executor) != ["ready", "ready"]:
        executor.advance(grow=True)


def test_a_timing_goes_on_beside_a_worker_that_waits_on_the_same_machine(begin):
    executor = begin({"node": {"GPU": 2}}, {"node": 1})
    assert executor.time("latency", [()])[0][0] == "timing"
    assert sorted(states(executor)) == ["ready", "waiting"] and begin.ray.now < PLACING_S + 5


def test_a_cluster_without_a_free_gpu_ends_the_study_with_the_reason(begin):
    with pytest.raises(
        WorkersLost, match="the cluster has no free GPU: worker node:0 waited for 300 s; once one is free"
    ):
        begin({"node": {"GPU": 1}}, {"node": 0})
    assert begin.ray.actors == [], "nothing is left in Ray's queue"


def test_ctrl_c_is_heard_while_no_gpu_is_free(begin):
    with pytest.raises(KeyboardInterrupt):
        begin({"node": {"GPU": 1}}, {"node": 0}, stop=lambda: begin.ray.now > 10)
    assert begin.ray.now < 20


def test_gpus_that_join_before_any_worker_could_start_are_used(begin):
    """The head has no CPUs to offer, and the first node with GPUs is late."""
    nodes = {"head": {"memory": 1.0}}
    late = [(10.0, lambda: nodes.update(gpus={"GPU": 2, "CPU": 8}))]
    executor = begin(nodes, {"gpus": 2}, events=late)
    while states(executor) != ["ready", "ready"]:
        executor.advance(grow=True)
    assert {actor.wanted["num_gpus"] for actor in begin.ray.actors} == {1} and executor.dispatcher.own_gpus
    assert begin.lines[0] == "the cluster has no GPU or CPU yet; waiting up to 300 s for nodes to join"


def test_a_kind_of_gpu_is_waited_for_and_never_replaced_by_cpus(begin):
    with pytest.raises(WorkersLost, match="the cluster has no GPU of kind 'H100'") as lost:
        begin({"head": {"CPU": 8}}, {"head": 8}, gpu_kind="H100")
    assert lost.value.exit_code == 6 and 300 <= begin.ray.now < 310
    nodes = {"head": {"CPU": 8}}
    late = [(10.0, lambda: nodes.update(gpu={"GPU": 1, "accelerator_type:H100": 1}))]
    executor = begin(nodes, {"head": 8, "gpu": 1}, events=late, gpu_kind="H100")
    assert list(executor.dispatcher.slots) == ["gpu:0"]
    with pytest.raises(UsageError, match=r"no GPU of kind 'H100' in the cluster \(1 x L40\)"):
        begin({"node": {"GPU": 1, "accelerator_type:L40": 1}}, {"node": 1}, gpu_kind="H100")


def test_a_cluster_without_gpus_is_used_and_a_line_says_so(begin):
    executor = begin({"head": {"CPU": 3}}, {"head": 2}, threads=2)
    assert list(executor.dispatcher.slots) == ["head:0"] and begin.lines[0] == "no GPU in the cluster: using CPUs"


def test_workers_on_cpus_see_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for own_gpu, visible in ((True, "0,1"), (False, "")):
        Worker("node", own_gpu)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("words", [["--engine", "graph"], ["--device", "cuda"], ["--device", "cuda:3"]])
def test_a_driver_without_a_gpu_accepts_what_workers_with_one_can_do(monkeypatch, tmp_path, words):
    """`Worker.load` refuses what its own machine lacks, and a worker's UsageError ends the study (test_ray.py)."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    request = ModelRequest("nano", device="auto" if "--engine" in words else words[1])
    engine = words[1] if "--engine" in words else None
    checks.check_running(request, threads=1, engine=engine, here=False)
    with pytest.raises(UsageError, match=r"needs a CUDA device|does not exist"):
        checks.check_running(request, threads=1, engine=engine)
    with pytest.raises(UsageError, match="unknown engine"):
        checks.check_running(request, threads=1, engine="grph", here=False)


def test_the_command_with_ray_checks_no_device_of_the_driver(monkeypatch):
    asked = []
    monkeypatch.setattr(checks, "check_running", lambda *args, here, **options: asked.append(here))
    words = ["--model", "nano", "--weights", "random", "--budget", "60%", "--dry-run"]
    for executor in ("ray", "local"):
        assert cli.main([*words, "--executor", executor]) == 0
    assert asked == [False, True]
