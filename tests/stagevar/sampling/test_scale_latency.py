"""Shares per scale: of the steps that were run, in turn, nothing for a skipped one."""

from types import SimpleNamespace

import pytest

from stagevar.sampling.sampler import Sampler
from stagevar.sampling.scale_latency import time_scales
from stagevar.schedule import StageSchedule, exact, skip_only
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.fakes.sample_study import make
from tuner.study.ledger import Ledger
from tuner.study.study import Study
from tuner.testing.formulas import FormulaEvaluator


@pytest.fixture
def ran():
    """A sampler that writes down what it advances."""
    sampler = Sampler(tiny_infinity())
    sampler.seen = []
    advance = sampler.advance
    sampler.advance = lambda generation, step: (sampler.seen.append(step), advance(generation, step))
    return sampler


def test_every_schedule_is_timed_scale_by_scale_in_turn(ran):
    full = exact(len(GRIDS)).expand(GRIDS, ran.chunks)
    short = skip_only(GRIDS).expand(GRIDS, ran.chunks)
    times = time_scales(ran, {"full": full, "short": short}, "a red circle", 0, rounds=2)
    assert ran.seen == [*full, *short] * 3
    assert list(times) == ["full", "short"] and [len(t) for t in times.values()] == [5, 5]
    assert all(t > 0 for t in times["full"])
    assert times["short"][-1] == 0 and all(t > 0 for t in times["short"][:-1])


def test_a_first_round_is_not_counted(ran, monkeypatch):
    clock = iter([100.0] * 5 + [1.0] * 5 + [2.0] * 5 + [3.0] * 5)
    monkeypatch.setattr("stagevar.sampling.scale_latency.time_once", lambda run, device: (next(clock), run())[:1])
    steps = exact(len(GRIDS)).expand(GRIDS, ran.chunks)
    assert time_scales(ran, {"full": steps}, "a", 0, rounds=3) == {"full": (2.0,) * 5}


def test_schedules_that_decide_have_no_fixed_shares(ran):
    decided = StageSchedule(len(GRIDS), decision="some-rule").expand(GRIDS, ran.chunks)
    assert any(step.decision for step in decided)
    assert time_scales(ran, {"decided": decided}, "a", 0, rounds=1) == {"decided": ()}
    assert ran.seen == []


def test_no_rounds_is_an_error(ran):
    with pytest.raises(ValueError, match="rounds 0 must be at least 1"):
        time_scales(ran, {}, "a", 0, rounds=0)


def study_of(result, evaluator, said):
    """What a study needs to add the shares to its measurements."""
    pick = result.pick
    ledger = object.__new__(Ledger)  # what it makes of a run's files is not wanted here
    ledger.full_key, ledger.baseline, ledger.candidates = result.baseline.key, result.baseline, {pick.key: pick}
    ledger.steps = {result.baseline.key: "all steps", pick.key: "fewer steps"}
    return SimpleNamespace(
        evaluator=evaluator, ledger=ledger, stop=lambda: False, progress=SimpleNamespace(say=said.append)
    )


def test_a_study_keeps_the_shares_with_its_newest_measurement(tmp_path):
    result = make("full", tmp_path)
    evaluator = SimpleNamespace(
        scale_ms=lambda schedules: {key: (1.0, float(len(steps))) for key, steps in schedules.items()}
    )
    study = study_of(result, evaluator, [])
    Study._time_scales(study, [result.pick.key])
    assert study.ledger.baseline.verification.latency.scale_ms == (1.0, 9.0)
    assert study.ledger.candidates[result.pick.key].verification.latency.scale_ms == (1.0, 11.0)
    assert (
        study.ledger.candidates[result.pick.key].verification.latency.samples_ms
        == result.pick.verification.latency.samples_ms
    )


def test_a_study_goes_on_without_the_shares(tmp_path):
    result = make("full", tmp_path)
    said = []

    def broken(schedules):
        raise RuntimeError("no clock\nno time")

    study = study_of(result, SimpleNamespace(scale_ms=broken), said)
    Study._time_scales(study, [result.pick.key])
    assert study.ledger.baseline is result.baseline and said == ["could not time single scales: RuntimeError: no clock"]
    without = study_of(result, FormulaEvaluator(), said)
    Study._time_scales(without, [result.pick.key])
    assert without.ledger.baseline is result.baseline and len(said) == 1
