"""The benchmark of tuning: its arithmetic, and its replay on a small list."""

import pytest

from benchmarks.tuning_efficiency import (
    VARIANTS,
    Bench,
    efforts,
    growth,
    measured_baseline,
    modelled,
    reached,
    replay,
    searched,
    summarize,
)
from tuner.config.prompts import load_prompts
from tuner.metrics.quality_spec import QualitySpec


@pytest.fixture(scope="module")
def bench():
    return Bench("nano", prompts=4, heldout=4, micro_batch=2, quality={"ssim": QualitySpec()})


def test_a_replay_is_bit_identical_and_says_what_was_shared(bench):
    figures = replay(bench, bench.drawn(6), repeats=1)
    assert figures["bit_identical"] and figures["prompts"] == 4
    assert figures["distinct_prefixes"] < figures["scales_alone"]
    assert figures["ceiling"] > 1 and figures["share_of_ceiling"] == figures["saved"] / figures["ceiling"]
    assert figures["rungs"]["prompts_run"] <= figures["rungs"]["prompts_all"] == 24


def test_drawn_schedules_are_distinct_and_repeatable(bench):
    assert bench.drawn(12) == bench.drawn(12) and len(set(bench.drawn(12))) == 12
    assert bench.drawn(6) == bench.drawn(12)[:6]


def test_growth_counts_what_the_last_schedules_added(bench):
    rows = growth(bench, [2, 5])["by_schedules"]
    assert [row["schedules"] for row in rows] == [2, 5] and all(row["seconds"] > 0 for row in rows)


def test_large_models_share_more_the_more_schedules_there_are():
    rows = modelled("infinity-2b", [5, 40])["rows"]
    for engine in ("graphs", "eager"):
        assert 1 < rows[0][engine]["saved"] < rows[1][engine]["saved"]
        assert rows[0][engine]["full_generations"] < rows[1][engine]["full_generations"] < 40


def test_less_effort_draws_less_and_an_instant_one_nothing_for_quality():
    found = efforts("infinity-2b")
    assert 10 < found["changes"] < 60
    for engine in ("graphs", "eager"):
        instant, quick, full = (found[engine][effort] for effort in ("instant", "quick", "full"))
        assert instant.keys() == {"timing", "full_generations", "hours"} and instant["hours"] <= quick["hours"]
        assert instant["full_generations"] < quick["full_generations"] < full["full_generations"]
        assert quick["table"] == full["table"] and quick["search"] < full["search"]
        assert quick["verification"] < found[engine]["quick, at most"]["verification"]


def test_a_target_is_reached_when_the_run_stays_there():
    line = [(1.0, 0.1), (2.0, 0.5), (3.0, 0.3), (4.0, 0.6)]
    assert reached(line, 0.5) == 4.0 and reached(line, 0.05) == 1.0 and reached(line, 0.7) is None


def test_runs_are_compared_by_medians_and_misses_are_counted():
    def run(name, seed, ends):
        by_images = [(100 * seconds, volume) for seconds, volume in ends]
        run = {"variant": name, "seed": seed, "volume": ends, "volume_by_images": by_images, "images_drawn": 900.0}
        return {**run, "seconds": 10.0, "evaluated": 5, "ask_median_s": 0.1}

    runs = [run("plain, TPE", s, [(4.0, 0.2), (8.0, 1.0)]) for s in range(3)]
    runs += [run("all", 0, [(1.0, 1.1)]), run("all", 1, [(2.0, 1.2)]), run("all", 2, [(3.0, 0.4)])]
    found = summarize(runs, floor=0.1)
    assert found["plain, TPE"]["gain"] == pytest.approx(0.9)
    assert found["all"]["to the gain of plain, TPE"] == {"seconds": 2.0, "images": 200.0, "missed": 1}
    assert found["plain, TPE"]["to the gain of plain, TPE"]["seconds"] == 8.0


def test_the_table_of_an_earlier_study_is_of_other_prompts_and_proposes_the_first_round(bench):
    table = bench.earlier_table()
    assert table.metrics == ("ssim",) and table.prompts == 2 and len(table.rows) > 10
    assert load_prompts(bench.space.prompts, 1)["search"].texts != bench.prompts["search"].texts
    sampler, shortcuts = VARIANTS["all, sensitivity known"]
    ledger, facts = searched(bench, measured_baseline(bench), sampler, shortcuts, 0, 8, 600.0, table)
    assert facts["prediction"]["proposed"] > 0 and not facts["prediction"]["measured"]
    assert any(candidate.source == "predicted" for candidate in ledger.candidates.values())
