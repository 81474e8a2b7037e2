"""kill -9 at any moment: every resume reaches the target, nothing finished is lost or doubled; locks and torn lines."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from stagevar.errors import UsageError
from stagevar.schedule import exact
from tests.fakes.studies import GRIDS, drive, study
from tuner.proposals.trial_sampler import ATTEMPTS, TrialOutcome, TrialSampler
from tuner.results.result import StudyResult
from tuner.results.run_dir import EVIDENCE_FILE, JOURNAL_FILE, EvidenceLog, cut_torn_line, driver_lock, repair

TRIALS = 30


@pytest.fixture(scope="module")
def spawn():
    """Starts a driver in a process of its own, forked from a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.fakes.studies", "tuner.study.study", "stagevar.models.nano.scenes", "PIL.Image"]
    )

    def start(run_dir, trials=TRIALS):
        process = context.Process(target=drive, args=(str(run_dir), trials))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def full_seconds(spawn, tmp_path_factory):
    """How long a whole run takes here, to spread the kills over it."""
    warm = spawn(tmp_path_factory.mktemp("warm"), 2)
    warm.join()
    start = time.monotonic()
    whole = spawn(tmp_path_factory.mktemp("whole"))
    whole.join()
    assert (warm.exitcode, whole.exitcode) == (0, 0)
    return time.monotonic() - start


def trials_of(run_dir):
    return [r["candidate"] for r in EvidenceLog(run_dir).read() if r["kind"] == "trial"]


def told(run_dir):
    """Trial number -> times told COMPLETE, from the journal's own lines."""
    lines = [json.loads(line) for line in (run_dir / JOURNAL_FILE).read_text().splitlines()]
    return Counter(line["trial_id"] for line in lines if line["op_code"] == 6 and line.get("state") == 1)


def check_whole(run_dir, before):
    after = trials_of(run_dir)
    assert after[: len(before)] == before, "a finished trial was lost or changed"
    assert len({c["trial"] for c in after}) == len({c["key"] for c in after}) == len(after) == TRIALS
    complete = told(run_dir)
    assert set(complete.values()) == {1}, "a trial was told twice"
    # Trials whose driver was killed three times are recorded as failed; all others were told.
    assert {c["trial"] for c in after if c["state"] == "complete"} <= set(complete)
    assert len(StudyResult.load(run_dir).candidates) == TRIALS


@pytest.mark.parametrize("moment", range(20))
def test_killed_at_a_random_moment_a_run_reaches_its_target(spawn, full_seconds, tmp_path, moment):
    process = spawn(tmp_path)
    process.join(timeout=full_seconds * random.Random(moment).uniform(0.02, 0.98))
    process.kill()
    process.join()
    before = trials_of(tmp_path) if tmp_path.exists() else []
    resumed = spawn(tmp_path)
    resumed.join()
    assert resumed.exitcode == 0
    check_whole(tmp_path, before)


