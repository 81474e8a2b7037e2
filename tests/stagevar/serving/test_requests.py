"""What is refused, and how: every bad request gets its status, one line in the log and no traceback; the server lives."""

import json
import logging
import re
import socket
import threading
import time

import pytest

from stagevar.serving.app import LARGEST_BODY, Keys, Limits
from stagevar.serving.asking import FIELDS, Offer, read_request
from stagevar.serving.desk import Desk
from stagevar.serving.refusal import Refusal
from tests.fakes.serving import FakeArtist, ask, get, in_thread, post, refusing, wait_until

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

PATH = "/v1/images/generations"
JSON = {"content-type": "application/json"}
GOOD = {"prompt": "a photo of a red circle"}


def with_(**fields):
    return {**GOOD, **fields}


#: name: (body, status, words of the message). A body of bytes is sent as it is.
BAD_BODIES = {
    "no body": (b"", 400, "not JSON"),
    "half of an object": (b'{"prompt": "a', 400, "not JSON"),
    "an array": (b"[1]", 400, "must be a JSON object, not an array"),
    "text": (b'"a circle"', 400, "must be a JSON object, not text"),
    "null": (b"null", 400, "must be a JSON object, not null"),
    "a number": (b"7", 400, "must be a JSON object, not a number"),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400, "not UTF-8: byte 12 is 0xff"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), 400, "not UTF-8"),
    "a compressed body": (b"\x1f\x8b\x08\x00", 400, "not UTF-8"),
    "NaN": (b'{"prompt": "a", "seed": NaN}', 400, "NaN is not a valid JSON number"),
    "infinity": (b'{"prompt": "a", "guidance_scale": -Infinity}', 400, "-Infinity is not a valid JSON number"),
    "5,000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "too many digits"),
    "nested 30,000 deep": (b"[" * 30_000, 400, "JSON|nested"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', 400, "key 'prompt' appears twice"),
    "no prompt": ({}, 400, "prompt is missing"),
    "prompt null": ({"prompt": None}, 400, "prompt is missing"),
    "prompt empty": ({"prompt": ""}, 400, "prompt is empty"),
    "prompt of spaces": ({"prompt": " \n\t"}, 400, "prompt is empty"),
    "prompt a number": ({"prompt": 3}, 400, "prompt must be text, not a number"),
    "prompt a list": ({"prompt": ["a", "b"]}, 400, "prompt must be text, not an array"),
    "prompt an object": ({"prompt": {"text": "a"}}, 400, "prompt must be text, not an object"),
    "prompt too long": ({"prompt": "x" * 4001}, 400, "4001 characters; at most 4000"),
    "half a character": (b'{"prompt": "\\ud83d"}', 400, "lone surrogate"),
    "a null character": (b'{"prompt": "a\\u0000b"}', 400, "null character"),
    "n = 0": (with_(n=0), 400, "n 0 must be between 1 and 10"),
    "n = -1": (with_(n=-1), 400, "n -1 must be between 1 and 10"),
    "n = 11": (with_(n=11), 400, "n 11 must be between 1 and 10"),
    "n of 60 digits": (with_(n=10**60), 400, "n 1000.* must be between"),
    "n a fraction": (with_(n=1.5), 400, "n 1.5 must be a whole number"),
    "n text": (with_(n="2"), 400, "n '2' must be a whole number"),
    "n true": (with_(n=True), 400, "n True must be a whole number"),
    "size unknown": (with_(size="1024x1024"), 400, "'1024x1024' is not served here; use 64x64, 32x96"),
    "size the other way round": (with_(size="96x32"), 400, "use 64x64, 32x96"),
    "size no size": (with_(size="big"), 400, "'big' is not served here"),
    "size a number": (with_(size=64), 400, 'must be text such as "64x64"'),
    "size other digits": (with_(size="٦٤x٦٤"), 400, "is not served here"),
    "size a path": (with_(size="../../etc/passwd"), 400, "is not served here"),
    "seed below 0": (with_(seed=-1), 400, "seed -1 must be between 0"),
    "seed beyond JSON": (with_(seed=2**53), 400, r"must be between 0 and 2\^53"),
    "seed a fraction": (with_(seed=0.5), 400, "seed 0.5 must be a whole number"),
    "seed text": (with_(seed="one"), 400, "seed 'one' must be a whole number"),
    "guidance 0": (with_(guidance_scale=0), 400, "guidance_scale 0 must be between 1 and 30"),
    "guidance 1e300": (with_(guidance_scale=1e300), 400, "must be between 1 and 30"),
    "guidance text": (with_(guidance_scale="high"), 400, "guidance_scale 'high' must be a number"),
    "guidance true": (with_(guidance_scale=True), 400, "must be a number"),
    "negative prompt a list": (with_(negative_prompt=["blurred"]), 400, "negative_prompt must be text, not an array"),
    "negative prompt too long": (with_(negative_prompt="x" * 4001), 400, "negative_prompt has 4001"),
    "model unknown": (with_(model="gpt-image-1"), 404, "'gpt-image-1' is not served here; this server has fake-1"),
    "model misspelled": (with_(model="fake-l"), 404, "did you mean fake-1"),
    "model a path": (with_(model="../../weights"), 404, "is not served here"),
    "model a number": (with_(model=1), 400, "model 1 must be text"),
    "response_format url": (with_(response_format="url"), 400, "'url' is not supported here; use \"b64_json\""),
    "output_format webp": (with_(output_format="webp"), 400, 'use "png"'),
    "output_compression 50": (with_(output_compression=50), 400, "use 100"),
    "background transparent": (with_(background="transparent"), 400, 'use "auto" or "opaque"'),
    "stream": (with_(stream=True), 400, "stream True is not supported here; use false"),
    "partial images": (with_(partial_images=2), 400, "use 0"),
    "a field misspelled": (with_(sede=1), 400, "unknown field 'sede', did you mean seed"),
    "a field of nobody": (with_(zzzzqqqq=1), 400, "unknown field 'zzzzqqqq'; leave it out"),
    "a huge field name": (with_(**{"x" * 50_000: 1}), 400, "unknown field"),
    "a line feed in a field name": ({**GOOD, "a\nb": 1}, 400, "unknown field"),
    "a body too large": (b" " * (LARGEST_BODY + 1), 413, f"larger than {LARGEST_BODY} bytes"),
    "10 MB": (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413, "larger than"),
    "what the model refuses": ({"prompt": "refused"}, 400, "no such class"),
}
#: name: (method, path, headers, status, words of the message)
BAD_WAYS = {
    "GET instead of POST": ("GET", PATH, {}, 405, "does not take GET"),
    "DELETE a model": ("DELETE", "/v1/models/fake-1", {}, 405, "does not take DELETE"),
    "another endpoint": ("POST", "/v1/images/edits", JSON, 404, "there is no '/v1/images/edits' here"),
    "chat": ("POST", "/v1/chat/completions", JSON, 404, "images are at /v1/images/generations"),
    "a path upward": ("GET", "/../../etc/passwd", {}, 404, "there is no"),
    "a path upward, escaped": ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}, 404, "there is no"),
    "a path upward to a model": ("GET", "/v1/models/..%2f..%2fetc", {}, 404, "there is no|is not served"),
    "a null in the path": ("GET", "/v1/models/a%00b", {}, 404, "is not served"),
    "a path of 8,000 letters": ("GET", "/" + "x" * 8000, {}, 404, "there is no"),
    "an unknown model": ("GET", "/v1/models/dall-e-3", {}, 404, "this server has fake-1, fake-full"),
    "form data": ("POST", PATH, {"content-type": "application/x-www-form-urlencoded"}, 415, "send application/json"),
    "text/plain": ("POST", PATH, {"content-type": "text/plain"}, 415, "'text/plain' is not supported"),
    "no content type": ("POST", PATH, {}, 415, "send application/json"),
}


