"""What earlier versions wrote still loads and continues, and what is printed changes on purpose only (tests.frozen)."""

import json
import shutil
import sys

import pytest

from stagevar.profile import Profile
from tests import frozen
from tests.fakes.studies import study
from tuner.cli import main
from tuner.results.candidate import Finalist, Measured
from tuner.results.result import StudyResult

SHIPPED = [(command, verb) for command, verbs in frozen.COMMANDS.items() for verb in verbs]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse lays its help out otherwise from Python 3.13 on")
@pytest.mark.parametrize("command, verb", SHIPPED, ids=[f"{command} {verb}".strip() for command, verb in SHIPPED])
def test_help_is_as_frozen(command, verb):
    expected = frozen.help_path(command, verb).read_text(encoding="utf-8")
    assert frozen.help_text(command, verb) == expected, "if this is meant: python -m tests.frozen"


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    shutil.copy(frozen.SAMPLE / "study.json", folder)
    frozen.write_derived(folder)
    return folder


@pytest.mark.parametrize("name", [*frozen.DERIVED, "report.txt"])
def test_what_is_derived_from_a_study_is_as_frozen(derived, name):
    assert (derived / name).read_text(encoding="utf-8") == (frozen.SAMPLE / name).read_text(encoding="utf-8")


def test_a_frozen_study_is_written_as_it_was_read():
    result = StudyResult.load(frozen.SAMPLE)
    text = result.to_json()
    assert StudyResult.from_json(text) == result
    old, new = json.loads((frozen.SAMPLE / "study.json").read_text(encoding="utf-8")), json.loads(text)
    assert list(old) == list(new) and old == new


def test_the_report_command_tells_of_a_study_without_a_bound_of_its_gain(tmp_path, capsys):
    for path in frozen.SAMPLE.iterdir():
        shutil.copy(path, tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "images come out 1.88x [1.85, 1.91] as fast" in capsys.readouterr().out


def test_a_frozen_profile_is_loaded_and_written_as_it_was(tmp_path):
    profile = Profile.load(frozen.SAMPLE / "profile.yaml")
    assert profile.verified and profile.schedule.to_dict() == StudyResult.load(frozen.SAMPLE).pick.schedule
    profile.save(tmp_path / "again.yaml")
    assert Profile.load(tmp_path / "again.yaml") == profile


def test_a_frozen_run_resumes_with_its_schedules_and_its_claims(tmp_path):
    for name in frozen.RUN_FILES:
        shutil.copy(frozen.RUN / name, tmp_path)
    before = StudyResult.load(frozen.RUN)
    resumed = study(tmp_path, **frozen.RUN_OPTIONS)
    result = resumed.run()
    after = StudyResult.load(tmp_path)
    assert before.verdict == "verified"
    assert (result.verdict, result.reason, result.picks) == (before.verdict, before.reason, before.picks)
    for old, new in zip(before.candidates, after.candidates, strict=True):
        if isinstance(old, Finalist) and old.verification.status == "verified":
            assert new == old
        else:  # finalists that were not verified are timed again
            assert new.becomes(Measured) == old.becomes(Measured)
    assert resumed.evaluator.quality_calls == 0
    evidence = (frozen.RUN / "trials.jsonl").read_bytes()
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(evidence)
