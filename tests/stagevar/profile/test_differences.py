"""What is loaded differs from what a profile was verified under: said once per difference, or refused."""

import warnings

import pytest

from stagevar.models.registry import load_model
from stagevar.models.request import ModelRequest
from stagevar.profile import Profile
from stagevar.serving.drawing import Loading, load_artist
from tests.fakes.serving import save_profile


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
