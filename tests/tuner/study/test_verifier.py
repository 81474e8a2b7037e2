"""The verifier itself on fakes: who is timed on, and of whom held-out images are drawn."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from stagevar.schedule import exact, preset
from tests.fakes.studies import CHUNKS, GRIDS, SPACE, FakeEvaluator
from tuner.config.limits import parse_budget
from tuner.config.prompts import load_prompts
from tuner.config.quality import quality_limits
from tuner.config.space_file import parse_space
from tuner.evaluation.local import LocalExecutor
from tuner.statistics.bounds import drop_bounds, ratio_interval
from tuner.statistics.looks import FIRST_ALPHA, TURN_SHARE, claims, turn_shares
from tuner.study.finalist_times import BASELINE, ROUNDS
from tuner.study.verdict import Limits
from tuner.study.verification import Verifier
from tuner.testing.formulas import Samples

FULL = exact(len(GRIDS)).expand(GRIDS, CHUNKS)
FAST, EDGE = (preset(name, GRIDS).expand(GRIDS, CHUNKS) for name in ("skip-2", "skip-1"))
PROMPTS = {"source": "nano", "search": 16, "heldout": 320, "micro_batch": 16}


class Counting(FakeEvaluator):
    """Timings with a given spread of the ratio; counts what was timed and drawn."""

    def __init__(self, ratios, spread=0.0, seed=0, **options):
        space = parse_space({**SPACE, "prompts": PROMPTS})
        super().__init__(load_prompts(space.prompts), **options)
        self.limits = Limits(parse_budget("60%"), 100.0, quality_limits(space.quality, {"geneval_nano": 0.05}))
        self.ratios, self.spread, self.random = ratios, spread, np.random.default_rng(seed)
        self.timed, self.drawn = Counter(), Counter()

    def latency(self, schedules, rounds, warm_up_at_most=12):
        self.timed.update(dict.fromkeys(schedules, rounds))
        # As many above as below, so that the median of many rounds is the ratio itself.
        errors = {name: self.spread * self.random.permutation(np.linspace(-1, 1, rounds)) for name in schedules}
        return {
            name: Samples(
                100 * self.ratios.get(steps, 1.0) * np.exp(errors[name] if steps != FULL else 0 * errors[name])
            )
            for name, steps in schedules.items()
        }

    def quality(self, schedules, split, batch):
        self.drawn.update(schedules)
        return super().quality(schedules, split, batch)


def verified(evaluator, finalists, tokens=None, **options):
    options["processed_tokens"] = tokens
    heldout = evaluator.prompts["heldout"]
    return Verifier(evaluator, LocalExecutor(evaluator), finalists, FULL, heldout, evaluator.limits, **options).run()


def test_a_decided_finalist_is_timed_no_more_and_an_undecided_one_until_the_last_look_decides():
    evaluator = Counting({FAST: 0.3, EDGE: 0.585}, spread=0.1, drop=lambda steps: 0.0)
    found = verified(evaluator, {"fast": FAST, "edge": EDGE})
    assert evaluator.timed["fast"] == ROUNDS[0] and evaluator.timed[BASELINE] == evaluator.timed["edge"] > 60
    assert {found[name].status for name in ("fast", "edge")} == {"verified"}
    assert found["edge"].latency.ratio.n == evaluator.timed["edge"] and found["fast"].latency.ratio.n == ROUNDS[0]


def test_a_finalist_that_no_look_would_decide_is_left_after_sixty_rounds():
    evaluator = Counting({FAST: 0.3, EDGE: 0.5999}, spread=0.2, drop=lambda steps: 0.0)
    found = verified(evaluator, {"fast": FAST, "edge": EDGE})
    assert evaluator.timed["edge"] == 60 and found["edge"].times_open


@pytest.mark.parametrize(("ratio", "rounds"), [(0.5999, ROUNDS[-1]), (0.6001, 60)])
def test_where_none_is_within_the_budget_those_whose_estimates_are_get_every_round(ratio, rounds):
    evaluator = Counting({EDGE: ratio}, spread=0.2, drop=lambda steps: 0.0)
    assert verified(evaluator, {"edge": EDGE})["edge"].times_open and evaluator.timed["edge"] == rounds


@pytest.mark.parametrize("lost", [0.0, 0.5])
def test_whose_time_stayed_open_is_drawn_only_where_nothing_else_is_verified(lost):
    evaluator = Counting({FAST: 0.3, EDGE: 0.5999}, spread=0.2, drop=lambda steps: lost if steps == FAST else 0.0)
    found = verified(evaluator, {"fast": FAST, "edge": EDGE})
    assert found["edge"].status == "open" and found["fast"].status == ("broken" if lost else "verified")
    assert bool(evaluator.drawn[EDGE]) == bool(lost)
    assert evaluator.drawn[FULL] == max(evaluator.drawn[FAST], evaluator.drawn[EDGE]), "each batch once"
    assert len(found[BASELINE].values["quality"]) == found[BASELINE].prompts == 16 * evaluator.drawn[FULL]


def test_all_looks_at_all_finalists_share_the_error_of_a_judgement():
    evaluator = Counting({FAST: 0.3, EDGE: 0.585}, spread=0.1, drop=lambda steps: 0.0)
    found = verified(evaluator, {"fast": FAST, "edge": EDGE})
    for name in ("fast", "edge"):
        own = found[name].latency.samples_ms
        beside = found[BASELINE].latency.samples_ms[: len(own)]
        interval = ratio_interval(own, beside, 1 - 2 * FIRST_ALPHA / len(ROUNDS) / 2)
        assert found[name].verdicts[0].bound == pytest.approx(100 * interval.high)


# ------------------------------------------------------------------------------------------------ one after another


def test_one_by_one_nothing_is_drawn_of_those_behind_the_verified_one():
    evaluator = Counting({FAST: 0.3, EDGE: 0.5}, drop=lambda steps: 0.0)
    found = verified(evaluator, {"edge": EDGE, "fast": FAST}, one_by_one=True)
    assert found["edge"].status == "verified" and not evaluator.drawn[FAST]
    assert (found["fast"].status, found["fast"].prompts, found["fast"].times_open) == ("open", 0, False)
    assert [found[name].error_share for name in ("edge", "fast")] == pytest.approx([TURN_SHARE, 1 - TURN_SHARE])
    assert found[BASELINE].error_share is None and found[BASELINE].prompts == found["edge"].prompts


def test_one_by_one_those_within_the_budget_come_first_and_have_most_of_the_error():
    evaluator = Counting({FAST: 0.3, EDGE: 0.5999}, spread=0.2, drop=lambda steps: 0.0)
    found = verified(evaluator, {"edge": EDGE, "fast": FAST}, one_by_one=True)
    assert found["edge"].times_open and not evaluator.drawn[EDGE] and found["fast"].status == "verified"
    assert [found[name].error_share for name in ("fast", "edge")] == pytest.approx([TURN_SHARE, 1 - TURN_SHARE])
    evaluator = Counting({FAST: 0.3, EDGE: 0.9}, drop=lambda steps: 0.0)
    found = verified(evaluator, {"edge": EDGE, "fast": FAST}, one_by_one=True)
    assert (found["fast"].error_share, found["edge"].error_share, found["edge"].status) == (1.0, None, "broken")


def test_one_by_one_the_next_is_judged_where_one_is_broken_and_the_full_schedule_is_drawn_once():
    evaluator = Counting({FAST: 0.3, EDGE: 0.5}, drop=lambda steps: 0.5 * (steps == EDGE), discordance=0.01)
    found = verified(evaluator, {"edge": EDGE, "fast": FAST}, one_by_one=True)
    assert found["edge"].status == "broken" and found["edge"].prompts < found["fast"].prompts
    assert found["fast"].status == "verified"
    assert evaluator.drawn[FULL] == max(evaluator.drawn[FAST], evaluator.drawn[EDGE]), "each batch once"
    own = found["fast"]
    differences = np.subtract(own.values["geneval_nano"], found[BASELINE].values["geneval_nano"][: own.prompts])
    alpha = claims(320, 16)[own.prompts] * (1 - TURN_SHARE)
    [verdict] = [v for v in own.verdicts if v.name == "drop:geneval_nano"]
    assert verdict.bound == drop_bounds(differences[None], 1.0, alpha)[0][0]


@pytest.mark.parametrize("finalists", [1, 2, 6])
def test_one_by_one_finalists_that_lose_just_too_much_are_claimed_in_one_study_of_twenty_at_most(finalists):
    rng, studies, wrong = np.random.default_rng(4), 400, 0
    shares = turn_shares(finalists)
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    for _ in range(studies):
        for share in shares:
            lost_N = rng.random(512) < 0.0501
            wrong += drop_bounds(-lost_N[None].astype(float), 1.0, FIRST_ALPHA * share)[0][0] <= 0.05
    assert wrong / studies <= FIRST_ALPHA + 3 * (FIRST_ALPHA / studies) ** 0.5


@pytest.mark.parametrize("second", [0.0, 0.5])
def test_one_by_one_a_close_one_waits_for_its_next_and_is_judged_to_the_end_if_that_fails(second):
    """Of the first finalist nearly 5 % of the prompts are lost where 5 % are allowed: 1,024 prompts would not prove that."""
    evaluator = Counting({FAST: 0.3, EDGE: 0.5}, drop=lambda steps: {FAST: second, EDGE: 0.045}.get(steps, 0.0))
    evaluator.prompts = load_prompts(parse_space({**SPACE, "prompts": {**PROMPTS, "heldout": 1024}}).prompts)
    found = verified(evaluator, {"edge": EDGE, "fast": FAST}, one_by_one=True)
    if second:
        assert (found["edge"].status, found["edge"].prompts, found["fast"].status) == ("open", 1024, "broken")
    else:
        assert (found["edge"].status, found["edge"].prompts) == ("open", 256) and found["fast"].status == "verified"
    for name in ("edge", "fast"):
        assert len(found[name].values["geneval_nano"]) == found[name].prompts == 16 * evaluator.drawn[steps_of(name)]


def steps_of(name):
    return EDGE if name == "edge" else FAST


def test_another_studys_prompts_that_end_within_a_micro_batch_are_drawn_whole():
    """72 prompts are four micro-batches of 16 and a half; the least accelerated one is not proved, so drawing goes on."""
    evaluator = Counting({FAST: 0.3, EDGE: 0.5}, drop=lambda steps: 0.0)
    evaluator.limits = dataclasses.replace(
        evaluator.limits, metrics=quality_limits(parse_space(SPACE).quality, {"geneval_nano": 0.1})
    )
    whole = evaluator.prompts["heldout"]
    evaluator.prompts = {**evaluator.prompts, "heldout": whole.first(72)}
    there = verified(evaluator, {"fast": FAST})
    assert there["fast"].status == "verified" and there["fast"].prompts == there[BASELINE].prompts == 72
    evaluator.prompts = {**evaluator.prompts, "heldout": whole}
    evaluator.drawn.clear()
    proof = [v for v in there["fast"].verdicts if v.name.startswith("drop:")]
    proved = {"fast": dataclasses.replace(there["fast"], verdicts=tuple(proof))}
    found = verified(
        evaluator, {"fast": FAST, "edge": EDGE}, earlier=there, proved=proved, tokens={"edge": 2.0, "fast": 1.0}
    )
    assert (found["fast"].prompts, found["edge"].prompts, found[BASELINE].prompts) == (72, 256, 256)
    assert evaluator.drawn == {EDGE: 16, FULL: 16 - 4}
    alone = [evaluator.quality([FULL], "heldout", batch)[0]["geneval_nano"] for batch in range(16)]
    assert found[BASELINE].values["geneval_nano"] == tuple(np.concatenate(alone))
