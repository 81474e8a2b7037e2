"""Plug-ins of other packages: each kind works by its name wherever a built-in one does, a bad one is one line."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from stagevar import plugins
from stagevar.accelerators.plugged import plugged
from stagevar.analysis import SIMILARITIES, find_similarity
from stagevar.errors import ScheduleError, UsageError
from stagevar.models import registry
from stagevar.models.registry import MODELS
from stagevar.models.request import ModelRequest
from stagevar.plugins import PluginError
from stagevar.profile import Profile, steps_to_data
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import PLUGGED_ACCELERATORS, Pivotal, Plugged, StageSchedule, exact
from stagevar.testing.tiny import tiny_infinity
from tests import ROOT
from tests.fakes.plugin_package import MODULE, OFFERS, install
from tests.fakes.serving import save_profile
from tuner.cli import doctor
from tuner.cli.tune import plugged_versions
from tuner.config.prompts import load_prompts
from tuner.config.quality import composite_specs, quality_limits
from tuner.config.space_file import parse_space
from tuner.evalkit import command as eval_cli
from tuner.evaluation.model_evaluator import load_evaluator
from tuner.metrics.quality_spec import QualitySpec
from tuner.metrics.registry import METRICS, check_name, create_composite, metric_class, metric_names

PROMPTS = {"source": "nano", "search": 4, "heldout": 4, "micro_batch": 4}
GROUPS = (METRICS, PLUGGED_ACCELERATORS, MODELS, SIMILARITIES)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a package of a name; its module is forgotten when the test ends."""

    def add(package="acme", offers=OFFERS, module=MODULE):
        monkeypatch.syspath_prepend(str(install(tmp_path / package, package, offers, module)))
        monkeypatch.delitem(sys.modules, package.replace("-", "_"), raising=False)

    return add


@pytest.fixture
def space_file(tmp_path):
    """A function that writes a space whose quality is brightness."""

    def write(max_drop, **parameters):
        quality = {"metrics": [{"name": "brightness", "max_drop": max_drop}]}
        data = {"model": "nano", "objectives": {"latency": "ms", "quality": quality}, "prompts": PROMPTS}
        data["parameters"] = {"structure_end": [5, 6], **parameters}
        path = tmp_path / "space.yaml"
        path.write_text(json.dumps(data))
        return path

    return write


def test_every_group_is_one_that_a_registry_reads():
    assert set(plugins.GROUPS) == set(GROUPS)


# ------------------------------------------------------------------------------------------------ each kind by its name


def test_a_metric_is_listed_scored_limited_and_refused_by_its_declaration(installed, space_file, capsys):
    with pytest.raises(UsageError, match="unknown metric 'brightness'"):
        check_name("brightness")
    installed()
    assert metric_names()[-1] == "brightness" and "acme" not in sys.modules
    quality = create_composite({"brightness": QualitySpec(options={"gain": 0.5})})
    white = np.full((2, 16, 16, 3), 255, np.uint8)
    assert quality.score(white, ["a", "b"], white).tolist() == [0.5, 0.5]
    assert eval_cli.main(["images", "--metric", "list"]) == 0
    words = " ".join(capsys.readouterr().out.splitlines()[-1].split())
    assert words == "brightness share of white higher - acme not known"
    with pytest.raises(UsageError, match="of brightness allows brightness to fall by more than it can"):
        parse_space(json.loads(space_file(1.5).read_text()))


def test_an_evaluator_scores_by_a_plugged_metric_and_a_plugged_accelerator(installed, space_file):
    installed()
    space = parse_space(json.loads(space_file(0.3, accelerator=["halving"]).read_text()))
    assert plugged_versions(space) == {"acme": "1.0"}
    limits = quality_limits(space.quality)
    assert [(limit.metric, limit.unit, limit.max_drop) for limit in limits] == [("brightness", "share of white", 0.3)]
    prompts = load_prompts(space.prompts, 0)
    evaluator = load_evaluator(
        ModelRequest("nano", device="cpu"), prompts, composite_specs(space.quality, limits), {}, engine="eager"
    )
    grids = registry.load_model("nano", device="cpu").grids
    halved = StageSchedule(6, accelerator="halving", rank_ratios=(0.4,)).expand(grids, 4)
    full, other = evaluator.quality((exact(len(grids)).expand(grids, 4), halved), "search", 0)
    assert full["brightness"].shape == (4,) and not np.array_equal(full["brightness"], other["brightness"])


