"""Profiles: round trips, refusals, hostile files, the envelope."""

import dataclasses
import datetime
import tempfile
import typing
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stagevar.errors import ProfileError
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.profile.pipeline import Pipeline
from stagevar.profile.sections import CardSection
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.stagevar.schedule.test_schedule import schedules

MODEL = tiny_infinity()
SCHEDULE = StageSchedule(structure_end=3, cfg_delay=0, rank_ratios=(0.5, 0.2))
CARD = {"driver": "580.1", "power_limit_w": 700.0, "mig": False, "sm_mhz": 1980, "temperature_c": 61}


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
    refused(tmp_path, b"\xff\xfe\x00binary", "not UTF-16|zero byte|is not UTF")
    refused(tmp_path, "x" * 1_100_000, "larger than")
    refused(tmp_path, "a: 9999-99-99\n", "not plain YAML|no schema key")
    for text in ("!!int ''", "!!bool maybe", "!!timestamp soon", "!!float x", "!!binary é", "{{a: b}: c}", "!!map x"):
        refused(tmp_path, f"a: {text}\n", "not plain YAML")


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
        ({"verifed": True}, "unknown key 'verifed' in profile, did you mean verified"),
        ({"verified": "yes please"}, "verified 'yes please' must be true or false"),
        ({"steps": 3}, "steps 3 must be a list"),
        ({"model": {"name": "tiny", "weights": [1]}}, r"model\.weights \[1\] must be a mapping"),
        ({"model": {"name": "tiny", "load": {"weights": "/etc"}}}, "unknown key 'weights' in model.load"),
        ({"latency": {"ratio": {"mean": "fast"}}}, r"latency\.ratio\.mean 'fast' must be a number"),
        ({"latency": {"ms": float("inf")}}, r"latency\.ms must be a finite number"),
        (
            {"envelope": {**make().to_dict()["envelope"], "engine": "grap"}},
            r"engine 'grap' must be .*did you mean graph",
        ),
        ({"envelope": {**make().to_dict()["envelope"], "threads": 0}}, r"envelope\.threads 0 must be at least 1"),
        ({"constraints": {"verdicts": [{"name": "drop", "status": "Met"}]}}, r"verdicts\[0\]\.status 'Met'"),
        ({"verdict": 3}, "verdict 3 must be text"),
        ({"reproduce": ["a"]}, "reproduce .* must be text"),
        ({"model": {}}, "name is missing from the model"),
        ({"model": "nano"}, "model 'nano' must be a mapping"),
        ({"schedule": {"structure_end": 3, "rank_ratios": [0]}}, "rank ratio 0"),
        ({"schedule": {"structure_end": 3, "rank": 1}}, "unknown schedule parameter 'rank'"),
        ({"envelope": {"device": "cpu"}}, "missing from the envelope"),
        ({"envelope": {**make().to_dict()["envelope"], "card": {**CARD, "power_limit_w": "high"}}}, "must be a number"),
        ({"envelope": {**make().to_dict()["envelope"], "card": {**CARD, "drive": "5"}}}, "did you mean driver"),
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


def full_profile():
    """The data of a profile with every section filled, as a study exports it."""
    from tests.fakes.sample_study import make as sample_study
    from tuner.report.export import profile_of

    with tempfile.TemporaryDirectory() as folder:
        result = sample_study("full", Path(folder))
    data = profile_of(result, result.pick).to_dict()
    tried = [{"engine": "eager", "latency_ms": 9.5}, {"engine": "graph", "refused": "needs a CUDA device"}]
    data["engine"] = {"name": "eager", "asked": "auto", "reason": "a CPU", "tried": tried}
    data["schedule"] = SCHEDULE.to_dict()
    data["steps"], data["model"] = (
        make().to_dict()["steps"],
        {"name": "tiny", "random_weights": False, "load": {"resolution": "1M", "ratio": 1.0}},
    )
    return data


def places(data, path=()):
    """The path of every value in nested mappings and lists."""
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def replaced(data, path, value):
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


FULL = full_profile()
PLACES = list(places(FULL))
#: What YAML can hold besides JSON: dates, bytes, sets, keys of any kind, numbers of any length, nan and inf.
ODD = st.sampled_from([
    datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), b"bytes", {"a"}, {1: 2}, {None: "a"}, {(1, 2): 3}, 10**5000,
    -(2**70), float("nan"), float("inf"), "", "\n\n", [], {}, [[]], [None], {"": None}, "x" * 5000, True, -1, 0, 1e308,
])  # fmt: skip


def test_the_full_profile_is_as_it_was_written():
    assert Profile.from_dict(FULL).to_dict() == FULL and len(PLACES) > 100


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PLACES), json_like | ODD)
def test_fuzzed_at_every_depth_is_one_line(path, value):
    try:
        profile = Profile.from_dict(replaced(FULL, path, value))
        profile.to_dict()
        profile.expand(MODEL)
    except ProfileError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


def test_a_key_that_is_no_name_stays_one_short_line():
    for key in ("\n", "", "x" * 5000, "a\tb"):
        for value in (2**63, {key: {key: object()}}):
            with pytest.raises(ProfileError) as caught:
                Profile.from_dict({**FULL, "schedule": {key: value}})
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([p for p in PLACES if isinstance(p and p[-1], str)]), st.text(max_size=8) | ODD)
def test_fuzzed_keys_at_every_depth_are_one_line(path, key):
    parent = FULL
    for name in path[:-1]:
        parent = parent[name]
    if not isinstance(parent, dict) or not isinstance(key, typing.Hashable) or key in parent:
        return
    changed = {(key if name == path[-1] else name): value for name, value in parent.items()}
    try:
        Profile.from_dict(replaced(FULL, path[:-1], changed)).to_dict()
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


def test_the_card_is_part_of_the_envelope(tmp_path):
    measured = dataclasses.replace(make().envelope, card=CardSection(**CARD))
    make(envelope=measured).save(tmp_path / "profile.yaml")
    assert Profile.load(tmp_path / "profile.yaml").envelope == measured
    assert "card" not in make().to_dict()["envelope"], "profiles from a CPU have none"
    # Clocks and heat come and go; what is set on the card stays, and where nothing is known nothing is claimed.
    cooler = dataclasses.replace(measured.card, sm_mhz=345, temperature_c=30)
    assert measured.differences(dataclasses.replace(measured, card=cooler)) == []
    assert measured.differences(dataclasses.replace(measured, card=None)) == []
    capped = dataclasses.replace(measured, card=dataclasses.replace(cooler, power_limit_w=450.0, driver="590.2"))
    assert measured.differences(capped) == ["driver '590.2' instead of '580.1'", "power_limit_w 450.0 instead of 700.0"]


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
