"""Verdicts on fakes: what is verified, what is not, and every way a study can end."""

import dataclasses
import json

import numpy as np
import pytest

from stagevar.errors import UsageError
from stagevar.profile import Profile
from tests.fakes.studies import FULL_TOKENS, SPACE, FakeEvaluator, study, tokens
from tuner.config.costs import FINALISTS_PER_KIND
from tuner.config.limits import parse_budget
from tuner.config.quality import quality_limits
from tuner.config.space_file import parse_space
from tuner.report.export import export, profile_of
from tuner.report.page import write_report
from tuner.results.candidate import Finalist, Interval, LatencyStats, Measured, Verdict
from tuner.results.codec import build, record_of
from tuner.results.result import StudyResult
from tuner.statistics.bounds import ratio_interval
from tuner.study.verdict import LEAST_GAIN, Limits, choose_finalists, in_turn, is_settled, keeps_quality

BIG = {"prompts": {"source": "nano", "search": 24, "heldout": 320, "micro_batch": 16}}


def test_a_harmless_schedule_is_verified_and_exported_with_bounds(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, BIG, trials=12).run()
    assert (result.verdict, result.exit_code) == ("verified", 0)
    pick = result.pick
    assert pick.verification.status == "verified" and pick.verification.prompts >= 256
    assert pick.verification.latency_upper_ms <= result.budget_ms
    [limit] = result.limits
    assert pick.verification.drop_upper <= limit.max_drop == 0.05 and limit.metric == "geneval_nano"
    assert result.picks["fastest"] in {c.key for c in result.candidates}
    assert len(pick.verification.latency.samples_ms) >= 15
    assert StudyResult.load(tmp_path) == result


BOTH = {
    **BIG,
    "objectives": {
        "latency": "ms",
        "quality": {
            "metrics": [
                {"name": "geneval_nano", "weight": 1, "max_drop": 0.05},
                {"name": "clip_score", "weight": 1, "max_drop": 0.3},
            ]
        },
    },
}


def test_every_metric_must_keep_its_own_limit(tmp_path):
    kept = study(tmp_path / "a", {"drop": lambda s: 0.0, "points": lambda s: 0.0}, BOTH, trials=8).run()
    assert kept.verdict == "verified" and [m.max_drop for m in kept.limits] == [0.05, 0.3]
    verdicts = {v.name: v for v in kept.pick.verification.verdicts}
    assert verdicts.keys() == {"latency", "gain", "drop:geneval_nano", "drop:clip_score"}
    assert verdicts["drop:clip_score"].bound <= 0.3 and verdicts["drop:clip_score"].unit == "CLIP points"
    assert "clip_score" in kept.reason and "CLIP points" in kept.reason
    options = {"drop": lambda s: 0.0, "points": lambda s: 1.0 * (tokens(s) < FULL_TOKENS)}
    lost = study(tmp_path / "b", options, BOTH, trials=8).run()
    assert lost.verdict == "infeasible" and not lost.picks
    loose = study(tmp_path / "c", options, BOTH, trials=8, max_drop={"clip_score": 2.0}).run()
    assert loose.verdict == "verified"
    assert StudyResult.load(tmp_path / "c") == loose


def test_a_small_loss_of_either_metric_is_never_verified(tmp_path):
    """The composite of both is within one allowance; the second metric alone is not."""
    for seed in range(3):
        options = {"drop": lambda s: 0.0, "points": lambda s: 0.4 * (tokens(s) < FULL_TOKENS), "seed": seed}
        result = study(tmp_path / str(seed), options, BOTH, trials=5, seed=seed).run()
        assert not [c for c in result.candidates if isinstance(c, Finalist) and c.verification.status == "verified"]


@pytest.mark.parametrize("heldout", [1, 8])
def test_a_handful_of_prompts_proves_nothing_and_the_report_draws(tmp_path, heldout):
    space = {"prompts": {"source": "nano", "search": 8, "heldout": heldout, "micro_batch": 8}}
    result = study(tmp_path, {"drop": lambda steps: 0.0}, space, max_drop=0.3, trials=4).run()
    assert (result.verdict, result.exit_code, result.pick) == ("inconclusive", 5, None)
    export(result, tmp_path)
    assert write_report(StudyResult.load(tmp_path), tmp_path).exists()


