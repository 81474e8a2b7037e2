"""What clusters do to a study: workers killed, stuck or poisoned, nodes lost and joined, kinds mixed, drivers killed.

Nothing here waits a fixed time; where a test needs something to be stuck, it is stuck until it is killed.
"""

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stagevar.errors import DeviceBroken, UsageError
from stagevar.schedule import exact, preset
from tests import ROOT
from tests.conftest import claims
from tests.fakes import cluster as cluster_fakes
from tests.fakes.studies import CHUNKS, GRIDS
from tests.repository.test_house import run_without
from tuner.cluster import connection
from tuner.cluster import worker as worker_module
from tuner.cluster.dispatcher import QUARANTINE_AFTER, Dispatcher, WorkerSlot, cut
from tuner.cluster.executor import RayExecutor
from tuner.cluster.remote_evaluator import MEASUREMENTS_FILE, RemoteEvaluator
from tuner.cluster.worker import Place, Recipe, Worker
from tuner.evaluation.evaluator import EvaluationInfo
from tuner.evaluation.executor import Failed, QualityTask, WorkersLost
from tuner.testing.executors import same, tasks
from tuner.testing.formulas import FULL, PAPER, SKIP, TREE

BATCHES = list(range(8))


@pytest.fixture
def start(ray_cluster, tmp_path):
    """Starts an executor on the fakes, whose files are in tmp_path; closes it."""
    started = []

    def begin(recipe=None, **options):
        lines = []
        options = {"task_timeout_s": 120.0, "patience_s": 0.0, **options}
        started.append(RayExecutor(recipe or cluster_fakes.recipe(tmp_path), say=lines.append, **options))
        started[-1].lines = lines
        return started[-1]

    yield begin
    for executor in started:
        executor.close()


@pytest.fixture
def plain(tmp_path_factory):
    return cluster_fakes.build(str(tmp_path_factory.mktemp("plain")))


def check_all(executor, plain, schedules=TREE):
    """Every micro-batch once, with the values of the evaluator in this process."""
    asked = [QualityTask(schedules, "search", batch) for batch in BATCHES]
    answers = [(task.batch, outcomes) for task, outcomes in executor.run(asked)]
    assert sorted(batch for batch, _ in answers) == BATCHES
    assert all(same(outcomes, plain.quality(schedules, "search", batch)) for batch, outcomes in answers)


def node_ids(executor):
    return [seat.node for seat in executor.dispatcher.slots.values() if seat.state == "ready"]


def wait_until_all_are_ready(executor):
    deadline = time.monotonic() + 300
    while any(seat.state == "loading" for seat in executor.dispatcher.slots.values()) or len(node_ids(executor)) < 2:
        assert time.monotonic() < deadline, {seat.id: seat.state for seat in executor.dispatcher.slots.values()}
        if any(seat.busy or seat.state == "held" for seat in executor.dispatcher.slots.values()):
            executor.advance(grow=True)
        else:  # nothing to wait for: a node that was just added is not in Ray's list at once
            executor.read_nodes(grow=True)
            time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------- values


def test_a_real_model_gives_the_same_images_in_a_worker_bit_for_bit(start):
    here = cluster_fakes.tiny_model()
    executor = start(Recipe("tests.fakes.cluster:tiny_model"))
    from stagevar.testing.tiny import GRIDS as TINY

    schedules = tuple(s.expand(TINY, 2) for s in (exact(5), preset("stagevar-paper", TINY), preset("skip-1", TINY)))
    for task, outcomes in executor.run([QualityTask(schedules, "search", b) for b in (0, 1)]):
        assert same(outcomes, here.quality(schedules, "search", task.batch))


def test_trees_are_cut_where_their_schedules_part():
    for pieces, expected in ((1, 1), (2, 2), (3, 3), (9, 3)):
        parts = cut(TREE, pieces)
        assert len(parts) == expected and sorted(i for part in parts for i in part) == [0, 1, 2]
    assert sorted(map(sorted, cut((FULL, SKIP, FULL, SKIP), 2))) == [[0, 2], [1, 3]]