@pytest.fixture(scope="module")
def server():
    artist = FakeArtist(fails={"refused": refusing("no such class")})
    with in_thread(Desk(lambda: artist, 64), limits=Limits(body_s=1.0)) as address:
        yield address


def refused_once(caplog, status, answer, expected, words):
    assert status == expected, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert len(error["message"]) < 700
    assert re.search(words, error["message"]), error["message"]
    assert error["type"] == "invalid_request_error"
    wait_until(lambda: [r for r in caplog.records if f" {expected} " in r.getMessage()])
    lines = [record for record in caplog.records if record.name.startswith(("stagevar", "uvicorn"))]
    assert len(lines) == 1 and lines[0].exc_info is None, [line.getMessage() for line in lines]
    assert "\n" not in lines[0].getMessage()


def lives(server):
    return post(*server, {**GOOD, "seed": 5})[0] == 200


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(server, caplog, name):
    body, expected, words = BAD_BODIES[name]
    with caplog.at_level(logging.INFO, "stagevar.serving"):
        status, answer = post(*server, body)
        if name == "what the model refuses":
            assert status == 400 and "no such class" in answer["error"]["message"]
            return
        refused_once(caplog, status, answer, expected, words)
    assert lives(server)


@pytest.mark.parametrize(
    "prompt", [["Mona Lisa"], {"text": "Mona Lisa"}, "Mona Lisa\ud83d", "Mona\0Lisa", "Mona Lisa, which a model quotes"]
)
def test_a_refused_prompt_is_not_logged(prompt, caplog):
    artist = FakeArtist(fails={"Mona Lisa, which a model quotes": refusing("no class is called 'Mona Lisa'")})
    with in_thread(Desk(lambda: artist, 64)) as server, caplog.at_level(logging.INFO, "stagevar.serving"):
        for count in (1, 2):
            assert post(*server, {"prompt": prompt, "n": count})[0] == 400
    assert [line for line in caplog.messages if " 400 " in line]
    assert not [line for line in caplog.messages if "Mona" in line]


