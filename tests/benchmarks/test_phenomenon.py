"""The rows of the phenomenon: what they run, and a small run from end to end."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import phenomenon
from benchmarks.phenomenon import FULL, main, rows
from stagevar.models.nano.presets import preset


def test_rows_do_what_they_are_called():
    grids = preset("64px").grids
    expanded = {name: schedule.expand(grids, 3) for name, schedule in rows(grids).items()}
    for step in expanded[FULL]:
        assert len(step.branches) == 2 and step.reduction is None and not step.skipped
    null = expanded["null branch from side 16"]
    assert [step.branches for step in null[-2:]] == [("cond", "uncond"), ("uncond",)]
    one = expanded["one branch from side 11"]
    assert [step.branches for step in one[-3:]] == [("cond", "uncond"), ("cond",), ("cond",)]
    quarter = expanded["one branch, a quarter of side 16's rows"]
    assert quarter[6].reduction is None
    assert set(quarter[7].reduction.ranks) <= {64, 65}, "a quarter of 256, rounded up"
    assert quarter[7].reduction.projection == "rows"
    largest = expanded["one branch, a quarter of side 16's rows, the largest"]
    assert largest[7].reduction == dataclasses.replace(quarter[7].reduction, projection="top")
    assert largest[:7] == quarter[:7]
    both = expanded["one branch from 8, 0.7 and 0.5 of the rows from side 11, the largest"]
    assert [len(step.branches) for step in both[4:]] == [2, 1, 1, 1]
    assert both[5].reduction is None and both[6].reduction.ranks == (85,) and both[7].reduction.ranks == (129,)
    late = expanded["without side 11, one branch from 6, half of 16's rows, the largest"]
    assert [len(step.branches) for step in late[3:]] == [2, 1, 1, 0, 1]
    assert [step.reduction is None for step in late[3:]] == [True] * 4 + [False] and late[7].reduction.ranks == (129,)
    without = expanded["without side 11, one branch at 16"]
    assert [step.skipped for step in without[-2:]] == [True, False] and without[7].branches == ("cond",)
    both = expanded["without side 11, one branch from 8"]
    assert [step.skipped for step in both[-2:]] == [True, False] and [len(step.branches) for step in both[4:6]] == [
        2,
        1,
    ]
    assert [step.skipped for step in expanded["without sides 11 and 16"][-3:]] == [False, True, True]


def test_a_small_run_pairs_every_row_with_the_full_schedule(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(phenomenon, "SINGLES", 2)
    monkeypatch.setattr(phenomenon, "BATCH", 4)
    out = tmp_path / "figures.json"
    assert main(["--prompts", "8", "--rows", "^(one branch from|without) side 16$", "--output", str(out)]) == 0
    found = {row["row"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(found) == {FULL, "one branch from side 16", "without side 16"}
    assert found[FULL]["change"] == [0, 0, 0] and found[FULL]["time_batch_16"] == found[FULL]["time_batch_1"] == 1
    for name in set(found) - {FULL}:
        row = found[name]
        assert row["change"][1] <= row["change"][0] <= row["change"][2] and row["psnr_db"] < 99
    assert capsys.readouterr().out.count("\n| ") == 3


def test_seeds_count_up_from_the_first(monkeypatch):
    seen = []

    def generate(sampler, prompts, seeds, steps):
        seen.append(list(seeds))
        return np.zeros((len(prompts), 64, 64, 3), np.uint8)

    monkeypatch.setattr(phenomenon.Sampler, "generate", generate)
    monkeypatch.setattr(phenomenon, "SINGLES", 0)
    assert main(["--prompts", "32", "--rows", "^without side 16$", "--first-seed", "70"]) == 0
    assert seen[-4:] == [list(range(70, 86))] * 2 + [list(range(86, 102))] * 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["--rows", "("], "regular"), (["--prompts", "3"], "--prompts 3"), (["--first-seed", "-1"], "-1")],
)
def test_bad_input_is_one_line(argv, says, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
