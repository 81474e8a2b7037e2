"""`stagevar serve` as its users meet it: OpenAI's client and supervisors; with nano, and with a stand-in for what is slow."""

import base64
import contextlib
import io
import json
import logging
import signal
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from stagevar.cli.command import main
from stagevar.errors import OutOfDeviceMemory
from stagevar.models.nano.scenes import prompts
from stagevar.models.registry import load_model
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import exact, paper
from stagevar.serving.app import Limits
from stagevar.serving.desk import Desk
from stagevar.serving.drawing import schedule_hash
from stagevar.serving.server import read_keys
from tests.fakes.serving import FakeArtist, as_process, get, in_thread, post, refusing, save_profile, wait_until

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed ([dev])")

PROMPT = "a photo of two blue stars"
KEY = "a-key-for-tests"
#: Largest difference of a pixel, of 255, between an image drawn alone and in a batch (docs/serving.md).
ROUNDING = 2


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", device="cpu")


@pytest.fixture(scope="module")
def profile(nano, tmp_path_factory):
    """A profile of nano for batches of four, said to be measured with another torch."""
    return save_profile(nano, tmp_path_factory.mktemp("profile") / "profile.yaml", 4, torch="1.0")


@pytest.fixture(scope="module")
def server(profile, tmp_path_factory):
    """The process, its host and port: the profile beside the full schedule, behind a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# who may draw\n{KEY}\n")
    with as_process("--profile", str(profile), "--compare", "--api-key-file", str(keys)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    _, host, port = server
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def drawn(nano):
    """What `stagevar generate` draws: schedule name, seeds -> images, one at a time."""
    sampler, chunks = Sampler(nano), len(nano.transformer.chunk_layers)
    plans = {"profile": paper(nano.grids), "full": exact(len(nano.grids))}

    def draw(name, seeds, **options):
        steps = plans[name].expand(nano.grids, chunks)
        return [sampler.generate([PROMPT], [seed], steps, **options)[0] for seed in seeds]

    return draw


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))))


def farthest(images, expected):
    pairs = zip(images, expected, strict=True)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


def outside(answer):
    return answer.model_extra["stagevar"]


# ------------------------------------------------------------------------------------------------ OpenAI's client


def test_one_image_is_the_one_that_generate_draws(client, drawn, profile, tmp_path, capsys):
    answer = client.images.generate(model="", prompt=PROMPT, extra_body={"seed": 7, "model": None})
    [image] = map(pixels, answer.data)
    assert image.shape == (64, 64, 3) and np.array_equal(image, drawn("profile", [7])[0])
    target = tmp_path / "same.png"
    assert main(["generate", "--profile", str(profile), PROMPT, "--seed", "7", "-o", str(target), "--batch", "1"]) == 0
    assert np.array_equal(np.asarray(Image.open(target)), image)
    said = outside(answer)
    assert said["verdict"] == "verified: made by a test" and said["ignored"] == []
    [difference] = said["outside_profile"]
    assert difference.startswith("torch") and "'1.0'" in difference and not said["verified"]
    assert answer.data[0].model_extra["seed"] == 7 and answer.size == "64x64"
    spent = answer.data[0].model_extra
    assert len(spent["scale_ms"]) == 8 and min(sum(spent["scale_ms"]), spent["text_ms"], spent["decode_ms"]) > 0
    assert sum(spent["scale_ms"]) + spent["text_ms"] + spent["decode_ms"] <= said["total_ms"]


def test_four_images_have_seeds_that_count_up(client, drawn):
    answer = client.images.generate(model="", prompt=PROMPT, n=4, size="64x64", extra_body={"seed": 3, "model": None})
    assert [image.model_extra["seed"] for image in answer.data] == [3, 4, 5, 6]
    assert {image.model_extra["batch"] for image in answer.data} == {4}
    assert farthest(map(pixels, answer.data), drawn("profile", range(3, 7))) <= ROUNDING


def test_without_a_seed_two_answers_differ_and_say_their_seeds(client, drawn):
    answers = [client.images.generate(model="", prompt=PROMPT, extra_body={"model": None}) for _ in range(2)]
    seeds = [answer.data[0].model_extra["seed"] for answer in answers]
    assert seeds[0] != seeds[1]
    assert np.array_equal(pixels(answers[1].data[0]), drawn("profile", seeds[1:])[0])


def test_the_full_schedule_is_another_model_of_the_list(client, drawn, nano):
    ids = [model.id for model in client.models.list()]
    digest = schedule_hash(paper(nano.grids).expand(nano.grids, len(nano.transformer.chunk_layers)))
    assert ids == [f"nano-{digest[:8]}", "nano-full"]
    answer = client.images.generate(model="nano-full", prompt=PROMPT, extra_body={"seed": 2})
    assert np.array_equal(pixels(answer.data[0]), drawn("full", [2])[0])
    assert outside(answer)["profile"] == "nano-full" and not outside(answer)["verified"]
    told = client.models.retrieve(ids[0]).model_extra["stagevar"]
    assert told["schedule"] == digest and told["batch"] == 4 and told["sizes"] == ["64x64"]


def test_guidance_and_a_negative_prompt_change_the_image_and_leave_the_profile(client, drawn, nano):
    from stagevar.serving.drawing import guided

    extra = {"seed": 5, "guidance_scale": 1.5, "model": None}
    answer = client.images.generate(model="", prompt=PROMPT, extra_body=extra)
    assert np.array_equal(pixels(answer.data[0]), drawn("profile", [5], sampling=guided(nano.sampling, 1.5))[0])
    assert outside(answer)["outside_profile"][1:] == ["guidance_scale 1.5 instead of 3"]
    negative = "a photo of a red circle"
    extra = {"seed": 5, "negative_prompt": negative, "model": None}
    answer = client.images.generate(model="", prompt=PROMPT, user="u", quality="high", extra_body=extra)
    assert np.array_equal(pixels(answer.data[0]), drawn("profile", [5], negative=[negative])[0])
    assert outside(answer)["ignored"] == ["quality", "user"]
    assert outside(answer)["outside_profile"][1:] == ["negative_prompt instead of the model's null text"]
    extra = {"seed": 5, "negative_prompt": "", "model": None}
    answer = client.images.generate(model="", prompt=PROMPT, extra_body=extra)
    assert np.array_equal(pixels(answer.data[0]), drawn("profile", [5])[0]), "an empty one is none"


def test_a_bad_size_names_the_sizes(client):
    with pytest.raises(openai.BadRequestError, match="'1024x1024' is not served here; use 64x64") as caught:
        client.images.generate(model="nano-full", prompt=PROMPT, size="1024x1024")
    assert caught.value.code == "invalid_size" and caught.value.param == "size"


def test_a_bad_key_is_refused(server):
    _, host, port = server
    with (
        openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="guessed", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not valid for this server"),
    ):
        client.images.generate(model="nano-full", prompt=PROMPT)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has nano-"):
        client.images.generate(model="dall-e-3", prompt=PROMPT)


def test_requests_at_once_share_batches_and_stay_what_they_are(server, client, drawn):
    """Of twelve requests at once some are drawn together, and each gets its own image."""
    answers = {}

    def one(seed):
        extra = {"seed": seed, "model": None}
        answers[seed] = client.images.generate(model="", prompt=PROMPT, extra_body=extra).data[0]

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert farthest([pixels(answers[seed]) for seed in range(12)], drawn("profile", range(12))) <= ROUNDING
    assert max(answer.model_extra["batch"] for answer in answers.values()) == 4


# ------------------------------------------------------------------------------------------------ supervisors


def test_the_envelope_is_warned_of_once_and_told_to_clients(server, client):
    process, _, _ = server
    lines = [line for line in process.log if "outside the measured envelope" in line]
    assert len(lines) == 1 and "instead of '1.0'" in lines[0]
    told = next(iter(client.models.list())).model_extra["stagevar"]
    assert not told["inside_envelope"] and [text for text in told["outside_envelope"] if text.startswith("torch")]


def test_metrics_tell_requests_phases_batches_and_the_queue(server):
    _, host, port = server
    assert post(host, port, {"prompt": ""}, authorization=f"Bearer {KEY}")[0] == 400
    assert post(host, port, {"prompt": PROMPT}, authorization=f"Bearer {KEY}")[0] == 200
    text = get(host, port, "/metrics")[1]["text"]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert values['stagevar_requests_total{status="200"}'] >= 1 and values['stagevar_requests_total{status="400"}'] >= 1
    for phase in ("queue", "text", "scales", "decode", "encode", "total"):
        assert values[f'stagevar_phase_seconds_count{{phase="{phase}"}}'] >= 1, phase
    assert values["stagevar_batch_images_count"] >= 1 and values["stagevar_queue_images"] == 0
    assert values["stagevar_ready"] == 1 and values["process_resident_memory_bytes"] > 1e7


def test_prompts_and_keys_are_not_logged(server):
    process, host, port = server
    assert post(host, port, {"prompt": "a foto of two blue stars"}, authorization=f"Bearer {KEY}")[0] == 200
    assert any("POST /v1/images/generations 200" in line for line in process.log)
    told = [line for line in process.log if any(word in line for word in ("blue stars", "foto", KEY, "Traceback"))]
    assert not told


def refuses(client):
    """Whether a server turns a new request away."""
    try:
        client.with_options(timeout=30).models.list()
    except (openai.APIConnectionError, openai.InternalServerError):
        return True
    return False


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(profile):
    with as_process("--profile", str(profile), "--batch", "1") as (process, host, port):
        with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
            answers = []

            def ask_for_ten():
                answers.append(client.images.generate(model="nano", prompt=PROMPT, n=10, extra_body={"model": None}))

            asking = threading.Thread(target=ask_for_ten)
            asking.start()
            wait_until(lambda: get(host, port, "/metrics")[1]["text"].count("stagevar_images_asked_total 10.0"))
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: any("SIGTERM: finishing" in line for line in process.log))
            wait_until(lambda: refuses(client))  # once the listener is closed
            asking.join(180)
        assert process.wait(180) == 0
    assert len(answers[0].data) == 10
    assert "Traceback" not in "".join(process.log)


STOPPING_AT_ONCE = """
import builtins, os, signal
say = print
def say_and_stop(*words, **options):
    say(*words, **options)
    os.kill(os.getpid(), signal.SIGTERM)