@pytest.mark.parametrize("name", BAD_WAYS)
def test_bad_ways(server, caplog, name):
    method, path, headers, expected, words = BAD_WAYS[name]
    with caplog.at_level(logging.INFO, "stagevar.serving"):
        status, answer = ask(*server, method, path, json.dumps(GOOD).encode() if method == "POST" else None, headers)
        refused_once(caplog, status, answer, expected, words)
    assert lives(server)


def raw(server, *parts, pause=0.0, until_closed=True):
    """Bytes sent as they are, then everything that comes back."""
    with socket.create_connection(server, timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        received = b""
        while until_closed and (chunk := connection.recv(65536)):
            received += chunk
        return received


HEAD = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()


def test_a_client_that_sends_slowly_is_told_so_and_holds_up_nobody(server, caplog):
    slow = threading.Thread(target=lambda: received.append(raw(server, HEAD + b"content-length: 90\r\n\r\n", b'{"pr')))
    received = []
    with caplog.at_level(logging.INFO, "stagevar.serving"):
        slow.start()
        assert lives(server)
        slow.join(60)
    assert received[0].startswith(b"HTTP/1.1 408") and b"did not arrive within 1 s" in received[0]
    assert b"connection: close" in received[0].lower()
    assert [r.exc_info for r in caplog.records if " 408 " in r.getMessage()] == [None]


@pytest.mark.parametrize(
    "parts",
    [
        [b"not HTTP at all\r\n\r\n"],
        [b"GET /\x01\x02 HTTP/1.1\r\n\r\n"],
        [b"GET /" + b"x" * 100_000],
        [HEAD + b"content-length: many\r\n\r\n"],
        [HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}"],
        [HEAD + b"transfer-encoding: chunked\r\n\r\nZZ\r\n"],
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
    ],
    ids=[
        "no HTTP",
        "control characters",
        "a line without end",
        "length no number",
        "two lengths",
        "a bad chunk",
        "TLS",
    ],
)
def test_what_is_no_http_is_refused_in_one_line(server, caplog, parts):
    received = raw(server, *parts)
    assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) or received == b""
    assert all(record.exc_info is None for record in caplog.records)
    assert lives(server)


def test_a_client_that_hangs_up_in_its_body_leaves_no_trace(server, caplog):
    with caplog.at_level(logging.INFO, "stagevar.serving"):
        raw(server, HEAD + b"content-length: 90\r\n\r\n", b'{"prompt"', until_closed=False)
        wait_until(lambda: any(" 499 " in record.getMessage() for record in caplog.records))
    assert all(record.exc_info is None for record in caplog.records)
    assert lives(server)


