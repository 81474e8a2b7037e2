"""The proposing process: what one here does, and what happens when it or its parent dies."""

import os
import time

import pytest

from stagevar.errors import StagevarError
from tests.fakes.studies import study
from tuner.proposals.sampler_process import SamplerLost, SamplerProcess
from tuner.proposals.trial_sampler import TrialOutcome


@pytest.fixture
def trial_sampler(tmp_path):
    made = SamplerProcess(tmp_path, study(tmp_path / "run").space, 0, ("latency", "drop"), "random")
    yield made
    made.close()


def test_a_trial_sampler_in_another_process_does_what_one_here_does(tmp_path, trial_sampler):
    from tuner.proposals.trial_sampler import TrialSampler

    (tmp_path / "here").mkdir()
    here = TrialSampler(tmp_path / "here", study(tmp_path / "run").space, 0, ("latency", "drop"), "random")
    for _ in range(5):
        ours, theirs = trial_sampler.ask(), here.ask()
        assert ours == theirs
        trial_sampler.begin([ours.trial])
        trial_sampler.tell(ours.trial, TrialOutcome(1.0, 0.5, {"latency": 0.0, "drop": 0.0}))
    assert trial_sampler.completed() == set(range(5)) and len(trial_sampler.ask_seconds) == 5
    assert trial_sampler.proposes == "random"
    with pytest.raises(ValueError, match="constraints"):
        trial_sampler.tell(trial_sampler.ask().trial, TrialOutcome(1.0, 0.5, {"latency": 0.0}))


def test_a_trial_sampler_that_dies_is_one_clear_line(trial_sampler):
    trial_sampler.ask()
    (process,) = trial_sampler._pool._processes.values()
    process.kill()
    with pytest.raises(SamplerLost, match="same command resumes") as caught:
        for _ in range(100):
            trial_sampler.ask()
            time.sleep(0.05)
    assert isinstance(caught.value, StagevarError) and caught.value.exit_code == 6


def test_an_error_of_its_construction_comes_through(tmp_path):
    made = SamplerProcess(tmp_path, study(tmp_path / "run").space, 0, ("latency",), "random", "nodb://nowhere/x")
    with pytest.raises(StagevarError, match="nodb"):
        made.ask()
    made.close()


def test_closing_ends_the_process(tmp_path):
    made = SamplerProcess(tmp_path, study(tmp_path / "run").space, 0, ("latency", "drop"), "random")
    made.ask()
    (process,) = made._pool._processes.values()
    made.close()
    assert not process.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