builtins.print = say_and_stop
"""


def test_sigterm_as_soon_as_the_address_is_known_ends_with_0():
    with as_process("--model", "nano", code=STOPPING_AT_ONCE, wait=False) as (process, _, _):
        assert process.wait(180) == 0
    assert any("SIGTERM: finishing" in line for line in process.log) and "Traceback" not in "".join(process.log)


def test_half_a_request_is_refused_when_the_server_stops(profile):
    with as_process("--profile", str(profile), "--grace", "0.1") as (process, host, port):
        with socket.create_connection((host, port), timeout=180) as connection:
            head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(f'{head}content-length: 90\r\n\r\n{{"pr'.encode())
            assert get(host, port, "/ready")[0] == 200  # by now the server has met the first connection, too
            process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert process.wait(180) == 0
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503") and b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "server_stopping"
    assert "Traceback" not in "".join(process.log)


def test_ctrl_c_stops_with_130(profile):
    with as_process("--profile", str(profile)) as (process, _, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == 130
    assert "Traceback" not in "".join(process.log)


BREAKING = """
import torch
from stagevar.serving.drawing import TimedSampler
decode, drawn = TimedSampler.decode, []
def break_down(self, generation):
    drawn.append(1)
    if len(drawn) > 2:  # after warming up
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return decode(self, generation)
TimedSampler.decode = break_down
"""


def test_a_broken_device_ends_the_process_with_6_and_nobody_waits(profile):
    with as_process("--profile", str(profile), code=BREAKING) as (process, host, port):
        status, answer = post(host, port, {"prompt": PROMPT, "n": 3})
        assert status == 503 and answer["error"]["code"] == "server_broken"
        assert process.wait(180) == 6
    assert any("is broken" in line and "no kernel runs" in line for line in process.log[-2:])
    assert "Traceback" not in "".join(process.log)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --profile FILE or --model NAME"),
        (["--model", "nano", "--profile", "p.yaml"], "give either"),
        (["--model", "nano", "--compare"], "--compare needs --profile"),
        (["--model", "nano", "--weights", "random"], "random draws noise"),
        (["--model", "nano", "--port", "70000"], "--port 70000 must be between 0 and 65535"),
        (["--model", "nano", "--queue", "3"], "--queue 3 must be at least 10"),
        (["--model", "nano", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000"),
        (["--model", "nano", "--engine", "graph"], "needs a CUDA device"),
        (["--profile", "missing.yaml"], "missing.yaml"),
        (["--model", "nano", "--api-key-file", "missing.txt"], "missing.txt"),
        (["--model", "nano", "--api-key-file", "empty.txt"], "has no key; write one per line"),
        (["--model", "nano", "--timeout", "0"], "'0' must be a number from 0.1"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    assert main(["serve", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_taken_port_is_one_line_and_2(capsys):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "nano", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ a stand-in that is slow


@pytest.fixture
def slow():
    """A desk whose artist draws when the gate opens."""
    artist = FakeArtist()
    desk = Desk(lambda: artist, 10)
    with in_thread(desk, limits=Limits(timeout_s=30, stuck_s=0.2)) as address:
        artist.gate.clear()
        yield artist, desk, address
        artist.gate.set()


def test_who_leaves_is_not_drawn(slow, caplog):
    artist, desk, address = slow
    first = threading.Thread(target=post, args=(*address, {"prompt": "a", "seed": 1}))
    first.start()
    artist.wait_for_batch()
    body = json.dumps({"prompt": "b", "seed": 2}).encode()
    with socket.create_connection(address) as leaving, caplog.at_level(logging.INFO, "stagevar.serving"):
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        leaving.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: desk.waiting == 1)
        leaving.close()
        wait_until(lambda: desk.waiting == 0)
        wait_until(lambda: any(" 499 the client disconnected" in record.getMessage() for record in caplog.records))
    artist.gate.set()
    first.join(30)
    assert post(*address, {"prompt": "c", "seed": 3})[0] == 200
    assert artist.batches == [[1], [3]]


def test_a_request_that_waits_too_long_is_told_to_come_again():
    artist = FakeArtist()
    desk = Desk(lambda: artist, 10)
    with in_thread(desk, limits=Limits(timeout_s=0.2)) as address:
        artist.gate.clear()
        status, answer = post(*address, {"prompt": "a"})
        assert (
            status == 504
            and answer["error"]["code"] == "timeout"
            and "no image within 0.2 s" in answer["error"]["message"]
        )
        assert desk.waiting == 0
        artist.gate.set()
        wait_until(lambda: post(*address, {"prompt": "b"})[0] == 200)  # on a busy machine it, too, may come too late


def test_a_full_queue_is_429_with_retry_after(slow):
    artist, desk, (host, port) = slow
    waiting = [threading.Thread(target=post, args=(host, port, {"prompt": "a", "n": 10})) for _ in range(2)]
    waiting[0].start()
    artist.wait_for_batch()
    wait_until(lambda: desk.waiting == 6)  # of ten, four are being drawn
    status, answer = post(host, port, {"prompt": "a", "n": 5})
    assert status == 429 and answer["error"]["type"] == "rate_limit_error"
    assert "6 images are waiting, of at most 10" in answer["error"]["message"]
    with (
        openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        client.images.generate(model="fake-1", prompt="a", n=5)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    artist.gate.set()
    waiting[0].join(30)


def test_a_batch_that_hangs_fails_the_liveness_probe(slow):
    artist, _, address = slow
    assert get(*address, "/health") == (200, {"status": "ok"})
    asking = threading.Thread(target=post, args=(*address, {"prompt": "a"}))
    asking.start()
    artist.wait_for_batch()
    wait_until(lambda: get(*address, "/health")[0] == 503)
    assert "has been running for" in get(*address, "/health")[1]["status"]
    artist.gate.set()
    asking.join(30)
    wait_until(lambda: get(*address, "/health")[0] == 200)


def test_before_it_is_ready_it_lives_and_refuses():
    loading = threading.Event()

    def load():
        assert loading.wait(180)
        return FakeArtist()

    desk = Desk(load, 10)
    with in_thread(desk, ready=False) as address:
        assert get(*address, "/health")[0] == 200
        assert get(*address, "/ready") == (503, {"status": "loading"})
        status, answer = post(*address, {"prompt": "a"})
        assert status == 503 and answer["error"]["code"] == "server_loading"
        assert get(*address, "/v1/models")[0] == 503
        loading.set()
        wait_until(lambda: get(*address, "/ready")[0] == 200)
        assert post(*address, {"prompt": "a"})[0] == 200


# ------------------------------------------------------------------------------------------------ measuring a server


def test_bench_measures_a_server(capsys):
    with in_thread(Desk(FakeArtist, 64)) as (host, port):
        url = f"http://{host}:{port}/v1"
        assert main(["bench", "--serve", url, "--concurrency", "1,3", "--requests", "12", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["concurrency"] for row in rows] == [1, 3]
        for row in rows:
            assert row["statuses"] == {"200": 12} and row["requests"] == 12
            assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["images_per_s"] > 0
        assert main(["bench", "--serve", url, "--concurrency", "2", "--requests", "4"]) == 0
        assert "images per s" in capsys.readouterr().out


def test_bench_sends_the_first_key_of_the_servers_own_file(tmp_path, capsys):
    keys, other = tmp_path / "keys.txt", tmp_path / "other.txt"
    keys.write_text(f"# production key\n\n{KEY}\n")
    other.write_text("guessed\n")
    with in_thread(Desk(FakeArtist, 64), keys=read_keys(keys)) as (host, port):
        words = ["bench", "--serve", f"http://{host}:{port}", "--concurrency", "2", "--requests", "4", "--api-key-file"]
        assert main([*words, str(keys)]) == 0
        assert "4 x 200" in capsys.readouterr().out
        assert main([*words, str(other)]) == 2
        err = capsys.readouterr().err
        assert "statuses {'401': 4}; give a key that the server accepts with --api-key-file" in err
        assert err.count("\n") == 1
    keys.write_text("20\u20ac\n", encoding="utf-8")
    assert main([*words, str(keys)]) == 2
    assert "key 1 holds a character that no header can; use ASCII" in capsys.readouterr().err


def test_bench_tells_a_refusal_from_a_server_that_may_recover(capsys):
    artist = FakeArtist()
    for error, code in ((refusing("no such class"), 2), (OutOfDeviceMemory("no memory"), 6)):
        artist.fails = {metadata["prompt"]: error for metadata in prompts("heldout", 8)}
        with in_thread(Desk(lambda: artist, 64)) as (host, port):
            words = ["--serve", f"http://{host}:{port}", "--concurrency", "1", "--requests", "2", "--prompts", "8"]
            assert main(["bench", *words]) == code
            err = capsys.readouterr().err
            assert f"drew nothing: statuses {{'{400 if code == 2 else 503}': 2}}" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--serve", "ftp://x"], 2, "is not a URL"),
        (["--serve", "http://127.0.0.1:99999"], 2, "is not a URL"),
        (["--serve", "http://é" + "x" * 70], 2, "is not a URL"),
        (["--serve", "127.0.0.1:1", "--concurrency", "1001"], 2, "--concurrency 1001 is too large; at most 1000"),
        (["--serve", "127.0.0.1:1", "--requests", "1"], 6, "drew nothing: statuses {'0': 1}"),
        (["--serve", "127.0.0.1:1", "--concurrency", "1,x"], 2, "--concurrency: 'x' must be a whole number"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words, code, message, capsys):
    assert main(["bench", *words]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
