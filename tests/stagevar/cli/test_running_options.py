"""Engine, threads, batch and resolution of `generate`, `bench` and `verify`: the profile's unless told otherwise."""

import dataclasses
import json

import pytest

from stagevar.choices import check_engine, check_threads, processors
from stagevar.cli import command as cli
from stagevar.engine import GraphEngine
from stagevar.errors import ProfileError, UsageError
from stagevar.models import registry
from stagevar.profile import Profile
from stagevar.sampling import bench as compare
from tests.stagevar.engine.tape import TapeRecorder
from tests.stagevar.profile.test_profile import MODEL, make
from tuner import cli as tuner_cli
from tuner.study import verify_profile as recheck_module


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves profiles of the tiny model, which stands in for every model; says what was loaded with."""
    loaded = []
    monkeypatch.setattr(registry, "load_model", lambda request: loaded.append(request) or MODEL)

    def save(name, engine="eager", batch=1, threads=1, **model):
        envelope = dataclasses.replace(make().envelope, engine=engine, batch=batch, threads=threads)
        model = {"name": "tiny", **model}
        path = tmp_path / name
        make(envelope=envelope, model=model, reproduce="stagevar-tune --model nano --budget 60%").save(path)
        return str(path)

    monkeypatch.setattr(registry, "SPECS", {**registry.SPECS, "tiny": registry.SPECS["infinity-tiny"]})
    return save, loaded


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs `bench` and returns what `compare` was asked for."""
    asked = {}
    monkeypatch.setattr(compare, "compare", lambda model, names, **options: asked.update(options) or [])

    def run(*argv):
        code = cli.main(["bench", "--json", "--compare", "exact", *argv])
        return code, dict(asked), capsys.readouterr().err

    return run


def test_bench_takes_what_the_profile_was_measured_with(saved, bench):
    save, loaded = saved
    path = save("p.yaml", "compiled", batch=2, threads=1, load={"resolution": "0.25M"})
    _, asked, _ = bench("--profile", path)
    assert (asked["engine"], asked["batch"], asked["threads"]) == ("compiled", 2, 1)
    assert asked["engines"] == {f"profile {path}": "compiled"} and loaded[0].resolution == "0.25M"


def test_bench_takes_what_it_is_told_instead(saved, bench):
    save, loaded = saved
    path = save("p.yaml", "compiled", batch=2, load={"resolution": "0.25M"})
    _, asked, _ = bench("--profile", path, "--engine", "eager", "--batch", "3", "--resolution", "1M")
    assert (asked["engine"], asked["engines"], asked["batch"]) == ("eager", {}, 3) and loaded[0].resolution == "1M"


def test_each_profile_is_timed_on_its_own_engine_and_differing_batches_are_refused(saved, bench):
    save, _ = saved
    first, second = save("a.yaml", "compiled"), save("b.yaml", "eager")
    _, asked, _ = bench("--profile", first, "--profile", second)
    assert asked["engine"] == "compiled" and list(asked["engines"].values()) == ["compiled", "eager"]
    code, _, err = bench("--profile", first, "--profile", save("c.yaml", batch=2))
    assert code == 2 and "the profiles differ in batch (1, 2); give --batch" in err


def test_what_this_machine_lacks_is_said_before_anything_is_loaded(saved, bench, capsys):
    save, loaded = saved
    path, many = save("p.yaml"), str(len(processors()) + 1)
    for options, match in (
        (["--threads", many], f"threads {many} must be between 1 and"),
        (["--engine", "graph", "--device", "cpu"], "engine graph needs a CUDA device, not cpu"),
        (["--batch", "40"], "batch 40 is larger than the 32 prompts; raise --prompts"),
    ):
        code, _, err = bench("--profile", path, *options)
        assert code == 2 and match in err and not loaded, options
        if "--batch" not in options:
            assert cli.main(["generate", "--profile", path, "x", *options]) == 2
            assert match in capsys.readouterr().err and not loaded
            assert tuner_cli.main(["verify", path, "--quiet", *options]) == 2
            assert match in capsys.readouterr().err and not loaded


def test_a_row_names_the_engine_that_really_ran():
    rows = compare.compare(MODEL, [], rounds=1, prompts=["a", "b"], warm_up_at_most=1)
    assert [row["engine"] for row in rows] == ["eager"] and "engine" in compare.format_table(rows)
    engine = GraphEngine(TapeRecorder())
    assert engine.that_ran == "graph"
    engine.fallback_reason = "no memory"
    assert engine.that_ran == "eager"