# ------------------------------------------------------------------------------------------------ keys


def test_keys_guard_what_draws_and_nothing_else():
    keys = Keys.of(["first-key", "zweiter-schlüssel"])
    with in_thread(Desk(FakeArtist, 10), keys=keys) as server:
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "first-key"},
            {"authorization": "Basic x"},
        ):
            for status, answer in (post(*server, GOOD, **header), get(*server, "/v1/models", **header)):
                assert status == 401 and answer["error"]["type"] == "authentication_error"
                assert "first" not in json.dumps(answer)
        assert post(*server, GOOD, authorization="Bearer first-key")[0] == 200
        assert get(*server, "/v1/models", authorization="bearer first-key")[0] == 200
        for path in ("/health", "/ready", "/metrics", "/"):
            assert get(*server, path)[0] == 200
    assert "first-key" not in repr(keys)


# ------------------------------------------------------------------------------------------------ what is accepted

OFFER = Offer(("a-1", "a-full"), ((64, 64), (32, 96)))


def test_defaults_and_everything_that_is_honored():
    plain = read_request(GOOD, OFFER, lambda: 7)
    assert (plain.model, plain.size, plain.seeds, plain.negative, plain.guidance, plain.ignored) == (
        "a-1", (64, 64), (7,), None, None, (),
    )  # fmt: skip
    full = read_request(
        with_(model="a-full", n=3, size="32x96", seed=2**53 - 1, negative_prompt="", guidance_scale=2, stream=False,
              response_format="b64_json", output_format="png", background="auto", partial_images=0, output_compression=100),
        OFFER,
    )  # fmt: skip
    assert full.seeds == (2**53 - 1, 2**53, 2**53 + 1) and full.size == (32, 96) and full.negative is None
    assert full.guidance == 2.0 and full.ignored == ()


def test_fields_without_effect_are_listed_and_null_counts_as_absent():
    asked = read_request(with_(quality="high", user="u1", style=None, moderation="low", n=None, size=None), OFFER)
    assert asked.ignored == ("moderation", "quality", "user") and asked.size == (64, 64)


def test_seeds_that_nobody_gave_differ():
    drawn = {read_request(GOOD, OFFER).seeds[0] for _ in range(50)}
    assert len(drawn) > 45 and all(0 <= seed < 2**32 for seed in drawn)


def test_a_model_that_cannot_be_guided_or_negated_says_so():
    fixed = Offer(("a",), ((64, 64),), guidance=3.0, negative=False)
    assert read_request(with_(guidance_scale=3), fixed).guidance == 3.0
    with pytest.raises(Refusal, match="supports only 3"):
        read_request(with_(guidance_scale=4), fixed)
    with pytest.raises(Refusal, match="negative_prompt is not supported by this model"):
        read_request(with_(negative_prompt="x"), fixed)
    assert read_request(with_(negative_prompt=" "), fixed).negative is None, "clients send it empty"


def test_an_answer_is_verified_only_where_the_verdict_covers_the_image():
    artist = FakeArtist()
    with in_thread(Desk(lambda: artist, 10)) as address:
        for fields, outside in (
            ({"negative_prompt": ""}, []),
            ({"negative_prompt": "blurred"}, ["negative_prompt instead of the model's null text"]),
            ({"guidance_scale": 2}, ["guidance_scale 2 instead of 3"]),
            ({"size": "32x96"}, ["size 32x96 instead of 64x64"]),
        ):
            told = post(*address, with_(**fields))[1]["stagevar"]
            assert told["outside_profile"] == outside and told["verified"] is not bool(outside)
        artist.served[0].differences = ("batch 4 instead of 1",)
        told = post(*address, GOOD)[1]["stagevar"]
        assert told["outside_profile"] == ["batch 4 instead of 1"] and not told["verified"]


def test_every_field_of_the_description_is_one_that_is_read(server):
    status, described = get(*server, "/openapi.json")
    body = described["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert status == 200 and tuple(body["properties"]) == FIELDS and body["required"] == ["prompt"]
    assert len(BAD_BODIES) + len(BAD_WAYS) >= 40
