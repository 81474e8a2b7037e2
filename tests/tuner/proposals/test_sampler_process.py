"""The proposing process: what one here does, and what happens when it or its parent dies."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stagevar.errors import StagevarError
from tests.fakes.studies import study
from tuner.proposals.sampler_process import SamplerLost, SamplerProcess
from tuner.proposals.trial_sampler import TrialOutcome
from tuner.results.run_dir import driver_lock


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
    os.kill(trial_sampler.pid, signal.SIGKILL)
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
    made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(made.pid, 0)


#: As in the README: nothing says `if __name__ == "__main__"`. The first argument is a directory, the second "wait" or "end".
SCRIPT = """
import sys, time
from pathlib import Path
from tuner.config.space_file import load_space
from tuner.proposals.sampler_process import SamplerProcess

print("began", flush=True)
made = SamplerProcess(Path(sys.argv[1]), load_space("nano"), 0, ("latency",), "random")
print(made.ask().trial, made.pid, flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
made.close()
"""


@pytest.mark.process
def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    (tmp_path / "five_lines.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "five_lines.py", str(tmp_path), "end"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    began, asked = done.stdout.splitlines()
    assert began == "began" and asked.startswith("0 ")


def test_the_next_driver_waits_until_a_dead_ones_process_writes_no_more(tmp_path, trial_sampler):
    """Both would write the journal, and the newer one removes the lock that the older one holds on it."""
    trial_sampler.completed()  # it has been built, and holds the directory until it ends
    held = threading.Event()

    def drive():
        with driver_lock(tmp_path):
            held.set()

    thread = threading.Thread(target=drive)
    thread.start()
    assert not held.wait(0.5)
    trial_sampler.close()
    thread.join()
    assert held.is_set()


@pytest.mark.process
def test_it_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "waits.py").write_text(SCRIPT)
    script = [sys.executable, "waits.py", str(tmp_path), "wait"]
    with subprocess.Popen(script, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "began\n"
        _, pid = parent.stdout.readline().split()
        parent.kill()
    state = ["ps", "-o", "stat=", "-p", pid]  # a zombie that nobody waits for has ended, too
    for _ in range(200):
        left = subprocess.run(state, capture_output=True, text=True).stdout.strip()
        if not left or left.startswith("Z"):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} outlived its parent by ten seconds")
