"""Whole studies until one is verified: what each variant changes, what is counted, and the summary."""

import json

import pytest

from benchmarks import first_verified
from tests.fakes.studies import study
from tuner.study.options import FULL_TRIALS

PROMPTS = {"prompts": {"source": "nano", "search": 16, "heldout": 256, "micro_batch": 16}}


@pytest.fixture
def seen(monkeypatch):
    """Studies of a fake in place of nano's; returns the options with which they ran."""
    found = []

    def build(checked, progress, stop):
        one = study(
            checked.run_dir, {"drop": lambda steps: 0.0}, PROMPTS, trials=6, seed=checked.args.seed, one_by_one=True
        )
        whole = one.run
        one.run = lambda: (found.append(one.options), whole())[1]
        return one

    monkeypatch.setattr(first_verified, "build_study", build)
    return found


def test_each_variant_runs_as_it_is_called_and_its_images_are_counted(seen, tmp_path, capsys):
    output = tmp_path / "figures.json"
    assert first_verified.main(["--seeds", "2", "--output", str(output), "--", "--max-drop", "30%"]) == 0
    runs = json.loads(output.read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [(v, s) for s in (0, 1) for v in first_verified.VARIANTS]
    assert [options.one_by_one for options in seen[:3]] == [True, False, False]
    assert seen[2].trials == FULL_TRIALS and not seen[2].shortcuts.sensitivity
    quick, together, _ = runs[:3]
    assert {run["verdict"] for run in runs} == {"verified"}
    assert quick["images"]["heldout"] == 2 * 256 < together["images"]["heldout"]
    assert quick["images"]["search"] == together["images"]["search"] > 16
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("quick") and "(1.00)" in lines[0] and "2 of 2 verified" in lines[0]


def test_the_summary_takes_medians_and_compares_with_the_first_variant():
    def run(variant, seconds, images, verdict="verified"):
        return {"variant": variant, "seconds": seconds, "images": {"search": images, "heldout": 0}, "verdict": verdict}

    runs = [run("a", 10, 100), run("a", 30, 200), run("a", 20, 1200), run("b", 40, 50, "infeasible")]
    first, second = first_verified.summary(runs)
    assert first.split() == ["a", "20", "s", "(1.00)", "200", "images", "(1.00),", "3", "of", "3", "verified"]
    assert second.split() == ["b", "40", "s", "(2.00)", "50", "images", "(0.25),", "0", "of", "1", "verified"]


def test_a_wrong_option_is_one_line(tmp_path, capsys):
    assert first_verified.main(["--output", str(tmp_path / "x.json"), "--", "--max-drop", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("first_verified: ") and error.count("\n") == 1
