"""What a number of held-out prompts can prove is what the verdicts then prove."""

import dataclasses
import types

import numpy as np
import pytest

from stagevar.models.registry import list_models
from stagevar.schedule import exact, preset
from tests.fakes.studies import GRIDS
from tuner.config.limits import parse_budget
from tuner.config.prompts import load_prompts
from tuner.config.quality import quality_limits
from tuner.config.space_file import load_space
from tuner.evaluation.local import LocalExecutor
from tuner.metrics.quality_spec import read_quality
from tuner.statistics.bounds import continuous_drop_bounds, drop_bounds
from tuner.statistics.looks import claims, judgement_alpha, looks, turn_shares
from tuner.statistics.provable import (
    floor_shortfalls,
    limit_lines,
    limits_table,
    prompts_needed,
    provable_drop,
    shortfalls,
)
from tuner.study.finalist_times import BASELINE
from tuner.study.verdict import Limits
from tuner.study.verification import Verifier
from tuner.testing.formulas import Samples

YES_NO = quality_limits(read_quality({"geneval": {"max_drop": 0.02}}))[0]
POINTS = quality_limits(read_quality({"clip_score": {"max_drop": 0.3}}))[0]


def test_looks_and_what_each_may_err():
    assert looks(1024, 16) == [64, 128, 256, 512, 1024]
    assert claims(256, 16) == {256: 0.04}
    assert claims(1024, 16) == {256: 0.005, 512: 0.005, 1024: pytest.approx(0.03)}
    assert claims(16, 8) == {16: 0.04}
    for count in (1, 16, 300, 5000, 100_000):
        errors = claims(count, 16).values()
        assert sum(errors) == pytest.approx(0.04) and min(errors) > 0


def test_all_judgements_of_a_study_share_the_five_percent():
    later = [claims(count, 16, k) for k, count in enumerate((256, 512, 1024, 1040))]
    assert [list(c) for c in later[1:]] == [[512], [1024], [1040]], "claimed at the end only"
    left = [0.01 - sum(sum(c.values()) for c in later[1:k]) for k in (1, 2, 3)]
    assert [sum(c.values()) for c in later[1:]] == pytest.approx([0.5 * share for share in left])
    assert sum(sum(c.values()) for c in later) < 0.05
    assert sum(judgement_alpha(k) for k in range(60)) == pytest.approx(0.05)


@pytest.mark.parametrize("limit", [YES_NO, POINTS], ids=lambda limit: limit.metric)
@pytest.mark.parametrize("prompts", [64, 256, 512, 1024])
def test_identical_images_prove_exactly_what_was_said(limit, prompts):
    bounds = continuous_drop_bounds if limit.kind == "continuous" else drop_bounds
    shown = [bounds(np.zeros((3, n)), limit.change, alpha)[0].max() for n, alpha in claims(prompts, 16).items()]
    assert provable_drop(limit, prompts, 16) == pytest.approx(min(shown), rel=1e-9)


@pytest.mark.parametrize("limit", [YES_NO, POINTS], ids=lambda limit: limit.metric)
@pytest.mark.parametrize("error_share", turn_shares(3))
def test_a_share_of_the_error_proves_what_was_said(limit, error_share):
    bounds = continuous_drop_bounds if limit.kind == "continuous" else drop_bounds
    shown = [bounds(np.zeros((1, n)), limit.change, error_share * a)[0][0] for n, a in claims(512, 16).items()]
    proved = provable_drop(limit, 512, 16, error_share=error_share)
    assert proved == pytest.approx(min(shown), rel=1e-9) and proved > provable_drop(limit, 512, 16)
    tight = dataclasses.replace(limit, max_drop=proved * 0.999)
    needed = prompts_needed(tight, 16, error_share=error_share)
    assert f"it takes {needed}" in shortfalls([tight], 512, 16, error_share)[0] and needed > 512
    assert limits_table([tight], 512, 16, error_share)[0]["prompts_needed"] == needed
    assert f"{needed} are enough" in limit_lines([tight], 512, 16, error_share)[0]


@pytest.mark.parametrize("limit", [YES_NO, POINTS], ids=lambda limit: limit.metric)
def test_discordant_pairs_prove_about_what_was_said(limit):
    """26 of 512 prompts, as many that lose as gain, and then what bad luck of one in five adds."""
    differences = np.zeros((1, 512))
    differences[0, :26:2], differences[0, 1:26:2] = limit.change, -limit.change
    bounds = continuous_drop_bounds if limit.kind == "continuous" else drop_bounds
    shown = bounds(differences, limit.change, 0.035)[0][0] + 0.8416 * limit.change * np.sqrt(26) / 512
    assert provable_drop(limit, 512, 16, discordant=26 / 512) == pytest.approx(shown, rel=0.05)


def test_a_harmless_schedule_is_proved_four_times_out_of_five_on_as_many_prompts_as_are_said_to_be_enough():
    needed, rng, proved = prompts_needed(YES_NO, 16, 0.05), np.random.default_rng(0), 0
    for _ in range(100):
        differences_N = rng.choice([-1.0, 0.0, 1.0], p=[0.025, 0.95, 0.025], size=needed)
        proved += any(
            drop_bounds(differences_N[None, :count], 1.0, alpha)[0][0] <= YES_NO.max_drop
            for count, alpha in claims(needed, 16).items()
        )
    assert 70 <= proved <= 95


