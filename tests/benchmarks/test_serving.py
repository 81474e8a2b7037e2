"""benchmarks.serving counts what it should: a wrong image, a refused request, what a request takes beside drawing."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import serving
from stagevar.serving.app import Keys
from stagevar.serving.desk import Desk
from tests.fakes.serving import FakeArtist, in_thread

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")


class Expecting:
    """A pipeline that draws what FakeArtist does, but for one seed."""

    def __init__(self, wrong=None):
        self.wrong = wrong

    def generate(self, prompts, seeds):
        color = seeds[0] % 256 if seeds[0] != self.wrong else (seeds[0] + 9) % 256
        return [Image.fromarray(np.full((64, 64, 3), color, np.uint8))]


@pytest.fixture(scope="module")
def url():
    with in_thread(Desk(FakeArtist, 64)) as (host, port):
        yield f"http://{host}:{port}"


def test_a_soak_counts_equal_and_wrong_images_and_reads_memory(url):
    figures = serving.soak(url, Expecting(), ["a", "b"], requests=30, clients=3)
    assert figures["statuses"] == {"200": 30} and figures["equal_bit_for_bit"] == 30
    assert figures["wrong_images"] == figures["largest_difference_of_255"] == 0
    assert len(figures["resident_mib"]) == 10 and min(figures["resident_mib"]) > 1
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] and json.dumps(figures)
    figures = serving.soak(url, Expecting(wrong=7), ["a", "b"], requests=30, clients=3)
    assert figures["wrong_images"] == 1 and figures["largest_difference_of_255"] == 9


def test_the_overhead_leaves_out_what_drawing_took(url):
    figures = serving.overhead(url, Expecting(), ["a"], rounds=4)
    assert (
        figures["rounds"] == 4
        and figures["difference_low_ms"] <= figures["difference_ms"] <= figures["difference_high_ms"]
    )
    assert figures["outside_ms"] < figures["served_ms"], "FakeArtist says that text, scales and decoding took 10 ms"


def test_a_refused_request_is_a_status():
    with in_thread(Desk(FakeArtist, 64), keys=Keys.of(["a key"])) as (host, port):
        assert serving.ask(f"http://{host}:{port}", "a", 1)[0] == 401


def test_the_profile_that_is_made_can_be_loaded(tmp_path):
    from stagevar.profile import Profile

    profile = Profile.load(serving.made_profile(tmp_path, batch=3))
    assert profile.envelope.batch == 3 and not profile.verified
