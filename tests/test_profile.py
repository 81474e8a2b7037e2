"""Profiles: round trips, refusals, hostile files, the envelope."""

import dataclasses
import warnings

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stagevar.errors import ProfileError
from stagevar.profile import Pipeline, Profile, present_envelope, read_yaml, steps_to_data
from stagevar.sampler import Sampler
from stagevar.schedule import StageSchedule
from tests.test_schedule import schedules
from tests.tiny import GRIDS, tiny_infinity

MODEL = tiny_infinity()
SCHEDULE = StageSchedule(structure_end=3, cfg_delay=0, rank_ratios=(0.5, 0.2))


def make(**changes):
    envelope = present_envelope(MODEL, batch=1, threads=1)
    profile = Profile(
        model={"name": "tiny", "weights": {}},
        schedule=SCHEDULE,
        steps=steps_to_data(SCHEDULE.expand(MODEL.grids, 2)),
        sampling={"guidance": [3.0] * 5},
        envelope=envelope,
        verified=True,
        verdict="verified: 1.5x faster",
        latency={"median_ms": 12.5, "samples_ms": [12.0, 12.5, 13.0]},
    )
    return dataclasses.replace(profile, **changes)


def test_saved_and_loaded_is_the_same(tmp_path):
    path = tmp_path / "profile.yaml"
    make().save(path)
    assert Profile.load(path) == make()
    assert Profile.load(path).expand(MODEL) == SCHEDULE.expand(GRIDS, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["profile.yaml"], "no temporary file is left"


@settings(max_examples=60)
@given(schedules)
def test_round_trip_of_any_schedule(schedule):
    data = yaml.safe_load(yaml.safe_dump(make(steps=[], schedule=schedule).to_dict()))
    assert Profile.from_dict(data).schedule == schedule


def refused(tmp_path, text, match):
    path = tmp_path / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProfileError, match=match) as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hostile_files(tmp_path):
    canary = tmp_path / "canary"
    refused(tmp_path, f"!!python/object/apply:os.system ['touch {canary}']", "not plain YAML")
    refused(tmp_path, f"schema: !!python/object/new:os.system ['touch {canary}']", "not plain YAML")
    assert not canary.exists()
    refused(tmp_path, "a: &a [x]\nb: *a\n", "aliases are not allowed")
    refused(tmp_path, "[" * 5000, "not plain YAML")
    refused(tmp_path, b"\xff\xfe\x00binary", "not a text file")
    refused(tmp_path, "x" * 1_100_000, "larger than")
    refused(tmp_path, "a: 9999-99-99\n", "not plain YAML|no schema key")


def test_foreign_files(tmp_path):
    refused(tmp_path, "", "no schema key")
    refused(tmp_path, "just text", "no schema key")
    refused(tmp_path, "schema: other/1\n", "schema 'other/1' is not supported")
    refused(tmp_path, "schema: stagevar-profile/1\n", "is missing from the profile")
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        Profile.load(tmp_path / "absent.yaml")
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        Profile.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"verifed": True}, "unknown key 'verifed' in profile .nearest: verified"),
        ({"verified": "yes please"}, "must be true or false"),
        ({"steps": 3}, "steps must be a list"),
        ({"model": {}}, "model.name is missing"),
        ({"model": "nano"}, "model must be a mapping"),
        ({"schedule": {"structure_end": 3, "rank_ratios": [0]}}, "rank ratio 0"),
        ({"schedule": {"structure_end": 3, "rank": 1}}, "unknown schedule parameter 'rank'"),
        ({"envelope": {"device": "cpu"}}, "missing from the envelope"),
    ],
)
def test_broken_content(tmp_path, change, match):
    refused(tmp_path, yaml.safe_dump({**make().to_dict(), **change}), match)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.sampled_from(sorted(make().to_dict())), json_like)
def test_fuzzed_profiles_never_crash(key, value):
    try:
        profile = Profile.from_dict({**make().to_dict(), key: value})
        profile.expand(MODEL)
    except ProfileError as error:
        assert "\n" not in str(error)


@settings(max_examples=100)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_fuzzed_bytes_never_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "p.yaml"
    path.write_bytes(data)
    with pytest.raises(ProfileError):
        Profile.load(path)


def test_another_model_or_edited_steps_are_refused():
    with pytest.raises(ProfileError, match="for model 'other', not 'tiny'"):
        make(model={"name": "other"}).expand(MODEL)
    with pytest.raises(ProfileError, match=r"other weights: a\.safetensors"):
        make(model={"name": "tiny", "weights": {"a.safetensors": "00"}}).expand(MODEL)
    edited = make(schedule=dataclasses.replace(SCHEDULE, rank_ratios=(0.6, 0.2)))
    with pytest.raises(ProfileError, match="edited by hand"):
        edited.expand(MODEL)
    with pytest.raises(ProfileError, match="structure_end 6 is beyond"):
        dataclasses.replace(make(), schedule=StageSchedule(6)).expand(MODEL)


def test_outside_the_envelope_warns_and_inside_does_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = Pipeline(make(), Sampler(MODEL))
    assert pipeline.generate(["a ring"], [1])[0].size == (24, 24)
    elsewhere = dataclasses.replace(make().envelope, device="NVIDIA H200", torch="2.0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Pipeline(make(envelope=elsewhere), Sampler(MODEL))
    lines = [str(w.message) for w in caught]
    assert lines[0] == "outside the measured envelope: device 'cpu' instead of 'NVIDIA H200'"
    assert len(lines) == 2 and "torch" in lines[1]


def test_yaml_reader_names_the_file(tmp_path):
    (tmp_path / "space.yaml").write_text("a: [1\n")
    with pytest.raises(ProfileError, match=r"search space .*space\.yaml is not plain YAML"):
        read_yaml(tmp_path / "space.yaml", "search space")