@pytest.mark.parametrize("discordant", [0.0, 0.05])
@pytest.mark.parametrize("max_drop", [0.3, 0.05, 0.02, 0.01])
def test_the_number_that_would_do_does_and_the_one_before_does_not(max_drop, discordant):
    limit = dataclasses.replace(YES_NO, max_drop=max_drop)
    needed = prompts_needed(limit, 16, discordant)
    assert provable_drop(limit, needed, 16, discordant) <= max_drop
    assert needed == 16 or provable_drop(limit, needed - 16, 16, discordant) > max_drop


def test_what_no_number_proves_is_said_so():
    assert prompts_needed(dataclasses.replace(YES_NO, max_drop=1e-9), 16) is None
    [line] = shortfalls([dataclasses.replace(YES_NO, max_drop=1e-9)], 256, 16)
    assert "no number of prompts would do" in line


def test_too_few_prompts_are_named_with_the_number_that_would_do():
    assert shortfalls([YES_NO, POINTS], 256, 16) == []
    [few, fewer] = shortfalls([YES_NO, POINTS], 8, 8)
    assert "geneval drop of at most 2 % of prompts" in few and "on 8 held-out prompts" in few and "it takes 160" in few
    assert "clip_score" in fewer and "they prove nothing" in fewer and "it takes 112" in fewer
    [one] = shortfalls([dataclasses.replace(YES_NO, max_drop=1.0)], 1, 1)
    assert "on 1 held-out prompt (" in one
    assert shortfalls(quality_limits(read_quality({"geneval": 1.0, "clip_score": 0.1}), 1.0), 8, 8) == [], (
        "it only ranks"
    )


def test_floors_that_perfect_images_could_not_prove_are_named():
    assert floor_shortfalls({"geneval": 0.95, "psnr": 20.0}, 64, 16) == []
    [floor] = floor_shortfalls({"geneval": 0.95}, 32, 16)
    assert "a geneval floor of 0.95 cannot be proved on 32 held-out prompts (it takes 64)" in floor
    assert "it takes 64" in floor_shortfalls({"psnr": 20.0}, 32, 16)[0]
    assert "no number" in floor_shortfalls({"geneval": 1.0}, 4096, 16)[0]


def test_the_table_of_limits_is_plain_data():
    [first] = limits_table(quality_limits(read_quality({"geneval": {"max_drop": 0.02}, "clip_score": 0.1})), 1024, 16)
    assert first["metric"] == "geneval" and first["unit"] == "share of prompts" and first["max_drop"] == 0.02
    assert first["provable_drop"] <= 0.01 and first["provable_drop_discordant"] <= 0.02
    assert first["prompts_needed"] <= first["prompts_needed_discordant"] <= 1024
    both = limit_lines(quality_limits(read_quality({"geneval": {"max_drop": 0.02}, "clip_score": 0.1})), 8, 8)
    assert "8 held-out prompts prove 33.1 % of prompts when nothing changes (160 are enough)" in both[0]
    assert both[1] == "clip_score: none, it only ranks"


@pytest.mark.parametrize("name", [model.name for model in list_models()])
def test_identical_images_verify_with_the_space_of_every_model(name):
    space = load_space(name)
    limits = quality_limits(space.quality)
    assert shortfalls(limits, space.prompts.heldout, space.prompts.micro_batch) == []
    for limit in limits:
        if limit.max_drop is not None:
            proved = provable_drop(limit, space.prompts.heldout, space.prompts.micro_batch)
            assert proved <= limit.max_drop / 2, limit.metric


class Unchanged:
    """Every schedule draws what the full one draws; continuous metrics differ by rounding, as in batches of other sizes."""

    def __init__(self, prompts, limits):
        self.prompts, self.limits, self.rng = prompts, limits, np.random.default_rng(0)
        self.facts = types.SimpleNamespace(higher_is_better={m.metric: m.higher_is_better for m in limits})

    def latency(self, schedules, rounds, warm_up_at_most=12):
        drift = 1 + 0.02 * self.rng.random(rounds)
        return {name: Samples((100 if name == BASELINE else 50) * drift) for name in schedules}

    def quality(self, schedules, split, batch):
        count = len(self.prompts[split].batch(batch)[0])
        images = {m.metric: self.rng.random(count) for m in self.limits}
        values = [{m.metric: self.score(m, images[m.metric]) for m in self.limits} for _ in schedules]
        return [{**each, "quality": np.zeros(count)} for each in values]

    def score(self, limit, drawn):
        if limit.kind == "binary":
            return (drawn < 0.7).astype(float)
        return drawn * limit.change + (self.rng.normal(0, 1e-7, len(drawn)) if limit.kind == "continuous" else 0)


def test_identical_images_end_verified_with_every_shipped_space():
    """By the verifier itself, on the default number of prompts; models that share limits and prompts are tried once."""
    full = exact(len(GRIDS)).expand(GRIDS, 1)
    finalists = {name: preset(name, GRIDS).expand(GRIDS, 1) for name in ("stagevar-paper", "skip-1", "skip-2")}
    tried = set()
    for name in [model.name for model in list_models()]:
        space = load_space(name)
        limits = quality_limits(space.quality)
        alike = (limits, space.prompts)
        if alike in tried:
            continue
        tried.add(alike)
        evaluator = Unchanged(load_prompts(space.prompts), limits)
        heldout = evaluator.prompts["heldout"]
        verifier = Verifier(
            evaluator, LocalExecutor(evaluator), finalists, full, heldout, Limits(parse_budget("80%"), 100.0, limits)
        )
        found = verifier.run()
        assert {found[key].status for key in finalists} == {"verified"}, name
        assert all(found[key].prompts <= len(heldout) for key in finalists)
    assert len(tried) >= 4
