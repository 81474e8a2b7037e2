"""--from: what an earlier run or profile found is proposed first, and nothing of its figures is taken over."""

import json

import pytest
import yaml

from stagevar.errors import UsageError
from stagevar.models import registry
from tests.fakes.studies import study
from tuner.cli import main
from tuner.config.space_file import load_space
from tuner.report.export import export
from tuner.results.earlier import earlier_schedules
from tuner.results.run_dir import STUDY_FILE


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A finished run on a made-up model of six scales."""
    folder = tmp_path_factory.mktemp("earlier")
    result = study(folder, {"drop": lambda steps: 0.0}, trials=6).run()
    (folder / STUDY_FILE).write_text(result.to_json())
    export(result, folder)
    return folder, result


def test_the_picks_come_first_then_the_front(earlier):
    folder, result = earlier
    found = earlier_schedules(folder, "fake", None)
    assert list(found) == [f"from-{n}" for n in range(1, len(found) + 1)]
    assert found["from-1"].to_dict() == result.pick.schedule
    wanted = {key for key in (*result.picks.values(), *result.front) if key != result.baseline.key}
    assert len(found) == len(wanted)


def test_a_profile_is_one_schedule(earlier):
    folder, result = earlier
    found = earlier_schedules(folder / "profile.yaml", "fake", None)
    assert {name: one.to_dict() for name, one in found.items()} == {"from-1": result.pick.schedule}


def test_another_model_another_number_of_scales_and_nothing_found_are_refused(earlier, tmp_path):
    folder, result = earlier
    with pytest.raises(UsageError, match="is of model 'fake', not 'nano'"):
        earlier_schedules(folder, "nano", None)
    with pytest.raises(UsageError, match="is of model 'fake', not 'nano'"):
        earlier_schedules(folder / "profile.yaml", "nano", None)
    with pytest.raises(UsageError, match="has 6 scales, but fake has 7 here"):
        earlier_schedules(folder, "fake", registry.scale_grids(TINY, None))
    empty = {**json.loads(result.to_json()), "picks": {}, "front": [result.baseline.key]}
    (tmp_path / STUDY_FILE).write_text(json.dumps(empty))
    with pytest.raises(UsageError, match="found only the full schedule"):
        earlier_schedules(tmp_path, "fake", None)


TINY = "infinity-tiny"
WORDS = ["--model", TINY, "--budget", "60%", "--dry-run", "--json"]


def of_tiny(folder, result):
    """The made-up run as if infinity-tiny had been tuned, so that the command takes it."""
    data = json.loads(result.to_json())
    folder.mkdir()
    grids = [list(grid) for grid in registry.scale_grids(TINY, None)]
    (folder / STUDY_FILE).write_text(json.dumps({**data, "model": TINY, "grids": grids}))
    return folder


@pytest.mark.parametrize("option", ["--from", "--start-from"])
def test_the_plan_proposes_them_first_and_the_printed_command_finds_them(
    earlier, tmp_path, capsys, monkeypatch, option
):
    monkeypatch.chdir(tmp_path)
    of_tiny(tmp_path / "old", earlier[1])
    assert main([*WORDS, option, "old"]) == 0
    plan = json.loads(capsys.readouterr().out)
    count = len(earlier_schedules(tmp_path / "old", TINY, None))
    assert plan["enqueued"][: count + 1] == ["the full schedule", *(f"from-{n}" for n in range(1, count + 1))]
    assert plan["enqueued"][count + 1 :] == list(load_space(TINY).enqueue)
    assert plan["space"]["proposals"]["from-1"] == earlier[1].pick.schedule

    from tuner.cli.plan import plan as checked
    from tuner.cli.tune import build_parser

    words = [*WORDS, option, "old"]
    assert f"{option} {tmp_path / 'old'}" in checked(build_parser().parse(words), words).command


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"])
@pytest.mark.parametrize("name", [STUDY_FILE, "profile.yaml"])
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, text, name):
    (tmp_path / name).write_text(text)
    given = tmp_path if name == STUDY_FILE else tmp_path / name
    assert main([*WORDS, "--from", str(given)]) == 2
    error = capsys.readouterr().err.strip()
    assert error and "\n" not in error, error


def test_a_profile_of_a_model_with_more_scales_is_refused(earlier, tmp_path, capsys):
    data = yaml.safe_load((earlier[0] / "profile.yaml").read_text())
    data["model"]["name"], data["schedule"]["structure_end"] = TINY, 8
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    assert main([*WORDS, "--from", str(tmp_path / "p.yaml")]) == 2
    assert "proposal from-1 begins at scale 8, but infinity-tiny has 7" in capsys.readouterr().err
