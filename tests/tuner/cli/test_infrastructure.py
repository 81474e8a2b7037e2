"""Exit code 6: what a run stands on gave way; no schedule is failed for it, and the same command resumes."""

import pytest

from stagevar.errors import EXIT_CODES, InfrastructureError, StagevarError, UsageError
from tests import ROOT
from tests.fakes.studies import FakeEvaluator, study
from tuner.evaluation.executor import WorkersLost
from tuner.proposals.sampler_process import SamplerLost


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
    for kind in (InfrastructureError, WorkersLost, SamplerLost):
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


def test_a_database_that_goes_away_is_infrastructure_and_the_study_resumes(tmp_path):
    from optuna.exceptions import StorageInternalError

    url = f"sqlite:///{tmp_path}/studies.db"
    options = {"trials": 4, "storage": url}
    broken = study(tmp_path / "run", **options)
    search = broken._new_search()
    storage = search.trial_sampler.study._storage

    def away(*_, **__):
        raise StorageInternalError("An exception is raised during the commit.") from ConnectionError("refused")

    storage.set_trial_state_values = away
    broken._new_search = lambda: search
    if hasattr(storage, "_backend"):
        storage._backend.set_trial_state_values = away
    with pytest.raises(InfrastructureError, match=r"does not answer.*the same command resumes"):
        broken.run()
    assert study(tmp_path / "run", **options).run().verdict != "failed"


def test_a_database_that_is_gone_when_a_run_resumes_is_infrastructure_but_a_wrong_url_is_usage(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    options = {"trials": 2, "storage": f"sqlite:///{folder}/studies.db"}
    study(tmp_path / "run", **options).run()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(InfrastructureError, match="does not answer"):
        study(tmp_path / "run", **{**options, "trials": 3}).run()
    with pytest.raises(UsageError, match="cannot be opened"):
        study(tmp_path / "other", **options).run()


def test_exit_codes_are_listed_once_and_alike():

    from tuner.cli.tune import build_parser
    from tuner.results.result import EXIT_CODES as VERDICTS

    text = " ".join(build_parser().format_help().split())
    readme = (ROOT / "README.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text and f"| {code} | {meaning} |" in readme
    assert [verdict for verdict, code in VERDICTS.items() if code == 5] == ["inconclusive", "unverified"]
    assert set(VERDICTS.values()) <= set(EXIT_CODES)