def test_one_search_prompt_draws_too(tmp_path):
    space = {"prompts": {"source": "nano", "search": 1, "heldout": 64, "micro_batch": 8}}
    result = study(tmp_path, {"drop": lambda steps: 0.0}, space, max_drop=0.3, trials=4).run()
    export(result, tmp_path)
    assert write_report(result, tmp_path).exists()


def test_a_result_of_schema_1_still_loads_and_draws(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, BIG, trials=6).run()
    data = json.loads(result.to_json().replace("drop:geneval_nano", "drop"))
    del data["limits"]
    old = StudyResult.from_json(
        json.dumps({**data, "schema": 1, "max_drop": 0.05, "quality_weights": {"geneval_nano": 1.0}})
    )
    assert [(m.metric, m.max_drop) for m in old.limits] == [("quality", 0.05), ("geneval_nano", None)]
    assert old.verdict == "verified" and old.composite_floor == -0.05
    assert [v.name for v in old.pick.verification.verdicts] == ["latency", "gain", "drop:quality"]
    export(old, tmp_path)
    page = write_report(old, tmp_path).read_text()
    assert "Allowed drop of quality" in page and "from an earlier version" in page
    assert Profile.load(tmp_path / "profile.yaml").constraints.max_drop == {"quality": 0.05}


def test_among_equals_the_least_accelerated_is_the_pick(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, BIG, trials=12).run()
    verified = [c for c in result.candidates if isinstance(c, Finalist) and c.verification.status == "verified"]
    assert len(verified) > 1
    assert result.pick.processed_tokens == max(c.processed_tokens for c in verified)


def test_the_pick_is_settled_where_nobody_left_would_replace_it():
    rng = np.random.default_rng(0)
    good = (rng.random(256) < 0.9).astype(float)
    bad = good * (rng.random(256) < 0.8)
    qualities = {"few": good, "many": good.copy(), "bad": bad}
    tokens = {"few": 1.0, "many": 2.0, "bad": 3.0}
    assert is_settled(["many"], ["few", "bad"], qualities, good, tokens)
    assert is_settled(["few"], [], qualities, good, tokens)
    assert not is_settled(["few"], ["many"], qualities, good, tokens), "as good and less accelerated"
    assert not is_settled(["bad"], ["few"], qualities, good, tokens), "better"
    assert not is_settled([], ["few"], qualities, good, tokens)


def test_one_by_one_the_pick_is_the_least_accelerated_of_those_that_seem_as_good(tmp_path):
    together = study(tmp_path / "together", {"drop": lambda steps: 0.0}, BIG, trials=12).run()
    result = study(tmp_path / "turns", {"drop": lambda steps: 0.0}, BIG, trials=12, one_by_one=True).run()
    finalists = [c for c in result.candidates if isinstance(c, Finalist)]
    assert result.verdict == "verified" and result.pick.key == together.pick.key
    assert verified(result) == [result.pick] and set(result.picks.values()) == {result.pick.key}
    assert result.pick.processed_tokens == max(c.processed_tokens for c in finalists) and len(finalists) > 2
    assert StudyResult.load(tmp_path / "turns") == result
    assert export(result, tmp_path / "turns") and write_report(result, tmp_path / "turns").exists()


def test_a_finalist_that_was_only_timed_is_known_from_the_search_and_proves_nothing_about_quality(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, BIG, trials=12, one_by_one=True).run()
    unjudged = [c for c in result.candidates if isinstance(c, Finalist) and not c.verification.prompts]
    assert unjudged and profile_of(result, result.pick).constraints.proved
    for candidate in unjudged:
        assert keeps_quality(candidate) and not profile_of(result, candidate).constraints.proved
        worse = [dataclasses.replace(v, status="broken") for v in candidate.verdicts if v.name.startswith("drop:")]
        assert not keeps_quality(dataclasses.replace(candidate, verdicts=tuple(worse)))


