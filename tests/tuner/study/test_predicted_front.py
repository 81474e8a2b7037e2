"""Sensitivities before trials, on fakes: the table, the front that it proposes, when it is not believed, and what is kept."""

import json

import numpy as np
import pytest

from stagevar.errors import UsageError
from tests.fakes.studies import FULL_TOKENS, study, tokens
from tuner.proposals.sensitivity import Sensitivities
from tuner.proposals.trial_sampler import TrialSampler
from tuner.results.run_dir import SENSITIVITY_FILE, EvidenceLog
from tuner.study.latency_source import LatencySource
from tuner.study.options import FULL_TRIALS, SearchShortcuts
from tuner.study.predicted_front import LEAST_FEASIBLE, PredictedFront, load_table

FRONT = SearchShortcuts(overlap=False, sensitivity=True)
FEW = SearchShortcuts(overlap=False, sensitivity=True, few=True)
SPACE = {"prompts": {"source": "nano", "search": 64, "heldout": 64, "micro_batch": 8}}


def drop(steps):
    """What is left out costs; a skipped last scale costs all."""
    return 0.6 if steps[-1].skipped else 0.3 * (1 - tokens(steps) / FULL_TOKENS)


def run(path, shortcuts=FRONT, **options):
    one = study(
        path, {"drop": drop, "noise": 0.0}, SPACE, **{"trials": 12, "max_drop": 0.3, "shortcuts": shortcuts, **options}
    )
    return one.run(), one


def test_the_predicted_front_is_tried_first_and_what_it_said_is_compared(tmp_path):
    result, _ = run(tmp_path)
    predicted = [c for c in result.candidates if c.source == "predicted"]
    assert 1 <= len(predicted) <= 6, "half of the trials stay the sampler's"
    presets = [c for c in result.candidates if c.source.startswith("enqueued")]
    assert max(c.trial for c in presets) < min(c.trial for c in predicted)
    assert not any(c.skipped_scales for c in predicted), "the table says what the last scale costs"
    assert all(c.latency.ratio.mean <= 0.6 * 1.1 for c in predicted)
    facts = result.search["prediction"]
    assert facts["measured"] and facts["trusted"] and facts["proposed"] == len(predicted) and facts["prompts"] == 16
    assert facts["metrics"]["geneval_nano"]["rank_correlation"] > 0.5
    assert result.sampled == len(result.candidates) - len(presets)


def test_the_front_of_a_space_that_can_be_listed_is_no_matter_of_chance(tmp_path, monkeypatch):
    _, one = run(tmp_path, trials=1)
    latency = LatencySource(one.ledger, one.evaluator, one.progress)
    parts = tmp_path, one.ledger, one.executor, one.prompts["search"], latency, one.progress

    def front(seed):
        found = PredictedFront(*parts, seed, earlier=load_table(tmp_path, "fake"))
        assert found.take_earlier()
        return [forecast.key for forecast in found.forecasts]

    monkeypatch.setattr("tuner.study.predicted_front.FRONT_SETTINGS", 512)
    assert front(1) == front(2) and len(front(1)) > 10
    monkeypatch.setattr("tuner.study.predicted_front.FRONT_SETTINGS", 511)
    assert front(1) != front(2), "drawn"


def test_a_front_is_priced_by_steps_even_where_known_settings_could_take_all_trials(tmp_path):
    """Token rows leave out what every image costs besides: here they take .68 of the latency for .6."""
    enqueue = ["stagevar-paper", "stagevar-released", "fastvar", "skip-1", "skip-2", "conditional", "conditional-1"]
    options = {"trials": 6, "max_drop": 0.3, "shortcuts": FEW, "budget": "60%"}
    result = study(tmp_path, {"drop": drop, "noise": 0.0}, {**SPACE, "enqueue": enqueue}, **options).run()
    ratios = [c.latency.ratio.mean for c in result.candidates if c.source == "predicted"]
    assert len(ratios) > 2 and max(ratios) <= 0.61


def test_few_trials_pass_presets_over_that_are_predicted_to_break_a_limit(tmp_path):
    result, _ = run(tmp_path, FEW, trials=6)
    assert not any(c.source == "enqueued: skip-1" for c in result.candidates)
    assert len(result.candidates) == 6 and sum(c.source == "predicted" for c in result.candidates) >= 4