def test_a_study_on_the_cluster_finds_what_the_local_one_finds(start, tmp_path):
    local, remote = study(tmp_path / "local"), None
    expected = local.run()
    executor = start(run_dir=tmp_path)
    remote = study(tmp_path / "remote", executor)
    found = remote.run()
    assert [c.key for c in found.candidates] == [c.key for c in expected.candidates]
    assert [c.values for c in found.candidates] == [c.values for c in expected.candidates]
    assert found.baseline.values == expected.baseline.values
    assert (found.trials, found.verdict) == (expected.trials, expected.verdict)
    lines = measurements(tmp_path)
    assert os.getpid() not in {line["process"] for line in lines}
    assert {line["what"] for line in lines} >= {"latency", "steps"}
    whole = [line for line in lines if line["what"] == "latency"]
    assert all(line["sentinel"] == "baseline" and "baseline" in line["samples_ms"] for line in whole)


def study(run_dir, executor=None, trials=10):
    """A study on the fake with noiseless timings, here or on a cluster."""
    from tests.fakes import studies as fakes

    made = fakes.study(run_dir, {"noise": 0.0}, {"prompts": cluster_fakes.PROMPTS}, trials=trials)
    if executor is not None:
        made.executor, made.evaluator = executor, executor.evaluator
    return made


def test_the_command_line_runs_a_study_on_the_cluster(ray_cluster, tmp_path):
    from tuner.cli import main

    options = ["--model", "nano", "--weights", "random", "--budget", "95%", "--trials", "1", "--quiet"]
    out = tmp_path / "run"
    code = main([*options, "--sampler", "random", "--executor", "ray", "--out", str(out)])
    study_file = json.loads((out / "study.json").read_text())
    assert code == study_file["exit_code"] and len(study_file["candidates"]) == 1
    assert {line["process"] for line in measurements(out)} - {os.getpid()}