def test_verify_measures_with_the_profiles_settings_or_those_given(saved, monkeypatch, capsys):
    save, loaded = saved
    asked = []

    class Stop(Exception):
        pass

    def evaluator(model, prompts, quality, floors, **options):
        asked.append(options)
        raise Stop

    monkeypatch.setattr("tuner.evaluation.model_evaluator.ModelEvaluator", evaluator)
    path = save("p.yaml", "compiled", threads=1, load={"resolution": "0.25M"})
    for options in ([], ["--engine", "eager", "--resolution", "1M"]):
        with pytest.raises(Stop):
            tuner_cli.main(["verify", path, "--quiet", *options])
    assert [one["engine"] for one in asked] == ["compiled", "eager"] and asked[0]["threads"] == 1
    assert [one.resolution for one in loaded] == ["0.25M", "1M"]
    chosen = []

    def recheck(profile, request, terms, *, threads, **rest):
        chosen.append(threads)
        raise Stop

    monkeypatch.setattr(recheck_module, "recheck", recheck)
    for options in ([], ["--threads", "2"]):
        with pytest.raises(Stop):
            tuner_cli.main(["verify", save("q.yaml", threads=4), "--quiet", *options])
    assert chosen == [4, 2]


@pytest.mark.parametrize(
    ("stated", "command", "options", "expected"),
    [
        ({"geneval_nano": 0.3, "clip_score": 7.0, "gone": 1.0}, "", [], {"geneval_nano": 0.3, "clip_score": 7.0}),
        ({"geneval_nano": 0.3}, "", ["--max-drop", "clip_score=5"], {"geneval_nano": 0.3, "clip_score": 5.0}),
        (0.2, "--max-drop 0.2", [], {"geneval_nano": 0.2}),
        (0.2, "--max-drop 0.2", ["--max-drop", "30%"], {"geneval_nano": 0.3}),
    ],
)
def test_verify_keeps_the_limits_of_the_profile_unless_told_otherwise(
    saved, tmp_path, monkeypatch, stated, command, options, expected
):
    limits = []

    class Stop(Exception):
        pass

    def recheck(profile, request, terms, **rest):
        limits.extend(terms.metrics)
        raise Stop

    monkeypatch.setattr(recheck_module, "recheck", recheck)
    path = tmp_path / "p.yaml"
    reproduce = f"stagevar-tune --model nano --budget 60% {command}"
    make(model={"name": "nano"}, reproduce=reproduce, constraints={"max_drop": stated}).save(path)
    with pytest.raises(Stop):
        tuner_cli.main(["verify", str(path), "--quiet", *options])
    assert {m.metric: m.max_drop for m in limits if m.max_drop is not None} == expected


def test_another_resolution_is_named_as_such():
    with pytest.raises(ProfileError, match="for images of 48x48 pixels, not 24x24; leave out --resolution"):
        make(model={"name": "tiny", "pixels": [48, 48]}).expand(MODEL)
    make(model={"name": "tiny", "pixels": [24, 24]}).expand(MODEL)


def test_generate_takes_the_profiles_engine_and_batch_or_those_given(saved, tmp_path, monkeypatch):
    save, _ = saved
    seen = []
    original = Profile.pipeline_of

    def pipeline(self, request, **options):
        made = original(self, request, **options)
        seen.append((made.sampler.engine.name, made.batch, made.threads))
        return made

    monkeypatch.setattr(Profile, "pipeline_of", pipeline)
    path, out = save("p.yaml", batch=2), str(tmp_path / "x.png")
    assert cli.main(["generate", "--profile", path, "x", "y", "-o", out]) == 0
    assert cli.main(["generate", "--profile", path, "x", "y", "-o", out, "--batch", "1", "--threads", "2"]) == 0
    assert seen == [("eager", 2, 1), ("eager", 1, 2)]
    assert cli.main(["generate", "--model", "tiny", "x", "-o", out, "--negative", "y", "--batch", "4"]) == 0


def test_checks_name_the_value_and_the_fix():
    check_engine("graph", "cuda")
    check_threads(1)
    check_threads(10**6, "cuda")
    with pytest.raises(UsageError, match="unknown engine 'grap'; use auto, eager"):
        check_engine("grap", "cuda")
    with pytest.raises(UsageError, match="threads 0 must be"):
        check_threads(0)
    assert json.dumps(processors())
