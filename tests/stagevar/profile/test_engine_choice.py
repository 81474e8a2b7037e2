"""`--engine auto`: the fastest engine whose images equal eager's; on a CPU eager. Engines here are fakes."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from stagevar.choices import ENGINES
from stagevar.errors import InfrastructureError, UsageError
from stagevar.profile import engine_choice
from stagevar.profile.engine_choice import TOLERANCE, EngineTrials, choose_engine, pick_engine
from stagevar.profile.sections import EngineSection, EngineTried
from stagevar.sections import read_section, section_data
from stagevar.timing import Timing


def tried(**latencies):
    return [EngineTried(name.replace("_", "-"), ms, 0.0) for name, ms in latencies.items()]


def never(name):
    raise AssertionError(f"{name} was measured")


def test_a_named_engine_is_taken_and_a_cpu_runs_eager_without_any_measurement():
    assert choose_engine("graph", "cuda", never) == EngineSection("graph", "graph", "it was asked for")
    choice = choose_engine("auto", "cpu", never)
    assert (choice.name, choice.asked, choice.tried) == ("eager", "auto", ())
    with pytest.raises(UsageError, match="unknown engine 'grap'; use auto, eager"):
        choose_engine("grap", "cuda", never)


def test_the_fastest_wins_and_the_losers_latencies_are_kept():
    found = {one.engine: one for one in tried(eager=100, compiled=80, graph=60, graph_compiled=50, graph_kernels=70)}
    asked = []
    choice = choose_engine("auto", "cuda", lambda name: asked.append(name) or found[name])
    assert choice.name == "graph-compiled" and asked == list(ENGINES)
    assert [one.latency_ms for one in choice.tried] == [100, 80, 60, 50, 70]
    assert "50.0 ms per image, 2.00x as fast as eager" in choice.reason and "graph: 60.0 ms" in choice.reason
    assert read_section(EngineSection, section_data(choice), "engine") == choice


def test_the_simpler_of_two_that_are_about_as_fast_wins():
    assert pick_engine(tried(eager=100, compiled=99, graph=60, graph_compiled=59.5)).name == "graph"
    assert pick_engine(tried(eager=100, compiled=99, graph=98.5, graph_compiled=99)).name == "eager"


def test_an_engine_that_draws_other_images_is_refused():
    found = tried(eager=100, compiled=80, graph=60, graph_compiled=50)
    found[3] = dataclasses.replace(found[3], difference=TOLERANCE * 1.5)
    choice = pick_engine(found)
    assert choice.name == "graph" and choice.tried[3].latency_ms == 50
    assert (
        "its images differ by 0.015 of the range" in choice.tried[3].refused
        and choice.tried[3].refused in choice.reason
    )


class FakeSampler:
    """Draws a flat image; its engine takes `ms` by the fake clock."""

    compiled = False

    def __init__(self, name, ms, shade=100, breaks=None, fallback_reason=None):
        self.name, self.ms, self.shade, self.breaks, self.engine = name, ms, shade, breaks, self
        self.fallback_reason, self.released, self.batches = fallback_reason, 0, []

    def generate(self, prompts, seeds, steps):
        self.batches.append(len(prompts))
        if self.breaks is not None:
            raise self.breaks
        return np.full((len(prompts), 4, 4, 3), self.shade + seeds[0], dtype=np.uint8)

    def release(self):
        self.released += 1


@pytest.fixture
def trials(monkeypatch):
    """EngineTrials over fake samplers; every second measurement the machine is twice as slow."""

    def build(**samplers):
        by_name = {name.replace("_", "-"): sampler for name, sampler in samplers.items()}
        slow = iter([1, 2, 1, 2, 1, 2])

        def measure(runs, rounds, device, warm_up):
            factor = next(slow)
            for run in runs.values():
                run()
            return {name: Timing((by_name[name].ms * factor,) * rounds) for name in runs}

        monkeypatch.setattr("stagevar.timing.measure", measure)
        model = type("Model", (), {"device": torch.device("cpu")})
        made = EngineTrials(model, ["a", "b"], [1, 2], (), by_name.__getitem__)
        return by_name, made

    return build


def test_trials_compare_images_with_eager_and_time_in_turn_with_it(trials):
    samplers, measured = trials(
        eager=FakeSampler("eager", 100),
        compiled=FakeSampler("compiled", 50, shade=151),
        graph=FakeSampler("graph", 60, shade=101),
        graph_compiled=FakeSampler("graph-compiled", 10, fallback_reason="no room"),
        graph_kernels=FakeSampler("graph-kernels", 70),
    )
    choice = choose_engine("auto", "cuda", measured)
    eager, compiled, graph, both, kernels = choice.tried
    found = (eager.latency_ms, compiled.latency_ms, graph.latency_ms, kernels.latency_ms)
    assert found == (100, 50, 60, 70), "drift is divided out"
    assert compiled.difference == pytest.approx(51 / 255) and "differ" in compiled.refused
    assert graph.difference == pytest.approx(1 / 255) and graph.refused is None
    assert both.refused == "falls back to eager (no room)" and both.latency_ms is None
    assert choice.name == "graph" and samplers["eager"].released == 0
    measured.close()
    assert all(sampler.released for sampler in samplers.values())
    assert {size for sampler in samplers.values() for size in sampler.batches} == {1}


def test_what_an_engine_raises_is_its_reason_but_a_broken_device_ends_it(trials):
    _, measured = trials(
        eager=FakeSampler("eager", 100),
        compiled=FakeSampler("compiled", 1, breaks=torch.OutOfMemoryError("CUDA out of memory.\nTried")),
        graph=FakeSampler("graph", 60, breaks=UsageError("engine graph needs a CUDA device")),
        graph_compiled=FakeSampler("graph-compiled", 60, breaks=InfrastructureError("the device is broken")),
    )
    assert measured("compiled").refused == "OutOfMemoryError: CUDA out of memory."
    assert measured("graph").refused == "UsageError: engine graph needs a CUDA device"
    with pytest.raises(InfrastructureError):
        measured("graph-compiled")


def test_errors_of_eager_itself_pass(trials):
    _, measured = trials(eager=FakeSampler("eager", 100, breaks=RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        choose_engine("auto", "cuda", measured)


# ------------------------------------------------------------------------------------------------ in a study


CHOICE = EngineSection(
    "graph", "auto", "60.0 ms per image", (EngineTried("eager", 100.0, 0.0), EngineTried("graph", 60.0, 0.0))
)


def test_the_choice_is_in_study_report_and_profile(tmp_path):
    from stagevar.profile import Profile
    from tests.fakes.sample_study import make
    from tuner.report.export import export
    from tuner.report.page import write_report
    from tuner.results.result import StudyResult

    result = dataclasses.replace(make("full", tmp_path), engine="graph", engine_choice=CHOICE)
    result.save(tmp_path)
    assert StudyResult.load(tmp_path).engine_choice == CHOICE
    export(result, tmp_path)
    profile = Profile.load(tmp_path / "profile.yaml")
    assert profile.engine == CHOICE and profile.envelope.engine == "graph"
    page = write_report(result, tmp_path).read_text()
    assert "60.0 ms per image" in page and "eager 100.0 ms" in page


def test_a_resumed_run_keeps_its_engine(tmp_path):
    from tests.fakes.studies import study
    from tuner.cli.tune import kept_engine

    assert kept_engine(tmp_path, "auto") == "auto"
    first = study(tmp_path)
    first.facts = dataclasses.replace(first.facts, engine="graph", engine_choice=CHOICE)
    first.check_identity()
    assert kept_engine(tmp_path, "auto") == CHOICE and kept_engine(tmp_path, "eager") == "eager"
    for damaged in ({"name": 3}, [], None, {"name": "graph"}):
        data = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**data, "engine_choice": damaged}))
        assert kept_engine(tmp_path, "auto") == "auto"


def test_an_evaluator_takes_the_choice_that_was_made_and_chooses_else(monkeypatch):
    from tests.stagevar.profile.test_profile import MODEL
    from tuner.config.prompts import PromptSet
    from tuner.evaluation.model_evaluator import ModelEvaluator

    random = dataclasses.replace(MODEL, random_weights=True)
    prompts = {"search": PromptSet(("a", "b"), (0, 1), 2), "heldout": PromptSet(("c",), (2,), 1)}
    monkeypatch.setattr(engine_choice, "engine_for", lambda *_: never("an engine"))
    kept = ModelEvaluator(random, prompts, {}, engine=dataclasses.replace(CHOICE, name="compiled"))
    assert kept.engine == kept.facts.engine == "compiled" and kept.facts.engine_choice.asked == "auto"
    calls = []
    monkeypatch.setattr(engine_choice, "engine_for", lambda asked, *rest: calls.append((asked, *rest[2:])) or CHOICE)
    chosen = ModelEvaluator(random, prompts, {}, engine="auto")
    assert chosen.engine == "graph" and chosen.facts.engine_choice == CHOICE and calls == [("auto", ("a", "b"), (0, 1))]
