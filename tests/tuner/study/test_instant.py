"""--effort instant: a schedule from step costs and from what is known, nothing judged and nothing claimed."""

import dataclasses
import io
import shlex

import pytest
import yaml

from stagevar.errors import EXIT_CODES as MEANINGS
from stagevar.profile import Profile
from stagevar.testing.tiny import tiny_infinity
from tests.fakes.studies import FULL_TOKENS, SPACE, FakeEvaluator, study, tokens
from tuner.cli.console import write_derived
from tuner.config.space_file import parse_space
from tuner.report.next_steps import next_steps
from tuner.results.candidate import Finalist
from tuner.study.instant import InstantStudy
from tuner.study.options import SearchShortcuts
from tuner.study.predicted_front import load_table
from tuner.study.progress import Progress
from tuner.study.study import Options


def drop(steps):
    return 0.6 if steps[-1].skipped else 0.3 * (1 - tokens(steps) / FULL_TOKENS)


class NoImages(FakeEvaluator):
    """Times only."""

    def quality(self, *_):
        raise AssertionError("an image was judged")

    def images(self, *_):
        raise AssertionError("an image was drawn")


def instant(path, space=(), progress=None, **options):
    """An instant study on a fake that would not judge anything."""
    one = study(path / "unused")
    options = {
        "budget": one.options.budget,
        "command": "stagevar-tune --model fake --budget 60% --effort instant",
        **options,
    }
    path.mkdir(exist_ok=True)
    checked = parse_space({**SPACE, **dict(space)})
    return InstantStudy(
        path, checked, Options(**options), NoImages(one.prompts, drop, noise=0.0), one.prompts, progress=progress
    )


def test_without_an_earlier_study_published_settings_are_timed_and_the_least_accelerated_is_picked(tmp_path):
    one = instant(tmp_path, {"enqueue": ["stagevar-paper", "fastvar", "skip-1"]})
    result = one.run()
    assert (result.verdict, result.exit_code) == ("unverified", 5) and "verified" in MEANINGS[5]
    assert "no quality was measured" in result.reason and "published" in result.reason
    within = [c for c in result.candidates if c.latency.ratio.mean <= 0.6]
    assert result.pick in within and result.pick.source.startswith("enqueued")
    assert result.pick.processed_tokens == max(c.processed_tokens for c in within)
    assert not result.pick.values and not result.samples and not isinstance(result.pick, Finalist)


def test_the_spaces_own_proposals_come_before_published_settings(tmp_path):
    proposals = {"mine": {"structure_end": 3, "rank_ratios": [0.1]}}
    result = instant(tmp_path, {"proposals": proposals}).run()
    assert result.pick.source == "enqueued: mine"


def test_an_earlier_studys_sensitivities_choose(tmp_path):
    space = {"prompts": {"source": "nano", "search": 64, "heldout": 64, "micro_batch": 8}}
    shortcuts = SearchShortcuts(overlap=False, sensitivity=True)
    study(tmp_path / "a", {"drop": drop}, space, trials=4, max_drop=0.3, shortcuts=shortcuts).run()
    earlier = load_table(tmp_path / "a", "fake")
    result = instant(tmp_path / "b", earlier=earlier).run()
    assert "an earlier study's sensitivities" in result.reason and "predicted to use up" in result.reason
    assert not result.pick.skipped_scales, "they say what the last scale costs"
    assert result.pick.latency.ratio.mean <= 0.6
    assert load_table(tmp_path / "b", "fake").to_data() == earlier.to_data(), "kept for the next one"


def test_a_budget_that_nothing_known_meets_picks_nothing(tmp_path):
    from tuner.config.limits import parse_budget

    result = instant(tmp_path, budget=parse_budget("21%")).run()
    assert result.verdict == "unverified" and result.pick is None and "use --effort quick" in result.reason


def test_profile_report_and_last_lines_say_that_nothing_was_verified(tmp_path):
    result = instant(tmp_path).run()
    write_derived(result, tmp_path)
    profile = Profile.load(tmp_path / "profile.yaml")
    assert profile.verified is False and profile.verdict.startswith("unverified: ")
    assert profile.quality.measured is False
    assert profile.warnings_here(tiny_infinity(), profile.envelope) == [
        "not verified: no image was judged (--effort instant)"
    ]
    assert yaml.safe_load((tmp_path / "pareto.yaml").read_text())
    assert "Unverified" in (tmp_path / "report.html").read_text()
    said = next_steps(result, tmp_path, result.command.split())
    assert said.lines[0].startswith("not proved: ") and "--effort quick" in said.commands[0]
    assert "deploy" not in said.lines[1]


def test_progress_says_nothing_of_judging(tmp_path):
    stream = io.StringIO()
    instant(tmp_path, progress=Progress(stream=stream)).run()
    lines = stream.getvalue().splitlines()
    assert "baseline: timing the full schedule" in lines and "judging" not in stream.getvalue()
    assert "timing: timing steps, then a few schedules end to end" in lines


def test_random_weights_are_not_advised_to_judge_images(tmp_path):
    result = dataclasses.replace(instant(tmp_path).run(), random_weights=True)
    words = ["--model", "fake", "--budget", "60%", "--effort", "instant", "--weights", "random"]
    said = next_steps(result, tmp_path, words)
    assert "next: judge images and verify" not in said.lines
    latency, trained = map(shlex.split, said.commands)
    assert "random" in latency and "quick" in latency
    assert "--weights" not in trained and "quick" in trained


@pytest.mark.parametrize("times", [1, 2])
def test_the_same_command_again_ends_alike(tmp_path, times):
    for _ in range(times):
        result = instant(tmp_path).run()
    assert result.verdict == "unverified" and result.pick is not None
