"""What a search has seen of its space, and how the report says it."""

import dataclasses
import json

import pytest

from stagevar.schedule.grids import square
from tests.fakes.studies import GRIDS, SPACE, study
from tuner.config.coverage import DRAWS, coverage
from tuner.config.parameters import Parameter
from tuner.config.space_file import load_space
from tuner.report.page import render
from tuner.report.sections.space import space_section
from tuner.results.result import StudyResult


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.json").write_text(json.dumps({**SPACE, "model": "nano"}))
    return load_space("nano", tmp_path / "space.json")


def test_values_are_counted_and_the_untried_named(space):
    tried = [{"structure_end": 2, "cfg_delay": 0}, {"structure_end": 2, "cfg_delay": "never"}, {"structure_end": 5}]
    found = {p.name: p for p in coverage(space, GRIDS, 1, tried).parameters}
    assert found["structure_end"].tried == (("2", 2), ("3", 0), ("4", 0), ("5", 1))
    assert found["structure_end"].untried == ("3", "4")
    assert found["cfg_delay"].tried == (("0", 1), ("1", 0), ("2", 0), ("never", 1))
    assert {v for v, _ in found["branch"].tried} == set(found["branch"].untried) == {"uncond", "cond"}


def test_settings_of_a_small_space_are_all_counted(space):
    found = coverage(space, GRIDS, 1, [])
    assert found.settings == 4 * 4 * 2 * 4 * 2 * 2 == found.draws < DRAWS and not found.unfit
    assert 100 < found.distinct < found.settings, "many settings expand alike"
    assert found.excluded_share is None and found.evaluated == 0


def test_what_the_budget_excludes(space):
    def tokens_left(steps):
        return sum(s.processed_tokens(1) for s in steps) / sum(2 * s.tokens for s in steps)

    half = coverage(space, GRIDS, 1, [], tokens_left, 0.5)
    assert half.priced == half.distinct and 0 < half.excluded_share < 1
    assert coverage(space, GRIDS, 1, [], tokens_left, 1.0).excluded == 0
    assert coverage(space, GRIDS, 1, [], tokens_left, 0.0).excluded_share == 1
    tight = coverage(space, GRIDS, 1, [], tokens_left, 0.3)
    assert tight.excluded > half.excluded


@pytest.mark.parametrize("log", [False, True])
def test_continuous_parameters_are_binned(space, log):
    ratio = Parameter("rank_ratio", "float", 0.01, 1.0, log)
    others = tuple(ratio if p.name == "rank_ratio" else p for p in space.parameters)
    found = coverage(
        dataclasses.replace(space, parameters=others), GRIDS, 1, [{"rank_ratio": r} for r in (0.01, 0.5, 1)]
    )
    [binned] = [p for p in found.parameters if p.name == "rank_ratio"]
    assert found.settings is None and len(binned.tried) == 5 and sum(count for _, count in binned.tried) == 3
    assert binned.tried[0][1] == 1 and binned.tried[-1][1] == (2 if log else 1)


def test_spaces_of_large_models_are_counted_in_a_moment():
    found = coverage(load_space("infinity-2b"), square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)), 8, [])
    assert found.draws == DRAWS < found.settings and found.distinct > 0.5 * (DRAWS - found.unfit)


def test_the_report_says_it_and_old_results_do_not(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, trials=6).run()
    counted = result.search["space"]
    assert counted["evaluated"] == len(result.candidates) and counted["parameters"]
    text = space_section(StudyResult.from_json(result.to_json()))
    assert "512 settings; they expand to" in text and "structure_end" in text
    assert f"{len(result.candidates)} were evaluated" in text
    assert 'id="space"' in render(result, tmp_path)
    old = dataclasses.replace(result, search={k: v for k, v in result.search.items() if k != "space"})
    assert space_section(old) == "" and 'id="space"' not in render(old, tmp_path)