def test_the_order_of_turns_puts_what_loses_clearly_behind(tmp_path):
    drop = lambda steps: 0.6 if any(step.skipped for step in steps) else 0.0  # noqa: E731
    work = study(tmp_path, {"drop": drop}, BIG, trials=12, max_drop=0.9, one_by_one=True)
    result = work.run()
    order = work.finalists()
    lossy = [c.skipped_scales > 0 for c in order]
    assert lossy == sorted(lossy) and len(set(lossy)) == 2 and result.pick.key == order[0].key


def test_places_left_go_to_what_is_borderline_in_time_then_to_what_may_be_good_enough():
    def candidate(key, ratio, lost, tokens=1.0, spread=0.02):
        limit = -lost - spread, -lost + spread
        mean = Interval(-lost, *limit, 64)
        verdicts = (
            Verdict("latency", 60.0, "ms", 100 * ratio, 100 * (ratio + 0.03), "met" if ratio <= 0.6 else "broken"),
            Verdict("drop:geneval_nano", 0.05, "", lost, lost + spread, "met" if lost <= 0.05 else "broken"),
        )
        return Measured(
            key, {}, {}, (), "", "sampler", 1, 0, tokens,
            latency=LatencyStats((), 100 * ratio, None, 0.0, 0.0, 100 * ratio, Interval(ratio, ratio - 0.03, ratio + 0.03, 0)),
            values={"quality": (0.0,) * 64}, differences={"geneval_nano": mean, "quality": mean},
            verdicts=verdicts, feasible=all(v.status == "met" for v in verdicts),
        )  # fmt: skip

    limits = Limits(parse_budget("60%"), 100.0, quality_limits(parse_space(SPACE).quality, {"geneval_nano": 0.05}))
    slow, bad, good = candidate("slow", 0.62, 0.0, 2.0), candidate("bad", 0.4, 0.06, 3.0), candidate("good", 0.5, 0.0)
    hopeless = [candidate("late", 0.7, 0.0), candidate("worse", 0.3, 0.2)]
    far = {"slow": 0.03, "bad": 0.2, "late": 1.0, "worse": 1.0, "good": 0.0}
    pool = [*hopeless, bad, slow, good]
    assert [c.key for c in choose_finalists(pool, limits, lambda c: far[c.key])] == ["good"]
    assert [c.key for c in in_turn(pool, limits, lambda c: far[c.key])] == ["slow", "good", "bad"]
    many = [candidate(f"g{n}", 0.5, 0.0, 1.1 + n / 10) for n in range(5)]
    found = in_turn([*pool, *many], limits, lambda c: far.get(c.key, 0.0))
    assert [c.key for c in found] == ["g4", "g3", "g2", "g1", "g0", "good"], "none that only may be, where enough are"
    spares = [candidate(f"s{n}", 0.61 + n / 1000, 0.0) for n in range(9)]
    assert len(in_turn([*pool, *spares], limits, lambda c: far.get(c.key, 0.5))) == 2 * FINALISTS_PER_KIND


def test_verification_ends_when_the_pick_is_settled(tmp_path):
    """Schedules with skipped scales change some images for better and for worse, so that many prompts would be needed."""
    prompts = {"prompts": {"source": "nano", "search": 16, "heldout": 1024, "micro_batch": 64}}
    drop = lambda steps: 0.03 if any(step.skipped for step in steps) else 0.0  # noqa: E731
    result = study(tmp_path, {"drop": drop}, prompts, trials=8, max_drop=0.05).run()
    finalists = [c for c in result.candidates if isinstance(c, Finalist)]
    left = [c for c in finalists if c.verification.status == "open"]
    assert result.verdict == "verified" and not result.pick.skipped_scales
    assert left and all(c.verification.prompts == result.pick.verification.prompts < 1024 for c in left)


def test_a_better_schedule_beats_a_less_accelerated_one(tmp_path):
    def drop(steps):
        return 0.0 if any(step.skipped for step in steps) else 0.6

    result = study(tmp_path, {"drop": drop}, BIG, trials=16, max_drop=1.0).run()
    assert result.verdict == "verified" and result.pick.skipped_scales == 1
    assert result.candidate(result.picks["no_skip"]).skipped_scales == 0