def test_a_profile_needs_its_plug_in(installed, tmp_path, monkeypatch):
    nano = registry.load_model("nano", device="cpu")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(install(tmp_path / "acme", "acme")))
        schedule = StageSchedule(6, accelerator="halving", rank_ratios=(0.4,))
        save_profile(nano, tmp_path / "profile.yaml", schedule=schedule, verified=False)
        pipeline = Profile.load(tmp_path / "profile.yaml").pipeline()
        assert pipeline.generate(["a photo of a red circle"])[0].size == nano.pixels
    with pytest.raises(UsageError, match="accelerator 'halving' is not one of exact, stagevar, fastvar"):
        Profile.load(tmp_path / "profile.yaml")


def test_an_accelerator_acts_where_its_schedule_says(installed):
    installed()
    model = tiny_infinity()
    plain, halved = (
        StageSchedule(3, accelerator=name, rank_ratios=(0.5,), layers=(1, 3)).expand(model.grids, 2)
        for name in ("fastvar", "halving")
    )
    assert [type(step.reduction) for step in halved[3:]] == [Plugged, Plugged]
    assert halved[3].reduction.kept == plain[3].reduction.kept and isinstance(plain[3].reduction, Pivotal)
    assert steps_to_data(halved)[3]["reduction"] == {
        "kind": "plugged", "kept": 8, "layers": [1, 3], "cache_scale": 2, "accelerator": "halving",
    }  # fmt: skip
    sampler = Sampler(model)
    drawn = [sampler.generate(["a"], [1], steps) for steps in (plain, halved)]
    assert not np.array_equal(*drawn)
    # Keeping every token, both are the full schedule: the plug-in's own path is exact.
    full = Sampler(model).generate(["a"], [1], exact(5).expand(model.grids, 2))
    whole = [
        step if step.scale < 3 else _keeping_all(step, halved[step.scale].reduction)
        for step in StageSchedule(3, accelerator="halving", rank_ratios=(0.99,), layers=(1, 3)).expand(model.grids, 2)
    ]
    assert np.array_equal(sampler.generate(["a"], [1], tuple(whole)), full)


def _keeping_all(step, reduction):
    import dataclasses

    return dataclasses.replace(step, reduction=dataclasses.replace(reduction, kept=step.tokens))


def test_a_model_is_found_listed_and_loaded(installed):
    installed()
    assert registry.model_names()[-1] == "nano-hot" and "acme" not in sys.modules
    model = registry.load_model("nano-hot", device="cpu")
    assert model.name == "nano-hot" and set(model.sampling.temperature) == {1.2}
    assert registry.list_models()[-1].name == "nano-hot"
    with pytest.raises(UsageError, match="did you mean nano-hot"):
        registry.find("nano-hott")


def test_a_similarity_takes_its_options(installed):
    installed()
    similarity = find_similarity("closeness:power=2")
    black, white = (np.full((1, 8, 8, 3), value, np.uint8) for value in (0, 255))
    assert similarity.score(black, black).tolist() == [1.0] and similarity.score(black, white).tolist() == [0.0]


# ------------------------------------------------------------------------------------------------ what can be wrong


BROKEN = "raise RuntimeError('no licence found\\nsecond line')"


def test_a_broken_plug_in_is_one_line_for_who_asks_and_nothing_for_others(installed, caplog):
    installed("acme")
    installed("broken", {group: {"bad": "Anything"} for group in GROUPS}, BROKEN)
    line = "of broken 1.0 cannot be loaded: RuntimeError: no licence found; fix or uninstall the package"
    for ask in (metric_class, plugged, registry.find, find_similarity):
        with pytest.raises(PluginError, match=line) as caught:
            ask("bad")
        assert "\n" not in str(caught.value)
    assert metric_class("brightness").name == "brightness" and plugged("halving").name == "halving"
    with caplog.at_level(logging.WARNING, "stagevar"):
        assert registry.list_models()[-1].name == "nano-hot"
    assert "the model bad " + line in caplog.text