def measurements(run_dir):
    return [json.loads(line) for line in (run_dir / MEASUREMENTS_FILE).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- failures


def test_a_killed_worker_is_rebuilt_and_its_batch_is_evaluated_again(start, plain, tmp_path):
    executor = start()
    (tmp_path / "die-3").touch()
    check_all(executor, plain)
    assert executor.dispatcher.counts["rebuilds"] == 1 and executor.dispatcher.counts["quarantined"] == 0


def test_a_stuck_worker_is_killed_and_its_batch_goes_elsewhere(start, plain, tmp_path):
    executor = start(task_timeout_s=3.0)
    (tmp_path / "hang-2").touch()
    check_all(executor, plain)
    assert executor.dispatcher.counts["timeouts"] == 1 and executor.dispatcher.counts["rebuilds"] == 1
    assert any("no answer within 3 s" in line for line in executor.lines)


def test_a_schedule_that_kills_its_process_loses_itself_only(start, plain, tmp_path):
    executor = start(cluster_fakes.recipe(tmp_path, poison_skips=True))
    for task, (full, paper, skip) in executor.run(tasks(BATCHES)):
        assert same([full, paper], plain.quality((FULL, PAPER), "search", task.batch))
        assert isinstance(skip, Failed) and "workers; last error" in skip.error
    assert executor.dispatcher.counts["quarantined"] == 0


def test_three_failures_in_a_row_quarantine_a_worker_and_the_other_finishes(start, plain, tmp_path):
    executor = start()
    wait_until_all_are_ready(executor)
    bad = next(iter(executor.dispatcher.slots.values()))
    (tmp_path / f"doom-{bad.node}").touch()
    for count in range(1, 1 + QUARANTINE_AFTER):
        check_all(executor, plain, TREE[:count])  # other schedules each time: no schedule is to blame
        if bad.state != "quarantined":
            wait_until_all_are_ready(executor)
    assert executor.dispatcher.counts["quarantined"] == 1
    check_all(executor, plain)


def test_the_death_of_a_worker_during_timing_moves_its_share(start, plain, tmp_path):
    executor = start(run_dir=tmp_path)
    wait_until_all_are_ready(executor)
    (tmp_path / "die-latency").touch()
    timings = executor.evaluator.latency({"baseline": FULL, "a": PAPER, "b": SKIP}, 5)
    assert executor.dispatcher.counts["rebuilds"] == 1
    for name, steps in (("a", PAPER), ("b", SKIP)):
        ratios = np.divide(timings[name].samples_ms, timings["baseline"].samples_ms)
        np.testing.assert_allclose(ratios, [plain.ratio(steps)] * 5, rtol=1e-12)
    lines = measurements(tmp_path)
    assert [set(line["samples_ms"]) for line in lines] == [{"baseline", "a"}, {"baseline", "b"}]
    assert all({"node", "gpu", "host", "process", "device", "measured"} <= line.keys() for line in lines)


class TestHealthyWorkers:
    """One executor whose two workers are ready; nothing here breaks them."""

    @pytest.fixture(scope="class")
    def executor(self, ray_cluster, tmp_path_factory):
        directory, lines = tmp_path_factory.mktemp("healthy"), []
        executor = RayExecutor(cluster_fakes.recipe(directory), run_dir=directory, say=lines.append)
        executor.lines = lines
        wait_until_all_are_ready(executor)
        yield executor
        executor.close()

    def test_timing_is_spread_over_gpus_and_the_sentinel_cancels_their_speed(self, executor, plain):
        schedules = {"baseline": FULL, "a": PAPER, "b": SKIP, "c": preset("skip-2", GRIDS).expand(GRIDS, CHUNKS)}
        first = executor.evaluator.latency({"baseline": FULL}, 3)
        home = executor.dispatcher.slots[executor.dispatcher.timer]
        [other] = [seat for seat in executor.dispatcher.slots.values() if seat is not home]
        slow = executor.run_dir / f"slow-{other.node}"
        slow.write_text("1.5")
        found = executor.evaluator.latency(schedules, 7)
        slow.unlink()
        assert list(found) == list(schedules) and len(first["baseline"].samples_ms) == 3

        alone, here, there = measurements(executor.run_dir)[-3:]
        assert alone["node"] == here["node"] == home.node and there["node"] == other.node
        assert list(here["samples_ms"]) == ["baseline", "a", "c"] and list(there["samples_ms"]) == ["baseline", "b"]
        assert (
            min(there["samples_ms"]["baseline"]) >= 150
        )  # as measured: the fake's full schedule takes 100 ms and more
        # What the study gets: this GPU's milliseconds, and every ratio as it was measured beside its own sentinel.
        assert list(found["baseline"].samples_ms) == here["samples_ms"]["baseline"]
        full = np.array(found["baseline"].samples_ms)
        for name in "abc":
            np.testing.assert_allclose(found[name].samples_ms / full, plain.ratio(schedules[name]), rtol=1e-12)

    def test_without_the_full_schedule_there_is_no_sentinel_and_one_worker_times(self, executor):
        assert set(executor.evaluator.latency({"a": PAPER, "b": SKIP}, 2)) == {"a", "b"}
        line = measurements(executor.run_dir)[-1]
        assert line["sentinel"] is None and set(line["samples_ms"]) == {"a", "b"}

    def test_several_kinds_of_gpu_are_refused_until_one_is_chosen(self, executor, monkeypatch):
        nodes = {
            "a": {"GPU": 8, "accelerator_type:H100": 1},
            "b": {"GPU": 4, "accelerator_type:L40": 1},
            "c": {"CPU": 4},
        }
        monkeypatch.setattr(executor, "gpu_kind", None)
        with pytest.raises(
            UsageError, match=r"has several kinds of GPU \(8 x H100, 4 x L40\); choose one with --gpu-kind"
        ):
            executor.chosen(nodes)
        executor.gpu_kind = "h100"
        assert list(executor.chosen(nodes)) == ["a"]
        assert executor.lines[-1] == "ignoring node b (L40): this study runs on h100"
        monkeypatch.setattr(executor, "dispatcher", Dispatcher(own_gpus=True))
        executor.gpu_kind = "A100"
        with pytest.raises(UsageError, match=r"no GPU of kind 'A100' in the cluster \(8 x H100, 4 x L40\)"):
            executor.chosen(nodes)


def test_step_costs_are_spread_and_keep_their_shares_of_the_full_schedule(plain, tmp_path):
    """Two GPUs, the second slower, both drifting from round to round."""
    schedules = (PAPER, FULL, SKIP, preset("skip-2", GRIDS).expand(GRIDS, CHUNKS))
    cost = {steps[: i + 1]: 1 + steps[i].processed_tokens(CHUNKS) for steps in schedules for i in range(len(steps))}
    cost[()] = 3.0

    class Cluster:
        timers = 2

        def time(self, method, calls):
            self.calls = calls
            rng = np.random.default_rng(len(calls))
            answers = []
            for gpu, (walked, rounds) in enumerate(calls):
                speed = (1.0, 1.7)[gpu]
                drift = speed * (1 + rng.random(rounds))
                prefixes = {(), *(steps[: i + 1] for steps in walked for i in range(len(steps)))}
                place = Place("node", "host", 1, f"GPU-{gpu}")
                answers.append(({prefix: tuple(cost[prefix] * drift) for prefix in prefixes}, place))
            self.first, _ = answers[0]
            return answers

    cluster = Cluster()
    cluster.run_dir = tmp_path
    remote = RemoteEvaluator(cluster, plain.facts)
    found = remote.step_ms(schedules, 3)
    assert [walked[0] for walked, _ in cluster.calls] == [FULL, FULL]
    assert {s for walked, _ in cluster.calls for s in walked[1:]} == set(schedules) - {FULL}
    assert found.keys() == cost.keys()
    full_R = np.sum([found[FULL[: i + 1]] for i in range(len(FULL))], axis=0)
    full_cost = sum(cost[FULL[: i + 1]] for i in range(len(FULL)))
    for prefix, samples in found.items():
        np.testing.assert_allclose(samples / full_R, cost[prefix] / full_cost, rtol=1e-12)
    assert all(found[prefix] == samples for prefix, samples in cluster.first.items())  # the first GPU's milliseconds
    assert [(line["what"], line["gpu"]) for line in measurements(tmp_path)] == [("steps", "GPU-0"), ("steps", "GPU-1")]
    remote.step_ms((FULL,), 3)
    assert [walked for walked, _ in cluster.calls] == [(FULL,)]


def test_an_evaluator_that_cannot_be_built_stops_at_once_with_the_reason(start):
    with pytest.raises(UsageError, match="weights x do not exist"):
        start(Recipe("tests.fakes.cluster:refuse", {"reason": "weights x do not exist"}))


def test_workers_that_die_while_loading_are_given_up(start):
    with pytest.raises(WorkersLost, match="rerun the command to resume"):
        start(Recipe("tests.fakes.cluster:collapse"))


def test_a_baseline_that_fails_ends_the_study_after_one_batch(start, tmp_path):
    executor = start(cluster_fakes.recipe(tmp_path, broken_all=True))
    result = study(tmp_path / "run", executor).run()
    assert (result.verdict, result.exit_code) == ("failed", 4)
    assert "the full schedule failed: RuntimeError: this schedule is broken" in result.reason


def test_lost_workers_fail_no_trial(tmp_path):
    class Lost:
        def latency(self, *_):
            raise WorkersLost("no worker is left")

    made = study(tmp_path)
    made.evaluator = Lost()
    with pytest.raises(WorkersLost):
        made.run()
    assert not (tmp_path / "trials.jsonl").exists()


# ---------------------------------------------------------------------------------------------------- nodes


def test_a_dead_nodes_batches_go_to_others_and_a_new_node_is_used(start, plain, ray_cluster, tmp_path):
    executor = start()
    wait_until_all_are_ready(executor)
    doomed = next(iter(ray_cluster.worker_nodes))
    (tmp_path / f"hold-{doomed.node_id}").touch()
    answers = []
    for task, outcomes in executor.run(tasks(BATCHES)):
        answers.append((task.batch, outcomes))
        if len(answers) == 1:  # the doomed node sits on a batch of its own
            ray_cluster.remove_node(doomed, allow_graceful=False)
    assert sorted(batch for batch, _ in answers) == BATCHES
    assert all(same(outcomes, plain.quality(TREE, "search", batch)) for batch, outcomes in answers)
    deadline = time.monotonic() + 180
    while not executor.dispatcher.counts["lost"] and time.monotonic() < deadline:
        executor.read_nodes(grow=False)  # Ray calls a dead node alive for a while, longer than the batches took
        time.sleep(0.1)
    assert executor.dispatcher.counts["lost"] == 1 and executor.dispatcher.counts["quarantined"] == 0

    joined = ray_cluster.add_node(**claims("FAKE"))
    wait_until_all_are_ready(executor)
    assert joined.node_id in node_ids(executor)
    check_all(executor, plain)


# ---------------------------------------------------------------------------------------------------- driver


def test_a_killed_driver_loses_and_doubles_no_trial(ray_cluster, tmp_path):
    """The driver is killed by a worker in mid-round; the same command ends the study."""
    (tmp_path / "driver-5").touch()
    command = [sys.executable, "-m", "tests.fakes.cluster_driver", str(tmp_path), ray_cluster.address]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run" / "study.json").exists()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-2000:]
    from tuner.results.result import StudyResult

    result = StudyResult.load(tmp_path / "run")
    expected = study(tmp_path / "local").run()
    assert len(result.candidates) == len(expected.candidates) == 10
    assert len({c.key for c in result.candidates}) == 10
    trials = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    numbers = [line["candidate"]["trial"] for line in trials if line["kind"] == "trial"]
    assert len(numbers) == len(set(numbers)) == 10
    # On how many prompts a schedule is judged depends on those known before it, and a killed round is asked again later.
    shared = {c.key: c.values for c in expected.candidates}
    for candidate in result.candidates:
        for metric, values in shared.get(candidate.key, {}).items():
            both = min(len(values), len(candidate.values[metric]))
            assert both and candidate.values[metric][:both] == values[:both]


# ---------------------------------------------------------------------------------------------------- the worker itself


def test_a_broken_cuda_context_ends_the_process(monkeypatch, tmp_path):
    left = []
    monkeypatch.setattr(worker_module.os, "_exit", left.append)
    worker = Worker("node")
    worker.load(cluster_fakes.recipe(tmp_path, broken_skips=True))
    assert isinstance(worker.quality(QualityTask((SKIP,), "search", 0)).value[0], Failed)
    assert left == [], "the schedule failed, not the device"

    def broken(*_):
        raise DeviceBroken("cuda:0 is broken (device-side assert triggered)")

    for method, call in {
        "quality": lambda: worker.quality(QualityTask((FULL,), "search", 0)),
        "latency": lambda: worker.timed("latency", {"full": FULL}, 1),
        "images": lambda: worker.images(FULL, "search", 0),
    }.items():
        monkeypatch.setattr(worker.evaluator, method, broken, raising=False)
        call()
    assert left == [worker_module.BROKEN_CUDA] * 3


@pytest.mark.parametrize(
    "words", [["--model", "nano", "--budget", "60%", "--executor", "ray"], ["sweep", "grid.yaml", "--out", "sweep"]]
)
def test_without_ray_the_extra_is_named_and_nothing_is_written(words, tmp_path):
    (tmp_path / "grid.yaml").write_text("models: [nano]\nbudgets: [60%]")
    code = f"""
import os; os.chdir({str(tmp_path)!r})
from tuner.cli import main
sys.exit(main({words!r}))
"""
    result = run_without(("ray",), f"sys.path.insert(0, {str(ROOT)!r})\n{code}")
    assert result.returncode == 2
    assert result.stderr.strip().endswith("running on a cluster needs ray: pip install 'stagevar-tune[ray]'")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_without_ray_a_study_runs_to_its_verdict(tmp_path):
    result = run_without(("ray",), f"from tests.fakes.studies import drive; drive({str(tmp_path / 'run')!r}, 4)")
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "study.json").read_text())["verdict"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-address", "auto"], "need --executor ray"),
        (["--gpu-kind", "H100"], "need --executor ray"),
        (["--storage", "studies.db"], "must be a database URL"),
        (["--storage", "postgresql://me:secret@host/db"], "holds a password"),
        (["--task-timeout", "soon"], "soon"),
    ],
)
def test_options_of_placement_are_checked(options, message, capsys):
    from tuner.cli import main

    assert main(["--model", "nano", "--budget", "60%", "--dry-run", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and "secret" not in said


def test_a_cluster_of_our_own_asks_for_the_loopback_without_dashboard(monkeypatch):
    import ray

    asked = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    connection.connect(None)
    assert asked["address"] == "local" and asked["_node_ip_address"] == "127.0.0.1"
    assert asked["include_dashboard"] is False


@pytest.mark.cluster
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_a_cluster_of_our_own_listens_on_the_loopback_only():
    code = """
import json, os
for name in list(os.environ):
    if name.startswith("RAY_"):
        del os.environ[name]
from tuner.cluster.connection import connect
from tests.tuner.cluster.test_ray import listening
disconnect = connect(None)
print(json.dumps(listening(os.getpid())))
disconnect()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    addresses = json.loads(result.stdout)
    assert len(addresses) >= 3  # GCS, raylet, worker at the least
    assert set(addresses) <= {"127.0.0.1", "::1"}


def listening(root):
    """Addresses on which a process and its descendants accept TCP connections."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    sockets = set()
    for path in (path for pid in family for path in Path("/proc").glob(f"{pid}/fd/*")):
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(path))
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (row.split()[i] for i in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = bytes.fromhex(local.split(":")[0])
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                address = ipaddress.ip_address(packed)
                found.append(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def test_an_unreachable_cluster_is_a_usage_error(monkeypatch):
    import ray

    def refuse(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UsageError, match="no Ray cluster at 'auto'"):
        connection.connect("auto")


# ---------------------------------------------------------------------------------------------------- storage


def test_trials_in_a_database_are_those_of_the_journal(tmp_path):
    from tests.fakes import studies as fakes

    url = f"sqlite:///{tmp_path}/studies.db"
    expected = fakes.study(tmp_path / "journal", trials=6).run()
    found = fakes.study(tmp_path / "one", trials=5, storage=url).run()
    assert not (tmp_path / "one" / "journal.log").exists()
    more = fakes.study(tmp_path / "one", trials=8, storage=url).run()
    fakes.study(tmp_path / "two", trials=4, storage=url, seed=1).run()
    assert [c.key for c in found.candidates] == [c.key for c in expected.candidates][:5]
    assert len(more.candidates) == 8
    import optuna

    names = optuna.get_all_study_names(storage=url)
    assert len(names) == 2 and {name.split()[1] for name in names} == {"one", "two"}


def test_a_database_that_cannot_be_opened_is_a_usage_error(tmp_path):
    from tests.fakes import studies as fakes

    with pytest.raises(UsageError, match="cannot be opened"):
        fakes.study(tmp_path, trials=2, storage=f"sqlite:///{tmp_path}/no/such/folder/x.db").run()


def test_values_of_the_fake_differ_between_schedules(plain):
    """Else equal values would prove nothing."""
    full, paper, skip = (
        np.concatenate([plain.quality((s,), "search", b)[0]["quality"] for b in BATCHES]) for s in TREE
    )
    assert not np.array_equal(full, paper) and not np.array_equal(full, skip)


def test_one_worker_chooses_the_engine_and_the_others_take_it():
    from stagevar.profile.sections import EngineSection

    executor = object.__new__(RayExecutor)
    executor.recipe, executor._resource, executor.facts = Recipe("a:b", {"engine": "auto"}), "GPU", None
    executor.say = lambda line: None
    executor.dispatcher = Dispatcher(own_gpus=True)
    for name in "abc":
        executor.dispatcher.add(WorkerSlot(name, "node", "host"))
    built = []

    def build(seat):
        seat.state = "loading"
        built.append((seat.id, executor.recipe.arguments["engine"]))

    executor._build = build
    executor._build_held()
    executor._build_held()
    assert built == [("a", "auto")], "the others wait"
    executor.dispatcher.slots["a"].state = "quarantined"
    executor._build_held()
    assert [name for name, _ in built] == ["a", "b"], "the next one chooses where the first failed"
    choice = EngineSection("graph", "auto", "60 ms")
    facts = EvaluationInfo("fake", GRIDS, CHUNKS, (48, 48), {}, engine="graph", engine_choice=choice)
    executor._admit(executor.dispatcher.slots["b"], facts, Place("node", "host", 1))
    executor._build_held()
    assert built[2:] == [("c", choice)]
