"""Tuning from Python: options as on the command line, the run as an object, the same run from either side."""

import threading

import pytest

import tuner
from stagevar.errors import UsageError
from stagevar.profile import Profile
from tests import frozen
from tests.fakes import studies as fakes
from tuner import Tuned, open_run, tune
from tuner.api import _words
from tuner.cli import main
from tuner.cli import tune as tune_command


@pytest.fixture
def fake_models(monkeypatch):
    """Studies of any model run on a make-believe one; the list of their commands."""
    commands = []

    def build(checked, progress, stop):
        commands.append(checked.command)
        return fakes.study(checked.run_dir, trials=checked.args.trials, command=checked.command, stop=stop)

    monkeypatch.setattr(tune_command, "build_study", build)
    return commands


def test_a_study_from_python_and_what_comes_of_it(fake_models, tmp_path, capsys):
    result = tune("nano", budget="60%", trials=6, out=tmp_path / "run", progress=False)
    assert isinstance(result, Tuned) and capsys.readouterr() == ("", "")
    assert result.run_dir == tmp_path / "run" and result.report.read_text().startswith("<!")
    assert len(result.trials) >= 6 and result.trials["state"].iloc[0] == "complete"
    assert result.trials["latency_ms"].dtype.kind == "f"
    assert [p.latency.median_ms for p in result.pareto] == sorted(p.latency.median_ms for p in result.pareto)
    assert str(result).startswith(result.verdict.replace("_", " ")) and "<b>" in result._repr_html_()
    assert (result.profile is not None) == (result.run_dir / "profile.yaml").exists()


def test_the_shell_shows_the_study_that_python_ran(fake_models, tmp_path, capsys):
    result = tune("nano", "60%", trials=5, out=tmp_path / "run", progress=False)
    again = tune("nano", "60%", trials=5, out=tmp_path / "run", progress=False)
    assert again.study == result.study == open_run(tmp_path / "run").study
    words = ["--model", "nano", "--budget", "60%", "--trials", "5", "--out", str(tmp_path / "run")]
    assert main([*words, "--quiet"]) == result.study.exit_code
    assert capsys.readouterr().out.startswith(str(result))
    assert len(set(fake_models)) == 1


def test_progress_is_lines_without_a_terminal_and_works_in_a_thread(fake_models, tmp_path, capsys):
    results = []
    thread = threading.Thread(target=lambda: results.append(tune("nano", "60%", trials=4, out=tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].run_dir == tmp_path / "run"
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("report: ") for line in said) and len(said) == len(set(said))


def test_options_become_the_words_of_a_shell():
    words = _words({"trials": 3, "max_drop": {"clip_score": 0.3}, "fresh": True, "exhaustive": False, "seed": None})
    assert words == ["--trials", "3", "--max-drop", "clip_score=0.3", "--fresh"]
    assert _words({"max_drop": ["2%", "clip_score=0.3"]}) == ["--max-drop", "2%", "--max-drop", "clip_score=0.3"]
    assert _words({"seed": -1}) == ["--seed=-1"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trails": 3}, "tune has no option 'trails', did you mean trials?"),
        ({"json": True}, "tune has no option 'json'"),
        ({"fresh": "yes"}, "option fresh is 'yes', but it is a switch"),
        ({"trials": 0}, "'0' must be a whole number of at least 1"),
        ({"budget": "soon"}, "budget 'soon'"),
        ({"model": "nanu"}, "nano"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        tune(**{"model": "nano", "budget": "60%", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_before_is_opened():
    result = open_run(frozen.SAMPLE)
    assert result.verified and result.profile == Profile.load(frozen.SAMPLE / "profile.yaml")
    assert set(result.trials["key"]) >= set(result.study.front)


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(UsageError, match="holds no finished study"):
        open_run(tmp_path)


def test_names_are_listed_and_others_refused():
    assert dir(tuner) == ["Tuned", "open_run", "tune"]
    with pytest.raises(AttributeError, match="no attribute 'tnue'"):
        tuner.tnue  # noqa: B018
