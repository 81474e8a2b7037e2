"""The search on fakes: every saving changes the cost and not the claim, and each can be switched off."""

import dataclasses
import threading
import zlib

import numpy as np
import pytest

from tests.fakes.studies import FULL_TOKENS, study, tokens
from tuner.proposals.sampler_process import SamplerProcess
from tuner.report.page import write_report
from tuner.results.candidate import Finalist, Pruned
from tuner.results.run_dir import EvidenceLog
from tuner.study import search as search_module
from tuner.study.ledger import Ledger
from tuner.study.options import EXHAUSTIVE, SearchShortcuts

PLAIN = SearchShortcuts(batch=1, tree=False, table=False, rungs=False, overlap=False)
SPACE = {"prompts": {"source": "nano", "search": 64, "heldout": 128, "micro_batch": 8}}


def run(path, evaluator=None, space=SPACE, **options):
    made = study(path, evaluator or {}, space, **options)
    return made.run(), made


def test_walking_a_tree_and_asking_beside_change_no_value(tmp_path):
    found = {}
    for name, shortcuts in {
        "plain": PLAIN,
        "rounds": dataclasses.replace(PLAIN, batch=5),
        "tree": dataclasses.replace(PLAIN, batch=5, tree=True),
        "overlap": dataclasses.replace(PLAIN, batch=5, tree=True, overlap=True),
    }.items():
        result, _ = run(tmp_path / name, trials=14, shortcuts=shortcuts)
        found[name] = {c.key: c.values for c in result.candidates}
        assert len(found[name]) == 14 and not result.search["stopped_early"] and not result.search["predicted"]
    assert found["plain"] == found["rounds"] == found["tree"] == found["overlap"]


def test_a_tree_takes_fewer_calls_of_the_evaluator(tmp_path):
    _, one = run(tmp_path / "one", trials=10, shortcuts=PLAIN)
    _, many = run(tmp_path / "many", trials=10, shortcuts=dataclasses.replace(PLAIN, batch=5, tree=True))
    assert many.evaluator.quality_calls < 0.5 * one.evaluator.quality_calls


def test_clearly_worse_schedules_are_stopped_early_and_never_reach_the_front(tmp_path):
    def drop(steps):
        return 0.6 if any(step.skipped for step in steps) else 0.0

    result, _ = run(tmp_path, {"drop": drop}, trials=20, shortcuts=SearchShortcuts(overlap=False, table=False))
    stopped = [c for c in result.candidates if isinstance(c, Pruned)]
    assert stopped and result.search["stopped_early"] == len(stopped)
    assert result.search["prompts_run"] < 0.95 * 20 * 64
    for candidate in result.candidates:
        assert len(candidate.values["quality"]) == (
            64 if candidate.fully_evaluated else candidate.differences["quality"].n
        )
    for candidate in stopped:
        assert len(candidate.values["quality"]) < 64 and not candidate.feasible
        assert candidate.key not in result.front and not isinstance(candidate, Finalist)
    skipping = [c for c in result.candidates if c.skipped_scales and c.trial > 8]
    assert skipping and all(isinstance(c, Pruned) for c in skipping)


def test_what_is_stopped_early_is_told_with_its_number_of_prompts(tmp_path):
    result, made = run(tmp_path, {"drop": lambda s: 0.6 * (1 - tokens(s) / FULL_TOKENS)}, trials=20, max_drop=0.1)
    from tuner.proposals.trial_sampler import TrialSampler

    trial_sampler = TrialSampler(tmp_path, made.space, 0, made.ledger.constraint_names, "random")
    told = {t.number: t for t in trial_sampler.study.get_trials(deepcopy=False)}
    stopped = [c for c in result.candidates if isinstance(c, Pruned)]
    assert stopped
    for candidate in stopped:
        trial = told[candidate.trial]
        assert trial.state.name == "COMPLETE" and trial.user_attrs["prompts"] == len(candidate.values["quality"])
        means = [c.differences["quality"].mean for c in result.candidates]
        assert min(means) <= trial.values[1] <= max(means)