def test_what_the_space_proposes_is_tried_whatever_is_predicted_of_its_quality(tmp_path):
    proposals = {"own": {"structure_end": 5, "skip": [5]}, "slow": {"structure_end": 5, "skip": [1]}}
    one = study(
        tmp_path, {"drop": drop, "noise": 0.0}, {**SPACE, "proposals": proposals}, trials=6, max_drop=0.3, shortcuts=FEW
    )
    tried = {c.source for c in one.run().candidates}
    assert "enqueued: own" in tried, "its predicted drop is .6"
    assert not tried & {"enqueued: skip-1", "enqueued: slow"}, "a preset with that drop; a proposal beyond the budget"


def test_the_table_is_measured_once_and_kept_for_other_studies(tmp_path):
    run(tmp_path, trials=4)
    [record] = [r for r in EvidenceLog(tmp_path).read() if r["kind"] == "sensitivity"]
    kept = load_table(tmp_path, "fake")
    assert kept.to_data() == Sensitivities.from_data(record["table"]).to_data()
    calls = []
    one_more = study(tmp_path, {"drop": drop, "noise": 0.0}, SPACE, trials=6, max_drop=0.3, shortcuts=FRONT)
    inner = one_more.executor.run
    one_more.executor.run = lambda tasks: (calls.extend(len(t.schedules) for t in tasks), inner(tasks))[1]
    result = one_more.run()
    assert len(result.candidates) == 6 and max(calls) < len(kept.rows), "no task holds the table again"
    assert len([r for r in EvidenceLog(tmp_path).read() if r["kind"] == "sensitivity"]) == 1


@pytest.mark.parametrize("method", ["again", "begin", "tell"])
def test_killed_around_its_proposals_a_study_reaches_its_target_with_one_table(tmp_path, monkeypatch, method):
    class Killed(BaseException):
        pass

    def dying(self, *args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrialSampler, method, dying)
        with pytest.raises(Killed):
            run(tmp_path, trials=8)
    result, _ = run(tmp_path, trials=8)
    assert len({c.key for c in result.candidates}) == len(result.candidates) == 8
    assert any(c.source == "predicted" for c in result.candidates)
    assert len([r for r in EvidenceLog(tmp_path).read() if r["kind"] == "sensitivity"]) == 1


@pytest.mark.parametrize(("asks", "timed", "judged"), [(0, False, 0), (1, True, 0), (2, True, 1), (3, True, 2)])
def test_a_stop_ends_before_the_next_part_and_a_resume_goes_on_as_if_nothing_had_happened(
    tmp_path, asks, timed, judged
):
    """Asked before steps are timed, before sensitivities, and between the table's two micro-batches."""
    options = {"trials": 6, "max_drop": 0.3, "shortcuts": FEW}
    made = {"drop": drop, "noise": 0.0}
    left = iter([False] * asks)
    one = study(tmp_path / "a", made, SPACE, stop=lambda: next(left, True), **options)
    found = {"timed": False, "judged": 0}
    step_ms, run_tasks = one.evaluator.step_ms, one.executor.run

    def timing(*arguments):
        found["timed"] = True
        return step_ms(*arguments)

    def judging(tasks):
        for task, outcomes in run_tasks(tasks):
            found["judged"] += len(task.schedules) > 1
            yield task, outcomes

    one.evaluator.step_ms, one.executor.run = timing, judging
    result = one.run()
    assert result.verdict == "partial" and not result.candidates and result.stop_reason == "stopped by the user"
    assert found == {"timed": timed, "judged": judged}
    whole = study(tmp_path / "b", made, SPACE, **options).run()
    resumed = study(tmp_path / "a", made, SPACE, **options).run()
    assert [(c.key, c.source) for c in resumed.candidates] == [(c.key, c.source) for c in whole.candidates]


def test_an_earlier_table_is_taken_over_where_it_has_the_metrics(tmp_path):
    run(tmp_path / "a", trials=4)
    earlier = load_table(tmp_path / "a", "fake")
    result, _ = run(tmp_path / "b", trials=6, earlier=earlier, seed=1)
    assert result.search["prediction"]["measured"] is False and (tmp_path / "b" / SENSITIVITY_FILE).exists()
    other = Sensitivities(["clip_score"], earlier.rows)
    result, _ = run(tmp_path / "c", trials=4, earlier=other)
    assert result.search["prediction"]["measured"] is True