@pytest.mark.parametrize("moment", range(3))
def test_killed_while_another_process_proposes_a_run_reaches_its_target(tmp_path, moment):
    """Its proposing process ends with it, whatever it was at; a new driver goes on at once."""
    dies_at = 4 + 9 * moment
    command = [sys.executable, "-m", "tests.fakes.studies", str(tmp_path), str(TRIALS), str(dies_at)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    before = trials_of(tmp_path)
    assert dies_at <= len(before) < TRIALS
    drive(tmp_path, TRIALS)
    check_whole(tmp_path, before)


def test_killed_again_and_again_a_run_still_reaches_its_target(spawn, full_seconds, tmp_path):
    rng, before = random.Random(99), []
    for _ in range(4):
        process = spawn(tmp_path)
        process.join(timeout=full_seconds * rng.uniform(0.1, 0.5))
        process.kill()
        process.join()
        after = trials_of(tmp_path)
        assert after[: len(before)] == before
        before = after
    drive(tmp_path, TRIALS)
    check_whole(tmp_path, before)


def stop_inside(run_dir, monkeypatch, method):
    """Runs a study that dies at its fifth call of a TrialSampler method, as kill -9 would leave it."""
    calls, whole = iter(range(100)), getattr(TrialSampler, method)

    class Killed(BaseException):
        pass

    def dying(self, *args, **options):
        if next(calls) == 4:
            raise Killed
        return whole(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TrialSampler, method, dying)
        with pytest.raises(Killed):
            study(run_dir, trials=TRIALS).run()


def test_evidence_that_was_not_told_is_told_on_resume(tmp_path, monkeypatch):
    stop_inside(tmp_path, monkeypatch, "tell")
    before = trials_of(tmp_path)
    assert len(before) == 5 and len(told(tmp_path)) == 4
    drive(tmp_path, TRIALS)
    check_whole(tmp_path, before)


def test_a_trial_killed_between_two_constraints_is_completed(tmp_path):
    space = study(tmp_path).space
    trial_sampler = TrialSampler(tmp_path, space, 0, ["latency", "drop"], "random")
    proposal = trial_sampler.ask()
    from optuna.trial import Trial

    Trial(trial_sampler.study, trial_sampler._id(proposal.trial)).set_constraint("latency", -0.5)
    again = TrialSampler(tmp_path, space, 0, ["latency", "drop"], "random")
    assert again.recover({proposal.trial: TrialOutcome(50.0, 0.0, {"latency": -0.5, "drop": 0.1})}) == []
    (frozen,) = again.study.trials
    assert frozen.constraints == {"latency": -0.5, "drop": 0.1} and again.completed() == {proposal.trial}


def test_a_running_trial_without_evidence_is_tried_again_twice_at_most(tmp_path):
    space = study(tmp_path).space
    first = TrialSampler(tmp_path, space, 0, ["latency", "drop"], "random")
    asked = first.ask()
    values = asked.values
    first.begin([asked.trial])
    for attempt in range(ATTEMPTS):
        again = TrialSampler(tmp_path, space, attempt, ["latency", "drop"], "random")
        given_up = again.recover({})
        if attempt < ATTEMPTS - 1:
            asked = again.ask()
            assert given_up == [] and asked.values == values
            again.begin([asked.trial])
        else:
            assert [p.values for p in given_up] == [values]
            assert again.ask().values != values
    assert [t.state.name for t in again.study.trials] == ["FAIL"] * ATTEMPTS + ["RUNNING"]


def test_a_trial_that_was_asked_ahead_and_never_begun_is_not_to_blame(tmp_path):
    space = study(tmp_path).space
    values = TrialSampler(tmp_path, space, 0, ["latency", "drop"], "random").ask().values
    for attempt in range(2 * ATTEMPTS):
        again = TrialSampler(tmp_path, space, attempt, ["latency", "drop"], "random")
        assert again.recover({}) == [] and again.ask().values == values


def test_what_is_withdrawn_comes_first_when_the_study_goes_on(tmp_path):
    space = study(tmp_path).space
    trial_sampler = TrialSampler(tmp_path, space, 0, ["latency", "drop"], "random")
    trial_sampler.enqueue({"stagevar-paper": space.nearest_values(exact(len(GRIDS)), GRIDS)})
    asked = [trial_sampler.ask(), trial_sampler.ask()]
    for proposal in asked:
        trial_sampler.withdraw(proposal.trial)
    again = TrialSampler(tmp_path, space, 1, ["latency", "drop"], "random")
    assert again.recover({}) == []
    assert [(p.preset, p.values) for p in (again.ask(), again.ask())] == [(p.preset, p.values) for p in asked]


def test_presets_are_enqueued_once_whenever_the_driver_died(tmp_path):
    space = study(tmp_path).space
    presets = {"stagevar-paper": space.nearest_values(exact(len(GRIDS)), GRIDS)}
    for _ in range(3):
        TrialSampler(tmp_path, space, 0, ["latency"], "random").enqueue(presets)
    trial_sampler = TrialSampler(tmp_path, space, 0, ["latency"], "random")
    assert [trial_sampler.ask().preset for _ in range(2)] == ["stagevar-paper", None]


def test_a_missing_constraint_is_refused(tmp_path):
    trial_sampler = TrialSampler(tmp_path, study(tmp_path).space, 0, ["latency", "drop"], "random")
    with pytest.raises(ValueError, match="drop"):
        trial_sampler.tell(trial_sampler.ask().trial, TrialOutcome(1.0, 0.0, {"latency": 0.0}))


@pytest.mark.parametrize("name", [JOURNAL_FILE, EVIDENCE_FILE])
def test_a_torn_last_line_costs_that_line_only(tmp_path, name):
    drive(tmp_path, 4)
    before = trials_of(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 6, "wor')
    assert any(name in line for line in repair(tmp_path))
    assert path.read_bytes() == whole
    drive(tmp_path, TRIALS)
    check_whole(tmp_path, before)


def test_cutting_a_file_without_any_newline_empties_it(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a" * 200_000)
    assert cut_torn_line(path) == 200_000 and path.read_bytes() == b""
    path.write_bytes(b"one\n" + b"b" * 100_000)
    assert cut_torn_line(path) == 100_000 and path.read_bytes() == b"one\n"
    assert cut_torn_line(tmp_path / "absent") == 0


def test_the_journal_lock_of_a_dead_driver_is_removed(tmp_path):
    drive(tmp_path, 3)
    os.symlink(tmp_path / JOURNAL_FILE, tmp_path / f"{JOURNAL_FILE}.lock")
    drive(tmp_path, TRIALS)
    check_whole(tmp_path, [])
    assert not (tmp_path / f"{JOURNAL_FILE}.lock").is_symlink()


def test_one_driver_at_a_time(tmp_path):
    with driver_lock(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()} on "), driver_lock(tmp_path):
        pass
    with driver_lock(tmp_path):
        pass


def test_damaged_evidence_is_named(tmp_path):
    Path(tmp_path / EVIDENCE_FILE).write_text('{"kind": "trial"}\nnonsense\n')
    with pytest.raises(UsageError, match="line 2"):
        EvidenceLog(tmp_path).read()