def test_latency_comes_from_the_table_and_finalists_are_timed(tmp_path):
    result, _ = run(tmp_path, {"drop": lambda steps: 0.0}, trials=24, max_drop=0.2)
    predicted = [c for c in result.candidates if c.latency.predicted]
    assert len(predicted) > 8 and result.search["table_error"] < 0.05
    assert not any(c.latency.predicted for c in result.candidates if c.source.startswith("enqueued"))
    for candidate in predicted:
        assert candidate.latency.samples_ms == () and candidate.latency.p90_ms is None
        ratio = candidate.latency.ratio
        assert ratio.low < ratio.mean < ratio.high
        assert ratio.mean == pytest.approx(0.2 + 0.8 * candidate.processed_tokens / FULL_TOKENS, rel=0.05)
    assert result.pick is not None and len(result.pick.verification.latency.samples_ms) >= 15


def test_a_table_that_errs_is_not_used(tmp_path):
    """Whole schedules cost something that their steps do not show."""

    def ratio(steps):
        return 0.2 + 0.8 * tokens(steps) / FULL_TOKENS + 0.4 * (zlib.crc32(repr(steps).encode()) % 2)

    said = []
    made = study(tmp_path, {"ratio": ratio}, SPACE, trials=20)
    made.progress.say = said.append
    result = made.run()
    assert sum("step-cost model error" in line for line in said) == 1
    assert result.search["predicted"] == 0 and result.search["table_error"] > 0.05
    assert all(c.latency.samples_ms for c in result.candidates)


def test_an_evaluator_without_step_times_is_timed_end_to_end(tmp_path, monkeypatch):
    made = study(tmp_path, {}, SPACE, trials=8)
    monkeypatch.setattr(made.evaluator, "step_ms", None)
    assert made.run().search["predicted"] == 0


def test_steps_that_cannot_be_timed_are_said_and_cost_nothing_else(tmp_path, monkeypatch):
    def fails(schedules, rounds):
        raise RuntimeError("no clock")

    said = []
    made = study(tmp_path, {}, SPACE, trials=8)
    made.progress.say = said.append
    monkeypatch.setattr(made.evaluator, "step_ms", fails)
    assert len(made.run().candidates) == 8
    assert any("could not time individual steps" in line and "no clock" in line for line in said)


def test_proposals_beyond_the_budget_are_dropped_recorded_and_told(tmp_path):
    result, made = run(tmp_path, {"drop": lambda steps: 0.0}, trials=20, budget="50%")
    dropped = [r for r in EvidenceLog(tmp_path).read() if r["kind"] == "dropped"]
    assert dropped and len(dropped) == result.search["dropped"] == len(made.ledger.dropped)
    for record in dropped:
        steps = made.ledger.steps[record["key"]]
        assert 0.2 + 0.8 * tokens(steps) / FULL_TOKENS > 0.5
        assert record["key"] not in {c.key for c in result.candidates}
        told = made.ledger.outcome_of_dropped(record["key"])
        names = {"latency", "drop:geneval_nano"}
        assert told.constraints["latency"] > 0 and told.prompts == 0 and set(told.constraints) == names
    again = study(tmp_path, {"drop": lambda steps: 0.0}, SPACE, trials=24, budget="50%")
    assert len(again.run().candidates) == 24
    assert set(made.ledger.dropped) <= set(again.ledger.dropped)


def test_a_study_that_only_verifies_again_can_be_reported(tmp_path):
    """Its schedules are predicted, but this part of the study timed no steps."""
    whole, _ = run(tmp_path, {"drop": lambda steps: 0.0}, trials=16)
    again, _ = run(tmp_path, {"drop": lambda steps: 0.0}, trials=16)
    assert again.search["predicted"] == whole.search["predicted"] > 0 and again.search["table_error"] is None
    for result in (whole, again):
        page = write_report(result, tmp_path).read_text()
        assert "was predicted from the costs of their steps" in page
        assert ("with an error of" in page) == (result is whole)


def test_exhaustive_measures_everything(tmp_path):
    result, _ = run(tmp_path, trials=14, budget="50%", shortcuts=dataclasses.replace(EXHAUSTIVE, overlap=False))
    assert not result.search["dropped"]
    assert all(c.fully_evaluated and len(c.values["quality"]) == 64 and c.latency.samples_ms for c in result.candidates)