@pytest.mark.parametrize(
    ("group", "name", "target", "said"),
    [
        (METRICS, "plain", "HOT", "must be a class that inherits tuner.metrics.base.Metric"),
        (METRICS, "brightness", "NamedOtherwise", "is named 'lightness'; both names must be the same"),
        (METRICS, "undeclared", "Undeclared", "needs a `declaration`"),
        (METRICS, "turned", "Turned", "gives one direction in `higher_is_better` and the opposite"),
        (METRICS, "absent", "Nothing", "cannot be loaded: AttributeError"),
        (PLUGGED_ACCELERATORS, "halving", "Brightness", "must be a class that inherits stagevar.accelerators.base"),
        (PLUGGED_ACCELERATORS, "half", "FirstTokens", "is named 'halving'; both names"),
        (PLUGGED_ACCELERATORS, "demanding", "NeedsArguments", "must be made without arguments"),
        (MODELS, "nano-hot", "Brightness", "must be a ModelSpec"),
        (MODELS, "hot", "HOT", "is named nano-hot; both names"),
        (SIMILARITIES, "odd", "np.full", "cannot be called with these options: full"),
        (SIMILARITIES, "named", "Brightness", "must be a function that returns a stagevar.analysis.Similarity"),
    ],
)
def test_what_its_group_does_not_want_is_refused_by_name(installed, group, name, target, said):
    installed("acme", {group: {name: target}})
    ask = {METRICS: metric_class, PLUGGED_ACCELERATORS: plugged, MODELS: registry.find, SIMILARITIES: find_similarity}
    with pytest.raises(PluginError, match=said):
        ask[group](name)


def test_names_that_are_taken_are_refused_and_the_built_in_ones_stay(installed):
    taken = {METRICS: "geneval_nano", PLUGGED_ACCELERATORS: "fastvar", MODELS: "nano", SIMILARITIES: "clip"}
    targets = {METRICS: "Brightness", PLUGGED_ACCELERATORS: "FirstTokens", MODELS: "HOT", SIMILARITIES: "closeness"}
    installed("acme", {group: {name: targets[group]} for group, name in taken.items()})
    assert metric_class("geneval_nano").__module__ == "tuner.metrics.geneval_nano"
    assert registry.find("nano").temperature != 1.2
    assert plugins.find(SIMILARITIES, "clip").package == "stagevar-tune"
    warned = [finding.text for finding in doctor.check_plugins() if finding.state == "warn"]
    assert len(warned) == 4
    assert (
        "plug-in: the metric geneval_nano of acme 1.0 is ignored: geneval_nano is built in; it needs another name"
        in warned
    )


def test_a_name_that_two_packages_offer_is_refused_for_both(installed):
    installed("acme")
    installed("zenith", {METRICS: {"brightness": "Brightness"}})
    with pytest.raises(PluginError, match=r"metric brightness is offered by acme 1.0 and zenith 1.0; uninstall one"):
        check_name("brightness")
    assert "brightness" not in metric_names() and registry.find("nano-hot")


def test_an_accelerator_that_is_not_installed_names_the_others(space_file):
    with pytest.raises(ScheduleError, match="accelerator 'halving' is not one of exact, stagevar, fastvar"):
        StageSchedule(3, accelerator="halving")
    with pytest.raises(PluginError, match="no installed package offers the accelerator halving"):
        plugged("halving")
    with pytest.raises(UsageError, match="accelerator 'halving' must be exact, stagevar, fastvar"):
        parse_space(json.loads(space_file(0.1, accelerator=["halving"]).read_text()))


def test_the_doctor_lists_what_is_offered(installed):
    installed("acme")
    installed("broken", {METRICS: {"bad": "Anything"}}, BROKEN)
    findings = doctor.check_plugins()
    assert [f.text for f in findings if f.state == "ok"] == [
        "plug-in: model nano-hot of acme 1.0",
        "plug-in: accelerator halving of acme 1.0",
        "plug-in: metric brightness of acme 1.0",
        "plug-in: similarity closeness of acme 1.0",
    ]
    assert [f.text for f in findings if f.state == "warn"] == [
        "plug-in: the metric bad of broken 1.0 cannot be loaded: RuntimeError: no licence found; "
        "fix or uninstall the package"
    ]


def test_another_process_finds_them_by_its_search_path(tmp_path):
    """As a worker of a cluster does: nothing is registered there by hand."""
    folder = install(tmp_path / "site", "acme")
    code = "from tuner.metrics.registry import create; print(create('brightness', gain=2.0).gain)"
    environ = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=120)
    assert answer.stdout == "2.0\n", answer.stderr[-2000:]


def test_a_worker_of_a_cluster_finds_them(ray_cluster, tmp_path):
    import ray

    folder = install(tmp_path / "site", "acme")

    @ray.remote(num_cpus=0)
    def gain():
        from tuner.metrics.registry import create

        return create("brightness", gain=3.0).gain

    environment = {"env_vars": {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}}
    assert ray.get(gain.options(runtime_env=environment).remote()) == 3.0
