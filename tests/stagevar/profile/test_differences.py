"""What is loaded differs from what a profile was verified under: said once per difference, or refused."""

import dataclasses
import shutil
import warnings

import numpy as np
import pytest

from stagevar.errors import ProfileError, UsageError
from stagevar.models.registry import load_model
from stagevar.models.request import ModelRequest
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.profile.pipeline import Pipeline
from stagevar.profile.sections import QualitySection, SamplingSection, TextSection
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import paper
from stagevar.sections import section_data, shown
from stagevar.serving.drawing import Loading, load_artist
from tests.fakes.serving import save_profile
from tests.fakes.weights import infinity_weights


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", device="cpu")


@pytest.fixture
def profile(nano, tmp_path):
    return Profile.load(save_profile(nano, tmp_path / "profile.yaml"))


def said(profile, **options):
    """The warnings of loading a profile's pipeline."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        profile.pipeline(device="cpu", **options)
    return [str(one.message) for one in caught]


def test_another_kv_cache_is_said_by_the_pipeline_and_by_the_server(profile, tmp_path):
    phrase = "kv_cache 'int8' instead of 'model'"
    assert said(profile) == []
    assert said(profile, kv_cache="int8") == [f"outside the measured envelope: {phrase}"]
    with pytest.warns(UserWarning, match=phrase):
        artist = load_artist(Loading(ModelRequest("nano", device="cpu", kv_cache="int8"), profile))
    assert artist.served[0].differences == (phrase,)

    eight_bit = save_profile(load_model("nano", device="cpu", kv_cache="int8"), tmp_path / "int8.yaml")
    assert said(Profile.load(eight_bit)) == []
    assert said(Profile.load(eight_bit), kv_cache="model") == [
        "outside the measured envelope: kv_cache 'model' instead of 'int8'"
    ]


def test_other_sampling_is_said_field_by_field(nano, profile):
    assert said(profile, guidance=7.0) == [], "this profile does not state its sampling"
    sampling = {name: getattr(nano.sampling, name) for name in ("guidance", "temperature", "top_k", "top_p")}
    stated = dataclasses.replace(profile, sampling=SamplingSection(**sampling))
    assert said(stated) == []
    assert said(stated, guidance=7.0) == ["outside the measured envelope: guidance 7 instead of 3"]
    assert said(stated, temperature=[0.5, 0.25]) == [
        "outside the measured envelope: temperature [0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25] "
        "instead of [1.0, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2]"
    ]
    # What a later version's other default looks like.
    other = dataclasses.replace(stated, sampling=dataclasses.replace(stated.sampling, top_k=20, top_p=0.5))
    assert said(other) == [
        "outside the measured envelope: top_k 0 instead of 20", "outside the measured envelope: top_p 0 instead of 0.5",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["guidance", "temperature"])
@pytest.mark.parametrize("value", [[], -1.0, float("nan"), float("inf"), [3.0, -2], "x", ["x"], True, "3"], ids=str)
def test_sampling_that_cannot_be_drawn_with_is_refused_before_loading(profile, name, value):
    with pytest.raises(UsageError) as caught:
        profile.pipeline(device="cpu", **{name: value})
    assert str(caught.value).startswith(f"{name} {shown(value)} must be a finite number of at least 0")


def test_a_temperature_of_zero_is_refused_and_numbers_of_numpy_are_taken():
    with pytest.raises(UsageError, match="temperature 0 must be above 0"):
        load_model("nano", device="cpu", temperature=0)
    model = load_model("nano", device="cpu", guidance=np.array([2, 3]), temperature=np.float32(0.5))
    assert model.sampling.guidance[:3] == (2.0, 3.0, 3.0) and set(model.sampling.temperature) == {0.5}


def test_a_profile_of_more_threads_than_there_are_is_drawn_with_those_and_says_so(nano, profile, monkeypatch):
    monkeypatch.setattr("stagevar.profile.pipeline.processors", lambda: [0])
    for recorded in (16, 100_000):
        wide = dataclasses.replace(profile, envelope=dataclasses.replace(profile.envelope, threads=recorded))
        with pytest.warns(UserWarning, match=f"^outside the measured envelope: threads 1 instead of {recorded}$"):
            pipeline = Pipeline(wide, Sampler(nano))
        assert pipeline.threads == 1
    monkeypatch.setattr("stagevar.profile.pipeline.processors", list)  # a system that does not say
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with pytest.warns(UserWarning, match="threads 3 instead of 100000"):
        assert Pipeline(wide, Sampler(nano)).threads == 3


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_given_are_those_of_this_process_or_refused(nano, profile, threads):
    with pytest.raises(UsageError, match=f"threads {threads} must be between 1 and"):
        Pipeline(profile, Sampler(nano), threads=threads)


def test_a_profile_that_is_not_verified_says_why(profile):
    verdict = "not verified: geneval drops by up to 9 %"
    assert said(dataclasses.replace(profile, verified=False, verdict=verdict)) == [verdict]
    assert said(dataclasses.replace(profile, verified=False, verdict="inconclusive: too few prompts")) == [
        "not verified: inconclusive: too few prompts"
    ]
    assert said(dataclasses.replace(profile, verified=False, verdict="")) == [
        "not verified: the profile has no verdict"
    ]
    unjudged = QualitySection(measured=False, why="no image was judged")
    assert said(dataclasses.replace(profile, verified=False, quality=unjudged)) == ["not verified: no image was judged"]


@pytest.mark.parametrize("status", ["broken", "open"])
def test_a_claim_that_its_own_verdicts_deny_is_refused(profile, status):
    data = profile.to_dict()
    data["constraints"] = {"verdicts": [{"name": "latency", "status": "met"}, {"name": "geneval", "status": status}]}
    with pytest.raises(
        ProfileError, match=f"verified is true, but the verdict of 'geneval' is {status}; it was edited"
    ):
        Profile.from_dict(data)
    Profile.from_dict({**data, "verified": False})


@pytest.fixture(scope="module")
def infinity(tmp_path_factory):
    """A folder of infinity-tiny with a T5, and the model that it loads."""
    folder = infinity_weights(tmp_path_factory.mktemp("weights"))
    return folder, load_model("infinity-tiny", device="cpu", weights=folder)


def test_another_text_encoder_is_refused_like_other_weights(infinity, tmp_path):
    folder, model = infinity
    record = model.provenance["text"]
    schedule = paper(model.grids)
    section = {"name": model.name, "text": section_data(TextSection.of(record))}
    assert section["text"] == {"sha256": record["sha256"]}, "where the folder lies is not recorded"
    steps = steps_to_data(schedule.expand(model.grids, len(model.transformer.chunk_layers)))
    profile = Profile(section, schedule, steps, {}, present_envelope(model, 1, 1), True, "verified: made by a test")
    profile.save(tmp_path / "profile.yaml")
    profile = Profile.load(tmp_path / "profile.yaml")

    shutil.copytree(folder / "text", tmp_path / "moved")
    assert said(profile, weights=folder, text=tmp_path / "moved") == [], "the same files elsewhere"
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ProfileError, match=r"made with another text encoder: config\.json .*; give --text"):
        profile.pipeline(device="cpu", weights=folder, text=tmp_path / "moved")
    without = dataclasses.replace(model, provenance={**model.provenance, "text": None})
    with pytest.raises(ProfileError, match="but none was loaded"):
        profile.expand(without)

    public = dataclasses.replace(profile.model, text=TextSection("google/flan-t5-xl", "7d63"))
    phrase = "text encoder config.json .* instead of google/flan-t5-xl@7d63"
    with pytest.warns(UserWarning, match=phrase):
        Pipeline(dataclasses.replace(profile, model=public), Sampler(model))
    older = dataclasses.replace(profile.model, text=None)
    dataclasses.replace(profile, model=older).expand(without)


def test_a_revision_is_another_encoder():
    assert TextSection("a/b", "1").same_as(TextSection("a/b", "1"))
    assert TextSection("a/b", "1").same_as(TextSection("a/b", "2")) is False
    assert TextSection("a/b").same_as(TextSection(sha256={"a": "00"})) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch": "a"}, "batch 'a' must be a whole number of at least 1, or 0"),
        ({"batch": 2.5}, r"batch 2\.5 must be"),
        ({"batch": -1}, "batch -1 must be"),
        ({"batch": True}, "batch True must be"),
        ({"threads": "2"}, "threads '2' must be a whole number"),
        ({"threads": 1.5}, r"threads 1\.5 must be a whole number"),
        ({"threads": 0}, "threads 0 must be between 1 and"),
        ({"engine": None}, "unknown engine None; use auto, eager"),
        ({"engine": "graph"}, "engine graph needs a CUDA device, not cpu"),
        ({"guidance": "x"}, "guidance 'x' must be a finite number"),
        ({"guidence": 3}, "unknown option 'guidence' of a profile's pipeline, did you mean guidance"),
        ({"name": "nano"}, "unknown option 'name'"),
    ],
    ids=str,
)
def test_a_wrong_option_of_the_pipeline_is_named_before_loading(profile, monkeypatch, options, match):
    monkeypatch.setattr("stagevar.models.registry.load_model", lambda request: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=match) as caught:
        profile.pipeline(device="cpu", **options)
    assert type(caught.value) is UsageError and "\n" not in str(caught.value)


def test_an_array_of_numpy_sets_the_guidance_of_a_pipeline(profile):
    pipeline = profile.pipeline(device="cpu", guidance=np.array([2, 3]), batch=np.int64(2))
    assert pipeline.sampler.model.sampling.guidance[:3] == (2.0, 3.0, 3.0) and pipeline.batch == 2
