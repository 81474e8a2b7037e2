"""Both executors against the published contract (tuner.testing.executors)."""

import pytest

from tuner.cluster.executor import RayExecutor
from tuner.cluster.worker import Recipe
from tuner.evaluation.local import LocalExecutor
from tuner.testing.executors import ExecutorContract
from tuner.testing.formulas import build

BUILD = "tuner.testing.formulas:build"


class TestLocal(ExecutorContract):
    @pytest.fixture
    def executor(self):
        return LocalExecutor(build())

    @pytest.fixture
    def faulty(self):
        return LocalExecutor(build(broken_skips=True))


class TestRay(ExecutorContract):
    @pytest.fixture(scope="class")
    def executor(self, ray_cluster):
        executor = RayExecutor(Recipe(BUILD))
        yield executor
        executor.close()

    @pytest.fixture(scope="class")
    def faulty(self, ray_cluster, executor):
        executor.close()  # the cluster has one GPU for each worker
        faulty = RayExecutor(Recipe(BUILD, {"broken_skips": True}))
        yield faulty
        faulty.close()
