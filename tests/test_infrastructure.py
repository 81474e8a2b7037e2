"""Exit code 6: what a run stands on gave way; no schedule is failed for it, and the same command resumes."""

import pytest

from stagevar.errors import InfrastructureError, StagevarError
from tests.fakes import FakeEvaluator, study
from tuner.asking import ProposerLost
from tuner.executors.base import WorkersLost


class Breaking(FakeEvaluator):
    """Its device breaks at the n-th call of a method and stays broken."""

    def __init__(self, whole: FakeEvaluator, method: str, calls: int):
        self.__dict__.update(whole.__dict__)
        self.method, self.left = method, calls

    def _use(self, method):
        if method == self.method:
            self.left -= 1
        if self.left < 0:
            raise InfrastructureError("device fake:0 is broken; restart it, the same command resumes")

    def quality(self, *arguments):
        self._use("quality")
        return super().quality(*arguments)

    def latency(self, *arguments):
        self._use("latency")
        return super().latency(*arguments)

    def step_ms(self, *arguments):
        self._use("step_ms")
        return super().step_ms(*arguments)


def test_the_classes_of_infrastructure_have_their_own_exit_code():
    for kind in (InfrastructureError, WorkersLost, ProposerLost):
        assert issubclass(kind, StagevarError) and kind.exit_code == 6


@pytest.mark.parametrize(
    ("method", "calls"),
    [("latency", 0), ("quality", 1), ("step_ms", 0), ("quality", 6), ("quality", 12), ("latency", 1)],
)
def test_a_broken_device_fails_no_trial_and_the_study_resumes(tmp_path, method, calls):
    options = {"trials": 6, "budget": "80%"}
    whole = study(tmp_path / "whole", **options).run()
    broken = study(tmp_path / "run", **options)
    broken.evaluator = broken.executor.evaluator = Breaking(broken.evaluator, method, calls)
    with pytest.raises(InfrastructureError, match="device fake:0"):
        broken.run()
    resumed = study(tmp_path / "run", **options).run()
    assert not resumed.failures and len(resumed.candidates) == len(whole.candidates)
    assert all(candidate.state != "failed" for candidate in resumed.candidates)
    assert resumed.verdict == whole.verdict