@pytest.mark.parametrize("seed", range(20))
def test_aa_no_acceleration_is_exported_when_all_schedules_are_the_baseline(tmp_path, seed):
    options = {"drop": lambda steps: 0.0, "ratio": lambda steps: 1.0, "noise": 0.05, "seed": seed}
    if seed % 2:
        options["points"] = lambda steps: 0.0
    space = {**(BOTH if seed % 2 else {}), "prompts": SPACE["prompts"]}
    result = study(tmp_path, options, space, budget="99%", trials=6, seed=seed).run()
    assert "pick" not in result.picks or result.pick == result.baseline
    assert result.verdict in ("infeasible", "inconclusive")


def verified(result):
    return [c for c in result.candidates if isinstance(c, Finalist) and c.verification.status == "verified"]


@pytest.mark.parametrize("seed", range(6))
def test_a_drop_of_a_tenth_is_never_verified_at_a_fiftieth(tmp_path, seed):
    space = {"prompts": {"source": "nano", "search": 16, "heldout": 704, "micro_batch": 64}}
    options = {"drop": lambda steps: 0.1 * (tokens(steps) < FULL_TOKENS), "seed": seed, "discordance": 0.03}
    limits: dict = {"geneval_nano": 0.02}
    if seed % 2:  # with a second metric, which loses nothing
        space, options["points"] = {**BOTH, **space}, lambda steps: 0.0
        limits["clip_score"] = 0.3
    result = study(tmp_path, options, space, max_drop=limits, trials=5, seed=seed).run()
    assert not verified(result)
    assert result.verdict in ("infeasible", "inconclusive") and result.pick is None


FORTY = 40


def forty_studies(tmp_path, drops):
    """How many of forty studies with two metrics verify a schedule. drops: per study, what every one loses of either."""
    claims = 0
    for seed in range(FORTY):
        share, points = drops[seed % len(drops)]
        options = {
            "drop": lambda steps, share=share: share * (tokens(steps) < FULL_TOKENS),
            "points": lambda steps, points=points: points * (tokens(steps) < FULL_TOKENS),
            "discordance": 0.02,
            "seed": seed,
        }
        space = {**BOTH, "prompts": {"source": "nano", "search": 16, "heldout": 256, "micro_batch": 64}}
        claims += bool(verified(study(tmp_path / str(seed), options, space, trials=2, seed=seed).run()))
    return claims


def test_of_forty_studies_at_the_edge_no_more_than_the_five_percent_claim(tmp_path):
    """Schedules lose what just breaks a limit: of the share in half of the studies, of the points in the others."""
    claims = forty_studies(tmp_path, [(0.0501, 0.0), (0.0, 0.301)])
    assert claims / FORTY <= 0.05 + 3 * (0.05 * 0.95 / FORTY) ** 0.5


def test_of_forty_studies_without_a_loss_most_verify(tmp_path):
    assert forty_studies(tmp_path, [(0.0, 0.0), (0.0, 0.1)]) >= 0.8 * FORTY


def test_a_gain_below_two_percent_is_no_acceleration(tmp_path):
    options = {
        "drop": lambda steps: 0.0,
        "ratio": lambda steps: 1.0 if tokens(steps) == FULL_TOKENS else 0.99,
        "noise": 0.0,
    }
    result = study(tmp_path, options, budget="100%", trials=6).run()
    assert result.verdict == "baseline_meets_budget" and result.pick == result.baseline
    assert set(result.picks) == {"pick"}
    for candidate in result.candidates:
        if isinstance(candidate, Finalist):
            assert next(v for v in candidate.verification.verdicts if v.name == "gain").status == "broken"
    assert LEAST_GAIN == 0.98


def test_the_baseline_that_meets_the_budget_is_the_pick_and_the_front_is_there(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, budget="1s", trials=6).run()
    assert (result.verdict, result.exit_code, result.pick) == ("baseline_meets_budget", 0, result.baseline)
    assert "already meets" in result.reason and len(result.front) >= 1 and "fastest" in result.picks


def test_no_schedule_meets_the_budget(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, budget="5%", trials=6).run()
    assert (result.verdict, result.exit_code, result.picks) == ("infeasible", 3, {})
    fastest = min(c.latency.drift_corrected_ms for c in result.candidates)
    assert result.smallest_budget_ms == fastest and f"{fastest:.1f} ms" in result.reason
    assert len(result.nearest) == 3