def test_patience_ends_a_search_that_gains_nothing(tmp_path):
    hopeless = {"drop": lambda steps: 0.6 * (tokens(steps) < FULL_TOKENS)}
    result, made = run(tmp_path, hopeless, trials=60, patience=12)
    assert len(result.candidates) < 30 and result.stop_reason == "the feasible hypervolume is zero for 12 schedules"
    result, _ = run(tmp_path / "b", {"drop": lambda steps: 0.0}, trials=60, patience=12, budget="80%")
    assert len(result.candidates) < 60 and "has not grown for 12" in result.stop_reason
    assert made.ledger.hypervolume() == 0


def test_hypervolume_counts_feasible_schedules_only(tmp_path):
    result, made = run(tmp_path, {"drop": lambda s: 0.3 * (1 - tokens(s) / FULL_TOKENS)}, trials=16, max_drop=0.2)
    feasible = [c for c in result.candidates if c.feasible]
    assert feasible and made.ledger.hypervolume() > 0
    best = max((0.6 - c.latency.ratio.mean) * (c.differences["quality"].mean + 0.2) for c in feasible)
    assert made.ledger.hypervolume() >= best - 1e-12


def test_tpe_takes_over_when_asks_hold_rounds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "ASK_SHARE", -1.0)
    said = []
    made = study(tmp_path, {}, SPACE, trials=30, sampler="auto", shortcuts=SearchShortcuts(overlap=True))
    made.progress.say = said.append
    result = made.run()
    assert sum("switching to TPE" in line for line in said) == 1
    assert result.search["proposing_at_the_end"] == "tpe" and len(result.candidates) == 30


def test_the_gaussian_process_goes_on_while_asks_are_cheap(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "ASK_SHARE", 1e6)
    result, _ = run(tmp_path, trials=16, sampler="auto", shortcuts=SearchShortcuts(overlap=True))
    assert result.search["proposing_at_the_end"] == "gp"


def test_a_chosen_sampler_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "ASK_SHARE", -1.0)
    result, _ = run(tmp_path, trials=16, sampler="random")
    assert result.search["proposing_at_the_end"] == "random"


def test_presets_are_asked_together_and_asks_ahead_are_given_back(tmp_path):
    """Stopped after its first round: what was asked ahead waits in the journal and comes first."""
    rounds = []

    def stop():
        return len([r for r in EvidenceLog(tmp_path).read() if r["kind"] == "trial"]) > 0 and bool(
            rounds.append(1) or True
        )

    shortcuts = SearchShortcuts(overlap=True)
    partial = study(tmp_path, {}, SPACE, trials=12, shortcuts=shortcuts, stop=stop).run()
    assert partial.verdict == "partial" and 0 < len(partial.candidates) < 12
    result = study(tmp_path, {}, SPACE, trials=12, shortcuts=shortcuts).run()
    assert len(result.candidates) == 12 and not result.failures
    trials = [r["candidate"]["trial"] for r in EvidenceLog(tmp_path).read() if r["kind"] == "trial"]
    assert len(set(trials)) == 12


def test_one_thread_registers_records_and_tells(tmp_path, monkeypatch):
    """Asking ahead returns proposals; the ledger, the evidence and what the sampler is told are the main thread's."""
    writers = set()

    def noting(method):
        def noted(*arguments, **options):
            writers.add((method.__name__, threading.current_thread() is threading.main_thread()))
            return method(*arguments, **options)

        return noted

    for owner, names in (
        (EvidenceLog, ("append",)),
        (Ledger, ("register", "record_dropped", "keep")),
        (SamplerProcess, ("tell", "fail")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    flat = {"drop": lambda steps: 0.0}
    result, _ = run(tmp_path, flat, trials=16, budget="50%", shortcuts=SearchShortcuts(overlap=True))
    assert result.search["dropped"] and {name for name, _ in writers} >= {
        "append",
        "register",
        "record_dropped",
        "tell",
    }
    assert {here for _, here in writers} == {True}


def test_features_that_come_again_are_computed_once():
    import torch

    from tuner.metrics.memoized_features import MemoizedFeatures

    calls = []

    def compute(inputs):
        calls.append(1)
        return torch.full((len(inputs), 2), float(len(calls)))

    known = MemoizedFeatures(compute)
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    first = known(images)
    assert known(images.copy()) is first and len(calls) == 1
    assert known(images[::-1]) is not first and len(calls) == 2
    assert known(["ab", "c"]) is known(["ab", "c"]) and len(calls) == 3
    assert known(["a", "bc"]) is not known(["ab", "c"]) and len(calls) == 4
