"""The side-by-side table: every schedule on the same images, paired with the full one."""

import dataclasses
import json

import numpy as np
import pytest

from stagevar.accelerators import Exact
from stagevar.errors import ScheduleError, UsageError
from stagevar.sampling.bench import bench_prompts, compare, format_table
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, skipvar
from stagevar.testing.tiny import tiny_infinity
from tests.contracts.test_accelerators import GRIDS, PROMPTS, splitting_rule, write_rule


@pytest.fixture(scope="module")
def model():
    return tiny_infinity(GRIDS)


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    rule = tmp_path_factory.mktemp("rule") / "rule.json"
    write_rule(rule, model, splitting_rule(model))
    extra = {"mine": skipvar(GRIDS, str(rule)).expand(GRIDS, 2), "same": exact(6).expand(GRIDS, 2)}
    scores = {"brightness": lambda images, prompts: images.mean(axis=(1, 2, 3)) + 0 * len(prompts)}
    return compare(model, ["fastvar", "skip-2"], extra_steps=extra, rounds=2, prompts=PROMPTS, scores=scores)


def test_rows_are_plain_and_the_full_schedule_comes_first(rows):
    assert [row["name"] for row in rows] == ["exact", "fastvar", "skip-2", "mine", "same"]
    assert json.loads(json.dumps(rows)) == rows
    full = rows[0]
    assert full["ratio"] == full["cpu_ratio"] == 1 and full["ratio_interval"] == [1, 1]
    assert full["psnr_db"] == 100 and full["ssim"] == pytest.approx(1) and full["brightness"] == 0
    assert all(len(row["samples_ms"]) == 2 and row["memory_mib"] > 0 for row in rows)


def test_quality_is_against_the_full_schedule_of_the_same_prompts(rows):
    by_name = {row["name"]: row for row in rows}
    assert by_name["same"]["psnr_db"] == 100
    assert by_name["fastvar"]["psnr_db"] < 100 and by_name["skip-2"]["ssim"] < 1
    low, high = by_name["skip-2"]["brightness_interval"]
    assert low <= by_name["skip-2"]["brightness"] <= high and by_name["skip-2"]["brightness"] != 0


def test_tokens_and_cache_follow_the_schedule(rows):
    by_name = {row["name"]: row for row in rows}
    tokens = [h * w for h, w in GRIDS]
    assert by_name["exact"]["tokens"] == 2 * sum(tokens)
    assert by_name["skip-2"]["tokens"] == 2 * sum(tokens[:-2])
    assert by_name["skip-2"]["memory_mib"] < by_name["exact"]["memory_mib"]
    # One prompt goes one way and two the other, so the mean is a mixture of both.
    outcomes = by_name["mine"]["outcomes"]
    assert set(outcomes) == {"cond1", "skip2"} and sum(outcomes.values()) == 3
    mixture = outcomes["skip2"] * 2 * sum(tokens[:-2]) + outcomes["cond1"] * (2 * sum(tokens) - tokens[-1])
    assert by_name["mine"]["tokens"] == pytest.approx(mixture / 3, abs=0.05)


def test_table_shows_every_row_and_the_decisions(rows):
    text = format_table(rows)
    lines = text.splitlines()
    assert len(lines) >= 1 + len(rows) and len({len(line) for line in lines[: 1 + len(rows)]}) == 1
    assert "mine decided: cond1" in text and "ssim" in lines[0] and "samples" not in text


def test_a_row_may_bring_its_own_accelerator(model):
    steps = StageSchedule(4, rank_ratios=(0.5,)).expand(GRIDS, 2)
    with pytest.raises(ValueError, match="exact accelerator does not"):
        compare(
            model,
            [],
            extra_steps={"mine": steps},
            samplers={"mine": lambda model: Sampler(model, Exact())},
            prompts=PROMPTS,
        )


def test_random_weights_report_no_quality(model):
    random = dataclasses.replace(model, random_weights=True)
    rows = compare(random, ["skip-1"], rounds=1, prompts=PROMPTS[:1])
    assert all("psnr_db" not in row and "ssim" not in row for row in rows)
    assert "psnr" not in format_table(rows)


def test_refusals(model):
    with pytest.raises(ScheduleError, match=r"schedule 'fastvr'.*did you mean fastvar"):
        compare(model, ["fastvr"], prompts=PROMPTS)
    with pytest.raises(UsageError, match="was fitted for infinity-2b"):
        compare(model, ["skipvar"], prompts=PROMPTS)
    with pytest.raises(UsageError, match="batch 4 is larger than the 3 prompts"):
        compare(model, [], prompts=PROMPTS, batch=4)
    with pytest.raises(UsageError, match="rounds 0"):
        compare(model, [], prompts=PROMPTS, rounds=0)


def test_a_batch_is_timed_whole(model):
    rows = compare(model, [], extra_steps={"x": StageSchedule(6).expand(GRIDS, 2)}, rounds=1, batch=3, prompts=PROMPTS)
    assert rows[1]["tokens"] == 2 * sum(h * w for h, w in GRIDS), "tokens are per image"


def test_bench_prompts_suit_the_model(model):
    captions = bench_prompts(model, 5)
    assert len(set(captions)) == 5 and all(" " in caption for caption in captions)
    classes = bench_prompts(dataclasses.replace(model, name="var-d16"), 40)
    assert len(set(classes)) == 40 and all(0 <= int(label) < 1000 for label in classes)
    assert np.array_equal(captions, bench_prompts(model, 5))