def test_all_failed(tmp_path):
    result = study(tmp_path, {"broken": lambda steps: tokens(steps) < FULL_TOKENS}, trials=5).run()
    assert (result.verdict, result.exit_code) == ("failed", 4)
    assert len(result.failures) == 5 and "this schedule is broken" in result.reason


def test_a_failing_full_schedule_is_a_failed_study(tmp_path):
    result = study(tmp_path, {"broken": lambda steps: True}, trials=5).run()
    assert result.exit_code == 4 and "full schedule failed" in result.reason


def test_single_failures_do_not_stop_a_study(tmp_path):
    options = {"broken": lambda steps: any(s.skipped for s in steps), "drop": lambda steps: 0.0}
    result = study(tmp_path, options, BIG, trials=14).run()
    failed = [c for c in result.candidates if c.state == "failed"]
    assert failed and all(c.skipped_scales for c in failed)
    assert result.verdict == "verified" and len(result.candidates) == 14


def test_random_weights_give_a_latency_front_only(tmp_path):
    result = study(tmp_path, {"random_weights": True}, trials=12).run()
    assert result.verdict == "latency_only" and set(result.picks) == {"pick", "fastest"}
    assert not any(getattr(c, "values", None) or c.final_differences for c in (*result.candidates, result.baseline))
    verified = [c for c in result.candidates if isinstance(c, Finalist) and c.verification.status == "verified"]
    assert result.pick.processed_tokens == max(c.processed_tokens for c in verified)
    assert "random weights" in result.reason and result.quality_weights == {}


def test_too_few_heldout_prompts_are_inconclusive(tmp_path):
    space = {"prompts": {"source": "nano", "search": 16, "heldout": 16, "micro_batch": 8}}
    result = study(tmp_path, {"drop": lambda steps: 0.0}, space, max_drop=0.02, trials=8).run()
    assert (result.verdict, result.exit_code, result.pick) == ("inconclusive", 5, None)
    assert "is too close to the limit" in result.reason and "raise --heldout (about " in result.reason


def test_floors_are_kept(tmp_path):
    space = {"constraints": {"floors": {"geneval_nano": 0.99}}}
    result = study(tmp_path, {"drop": lambda steps: 0.0}, space, trials=6).run()
    assert result.verdict == "infeasible"
    assert all(
        any(v.name == "floor:geneval_nano" and v.status == "broken" for v in c.verdicts) for c in result.candidates
    )


@pytest.mark.parametrize(("heldout", "verdict"), [(32, "inconclusive"), (320, "verified")])
def test_a_floor_that_every_prompt_keeps_is_proved_by_many_only(tmp_path, monkeypatch, heldout, verdict):
    """All values 1, so the range seen is nothing: 32 prompts still prove no more than a mean of 0.91."""
    monkeypatch.setattr(FakeEvaluator, "quality", _always_right)
    space = {
        "constraints": {"floors": {"geneval_nano": 0.95}},
        "prompts": {"source": "nano", "search": 16, "heldout": heldout, "micro_batch": 16},
    }
    result = study(tmp_path, space=space, trials=4, max_drop=0.3).run()
    assert result.verdict == verdict
    floors = [
        v for c in result.candidates if isinstance(c, Finalist) for v in c.verification.verdicts if "floor" in v.name
    ]
    assert floors and all(v.value == 1 and v.bound < 1 - 2 / heldout for v in floors)


def _always_right(self, schedules, split, batch):
    ones = np.ones(len(self.prompts[split].batch(batch)[0]))
    return [{"geneval_nano": ones, "quality": ones} for _ in schedules]


