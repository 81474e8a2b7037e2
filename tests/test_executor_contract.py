"""What every executor keeps: each task once, the values of the evaluator itself, failures to themselves."""

import numpy as np
import pytest

from stagevar.schedule import exact, preset
from tests import cluster_fakes
from tests.fakes import CHUNKS, GRIDS
from tuner.cluster.executor import RayExecutor
from tuner.evaluation.executor import Failed, QualityTask
from tuner.evaluation.local import LocalExecutor

FULL = exact(len(GRIDS)).expand(GRIDS, CHUNKS)
PAPER, SKIP = (preset(name, GRIDS).expand(GRIDS, CHUNKS) for name in ("stagevar-paper", "skip-1"))
TREE = (FULL, PAPER, SKIP)


def tasks(batches=range(8), schedules=TREE, split="search"):
    return [QualityTask(schedules, split, batch) for batch in batches]


def same(outcomes, expected):
    return len(outcomes) == len(expected) and all(
        own.keys() == other.keys() and all(np.array_equal(own[m], other[m]) for m in other)
        for own, other in zip(outcomes, expected, strict=True)
    )


class ExecutorContract:
    """Subclasses give `executor` and `faulty`, whose evaluator raises for schedules that skip a scale."""

    def test_every_task_comes_back_once_with_the_evaluators_values(self, executor, plain):
        found = {task.batch: outcomes for task, outcomes in executor.run(tasks())}
        assert sorted(found) == list(range(8))
        assert all(same(found[b], plain.quality(TREE, "search", b)) for b in found)

    def test_fewer_tasks_than_workers_change_nothing(self, executor, plain):
        [(task, outcomes)] = executor.run(tasks([3]))
        assert task == tasks([3])[0] and same(outcomes, plain.quality(TREE, "search", 3))

    def test_a_task_given_twice_is_answered_twice(self, executor, plain):
        task = tasks([1])[0]
        answers = list(executor.run([task, task]))
        assert [t for t, _ in answers] == [task, task]
        assert all(same(outcomes, plain.quality(TREE, "search", 1)) for _, outcomes in answers)

    def test_both_sets_of_prompts(self, executor, plain):
        [(_, outcomes)] = executor.run(tasks([2], split="heldout"))
        assert same(outcomes, plain.quality(TREE, "heldout", 2))

    def test_no_tasks_give_nothing(self, executor):
        assert list(executor.run([])) == []

    def test_a_task_without_schedules_is_answered_with_nothing(self, executor):
        empty, full = QualityTask((), "search", 0), tasks([1])[0]
        answers = dict(executor.run([empty, full]))
        assert answers[empty] == [] and len(answers[full]) == len(TREE)

    def test_a_call_that_was_given_up_leaves_no_trace(self, executor, plain):
        abandoned = executor.run(tasks())
        next(abandoned)
        abandoned.close()
        found = {task.batch: outcomes for task, outcomes in executor.run(tasks([0, 5]))}
        assert sorted(found) == [0, 5]
        assert all(same(found[b], plain.quality(TREE, "search", b)) for b in found)

    def test_timings_keep_the_ratio_to_the_full_schedule_round_by_round(self, executor, plain):
        """The fake's timings drift from round to round, all schedules alike, in each process in its own way."""
        timings = executor.evaluator.latency({"baseline": FULL, "paper": PAPER, "skip": SKIP}, 5)
        assert list(timings) == ["baseline", "paper", "skip"]
        assert all(len(timing.samples_ms) == 5 and timing.warmed for timing in timings.values())
        full = np.array(timings["baseline"].samples_ms)
        assert len(set(full)) == 5
        for name, steps in (("paper", PAPER), ("skip", SKIP)):
            np.testing.assert_allclose(timings[name].samples_ms / full, plain.ratio(steps), rtol=1e-12)

    def test_a_schedule_that_raises_takes_no_other_with_it(self, faulty, plain):
        for task, (full, paper, skip) in faulty.run(tasks([0, 1, 2])):
            assert same([full, paper], plain.quality((FULL, PAPER), "search", task.batch))
            assert isinstance(skip, Failed) and skip.error == "RuntimeError: this schedule is broken"


@pytest.fixture
def plain(tmp_path):
    return cluster_fakes.build(str(tmp_path))


class TestLocal(ExecutorContract):
    @pytest.fixture
    def executor(self, tmp_path):
        return LocalExecutor(cluster_fakes.build(str(tmp_path)))

    @pytest.fixture
    def faulty(self, tmp_path):
        return LocalExecutor(cluster_fakes.build(str(tmp_path), broken_skips=True))


class TestRay(ExecutorContract):
    @pytest.fixture(scope="class")
    def executor(self, ray_cluster, tmp_path_factory):
        executor = RayExecutor(cluster_fakes.recipe(tmp_path_factory.mktemp("contract")))
        yield executor
        executor.close()

    @pytest.fixture(scope="class")
    def faulty(self, ray_cluster, executor, tmp_path_factory):
        executor.close()  # the cluster has one GPU for each worker
        faulty = RayExecutor(cluster_fakes.recipe(tmp_path_factory.mktemp("faulty"), broken_skips=True))
        yield faulty
        faulty.close()