@pytest.mark.parametrize(("lost", "tried"), [(0.0, 12), (0.35, FULL_TRIALS)])
def test_predictions_that_do_not_hold_are_said_and_followed_no_further(tmp_path, lost, tried):
    """A table that has it the wrong way round: what it calls harmless is what costs. Few trials stay few if others keep the
    limits, and become a whole search if next to none does."""
    run(tmp_path / "a", trials=4)
    right = load_table(tmp_path / "a", "fake")
    wrong = Sensitivities(
        right.metrics, {c: np.full(row.shape, -(0.6 + row.mean()) / 2) for c, row in right.rows.items()}
    )
    made = {"drop": lambda steps: lost * (tokens(steps) < FULL_TOKENS) + drop(steps), "noise": 0.0}
    options = {"trials": 12, "max_drop": 0.3, "shortcuts": FEW, "earlier": wrong, "budget": "95%"}
    result = study(tmp_path / "b", made, SPACE, **options).run()
    assert result.search["prediction"]["trusted"] is False
    assert (sum(c.feasible for c in result.candidates) >= LEAST_FEASIBLE) == (not lost)
    assert len(result.candidates) == tried
    assert any(c.source == "sampler" for c in result.candidates)


@pytest.mark.parametrize(("lost", "tried", "said"), [(0.0, 12, ""), (0.35, FULL_TRIALS, "none of 12 schedules within")])
def test_few_trials_become_a_whole_search_where_next_to_none_keeps_the_limits(tmp_path, lost, tried, said):
    """Whether predictions hold or not: here they are right to expect nothing."""
    made = {"drop": lambda steps: lost * (tokens(steps) < FULL_TOKENS) + drop(steps), "noise": 0.0}
    one = study(tmp_path, made, SPACE, trials=12, max_drop=0.3, shortcuts=FEW)
    lines = []
    one.progress.say = lines.append
    result = one.run()
    assert result.search["prediction"]["trusted"] and len(result.candidates) == tried
    assert [line for line in lines if "searching on" in line] == (
        [f"{said} the limits so far: searching on, up to {FULL_TRIALS}"] if said else []
    )


def test_an_order_is_wrong_only_beyond_what_noise_and_its_own_error_explain(tmp_path, monkeypatch):
    front = PredictedFront.__new__(PredictedFront)
    rng = np.random.default_rng(0)

    def why(truth, told, prompts=48, noise=0.02):
        def rows(means, count):
            return [mean + rng.normal(0, noise, count) for mean in means]

        monkeypatch.setattr(front, "_pairs", lambda metric: (rows(told, 16), rows(truth, prompts)), raising=False)
        return front._wrong_order()

    losses = np.linspace(-0.5, 0, 10)
    assert why(losses, losses) == "" and why(losses[:5], losses[:5][::-1]) == "", "five are too few"
    assert "rank correlation -1.00 on 10 schedules, where noise allows 1.0" in why(losses, losses[::-1])
    assert why(losses, rng.permutation(losses), noise=3.0) == "", "nothing can be told from noise"
    assert why(losses, np.zeros(10), noise=0.0) == "", "the table tells them apart by nothing"


def test_without_a_metric_there_is_no_table(tmp_path):
    one = study(tmp_path, {"random_weights": True}, trials=4, shortcuts=FRONT)
    result = one.run()
    assert "prediction" not in result.search and not (tmp_path / SENSITIVITY_FILE).exists()


def test_a_table_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    assert load_table(tmp_path, "fake") is None and load_table(tmp_path / "profile.yaml", "fake") is None
    run(tmp_path, trials=1)
    with pytest.raises(UsageError, match="is of model 'fake', not 'nano'"):
        load_table(tmp_path, "nano")
    assert load_table(tmp_path / "profile.yaml", "fake") is not None, "beside a profile"
    path = tmp_path / SENSITIVITY_FILE
    for text in ("{", "[]", "{}", json.dumps({**json.loads(path.read_text()), "changes": [{}]})):
        path.write_text(text)
        with pytest.raises(UsageError, match="is damaged"):
            load_table(tmp_path, "fake")