def test_known_expansions_are_told_and_not_evaluated_again(tmp_path):
    work = study(tmp_path, trials=24)
    result = work.run()
    keys = [c.key for c in result.candidates]
    assert len(keys) == len(set(keys)) == 24
    assert result.trials > 24, "a space this small repeats itself"
    rounds = work.evaluator.quality_calls
    assert rounds <= 2 * (24 // 5 + 2) + 2 + 8


def test_an_exhausted_space_ends_the_search(tmp_path):
    space = {"parameters": {"structure_end": {"low": 4, "high": 5}, "skip_last": {"low": 0, "high": 1}}, "enqueue": []}
    result = study(tmp_path, space=space, trials=30).run()
    assert "exhausted" in result.stop_reason and len(result.candidates) == 1


def test_search_figures_are_paired_and_corrected_for_drift(tmp_path):
    result = study(tmp_path, trials=6).run()
    base = result.baseline
    for candidate in result.candidates:
        difference = np.asarray(candidate.values["quality"]) - np.asarray(base.values["quality"])
        assert candidate.differences["quality"].mean == pytest.approx(difference.mean())
        latency = candidate.latency
        assert latency.drift_corrected_ms == pytest.approx(latency.ratio.mean * base.latency.median_ms)


def test_a_wish_to_stop_writes_everything_and_the_same_command_goes_on(tmp_path):
    asked = iter([False] * 4 + [True] * 50)
    partial = study(tmp_path, {"drop": lambda s: 0.0}, BIG, trials=15, stop=lambda: next(asked)).run()
    assert partial.verdict == "partial" and 0 < len(partial.candidates) < 15 and "stopped" in partial.reason
    whole = study(tmp_path, {"drop": lambda s: 0.0}, BIG, trials=15).run()
    assert whole.verdict == "verified" and len(whole.candidates) == 15
    assert [c.key for c in whole.candidates][: len(partial.candidates)] == [c.key for c in partial.candidates]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_drop": 0.01}, "max_drop.geneval_nano was 0.05 and is 0.01"),
        ({"budget": "50%"}, "budget was 60% and is 50%"),
        ({"seed": 3}, "another study: seed was 0 and is 3; search prompts differ; held-out prompts differ;"),
        ({"space": {"semantic_end": 1}}, "space.semantic_end was 0 and is 1"),
        ({"space": {"constraints": {"floors": {"psnr": 1.0}}}}, "space.floors.psnr was not given and is 1.0"),
        (
            {"space": {"prompts": {"source": "nano", "search": 8, "heldout": 64, "micro_batch": 8}}},
            "search prompts differ",
        ),
    ],
)
def test_another_study_is_not_resumed(tmp_path, change, says):
    study(tmp_path, trials=3).run()
    before = (tmp_path / "trials.jsonl").read_bytes()
    with pytest.raises(UsageError) as caught:
        study(tmp_path, trials=3, **change).run()
    assert "another study" in str(caught.value) and "\n" not in str(caught.value)
    assert says in str(caught.value)
    assert (tmp_path / "trials.jsonl").read_bytes() == before


def test_another_model_is_not_resumed(tmp_path):
    study(tmp_path, trials=3).run()
    other = study(tmp_path, trials=3)
    other.facts = dataclasses.replace(other.facts, provenance={"weights": {"w": "ff"}})
    with pytest.raises(UsageError, match=r"weights\.w was 00 and is ff"):
        other.run()


def test_results_survive_json_with_infinite_bounds(tmp_path):
    result = study(tmp_path, trials=3).run()
    candidate = result.candidates[0]
    odd = dataclasses.replace(candidate, processed_tokens=float("inf"))
    assert build(type(candidate), record_of(odd)).processed_tokens == float("inf")
    with pytest.raises(UsageError, match="schema"):
        StudyResult.from_json('{"schema": 99}')
    with pytest.raises(UsageError, match="not JSON"):
        StudyResult.from_json("{")


def test_a_tight_time_budget_ends_the_search_early(tmp_path):
    result = study(tmp_path, trials=30, time_budget_s=1e-6).run()
    assert "tuning time" in result.stop_reason and 0 < len(result.candidates) < 30


def test_ratio_of_a_candidate_is_that_of_its_raw_samples(tmp_path):
    result = study(tmp_path, {"drop": lambda s: 0.0}, BIG, trials=8).run()
    pick, base = result.pick.verification.latency, result.baseline.verification.latency
    assert pick.ratio.mean == pytest.approx(ratio_interval(pick.samples_ms, base.samples_ms).mean)
