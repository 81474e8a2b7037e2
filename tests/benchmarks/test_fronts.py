"""Fronts by method: where a schedule is filed, what its row says, what is drawn from a study."""

import dataclasses
import itertools
import json

import pytest

from benchmarks.fronts import METHODS, best, main, method, retime, rows, setting, table
from stagevar.errors import UsageError
from stagevar.models.registry import load_model
from stagevar.profile import steps_to_data
from stagevar.schedule import PRESETS, StageSchedule
from stagevar.schedule.grids import square
from tests.fakes.sample_study import make

GRIDS = square((1, 2, 3, 4, 6, 8))


def data(schedule):
    return steps_to_data(schedule.expand(GRIDS, 3))


@pytest.mark.parametrize(
    ("preset", "name", "words"),
    [
        ("stagevar-paper", "StageVAR, projection", "uncond from 4; 19% at 4; 17% at 5"),
        ("stagevar-released", "StageVAR, projection", "uncond from 4; 19% at 4; without 5"),
        ("fastvar", "FastVAR", "62% at 3; 50% at 4; without 5"),
        ("skipvar", "SkipVAR", "ssim-0.84"),
        ("focusvar", "FocusVAR", "fused at 3, layer 5"),
        ("conditional", "conditional branch", "cond from 4"),
        ("skip-2", "skipping", "without 4 and 5"),
        ("skip-inner", "skipping, one branch", "cond from 5; without 4"),
    ],
)
def test_presets_are_filed_under_their_method(preset, name, words):
    steps = data(PRESETS[preset](GRIDS))
    assert method(steps) == name
    assert setting(steps) == words


def test_mixes_go_by_how_they_reduce_tokens():
    rows_ = StageSchedule(4, cfg_delay=0, rank_ratios=(0.5,), projection="rows", site="trunk", skip=(5,))
    assert method(data(rows_)) == "StageVAR, rows" and "(trunk)" in setting(data(rows_))
    pruned = StageSchedule(4, cfg_delay=0, branch="cond", fuse_layer=2, rank_ratios=(0.5,), accelerator="fastvar")
    assert method(data(pruned)) == "FastVAR" and setting(data(pruned)).startswith("fused at 4, layer 2; 50% at 4")
    assert method(data(StageSchedule(4, cfg_delay=0))) == "null branch"
    assert method(data(StageSchedule(4, cfg_delay=0, branch="cond", fuse_layer=2, skip=(5,)))) == "skipping, one branch"


def test_rows_of_a_study_and_their_fronts(tmp_path):
    result = make("full", tmp_path)
    found = rows(result)
    assert len(found) == sum(c.state == "complete" for c in result.candidates)
    assert {row["method"] for row in found} <= METHODS.keys()
    for row in found:
        for key in ("time", "quality", "ssim"):
            assert row[key]["low"] <= row[key]["mean"] <= row[key]["high"]
    kept = best(found, "quality")
    assert all(a["time"]["mean"] < b["time"]["mean"] for a, b in itertools.pairwise(kept))
    assert all(a["quality"]["mean"] < b["quality"]["mean"] for a, b in itertools.pairwise(kept))
    text = table(found, ["quality", "ssim"])
    assert all(row["setting"] in text for row in kept)


def test_the_command_writes_figures_and_a_picture(tmp_path, capsys):
    make("full", tmp_path).save(tmp_path)
    output, figure = tmp_path / "fronts.json", tmp_path / "fronts.png"
    assert main([str(tmp_path), "--output", str(output), "--figure", str(figure)]) == 0
    assert "on the common front by" in capsys.readouterr().out
    assert json.loads(output.read_text())["rows"] and figure.read_bytes().startswith(b"\x89PNG")


def test_a_study_without_quality_is_refused(tmp_path, capsys):
    make("latency_only", tmp_path).save(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "measured no quality" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2


def test_schedules_of_a_study_are_timed_again_on_its_weights_only(tmp_path):
    result = make("one_trial", tmp_path)
    with pytest.raises(UsageError, match="other weights of nano"):
        retime(result, rows(result), 1)
    own = dataclasses.replace(result, provenance={"weights": load_model("nano").provenance["weights"]})
    found = rows(own)
    retime(own, found, 1)
    assert all(row["time"]["n"] == 1 and row["time"]["mean"] > 0 for row in found)
