"""The application as a Ray Serve deployment: one replica per (logical) GPU, one of them killed under load."""

import collections
import contextlib
import os
import pickle
import pkgutil
import random
import re
import signal
import socket
import sys
import threading
import types

import pytest
import yaml

from stagevar.errors import DeviceBroken, InfrastructureError, UsageError
from stagevar.extras import MissingExtra
from stagevar.serving import ray_app
from stagevar.serving.ray_app import Arguments, ReplicaApp
from stagevar.serving.refusal import RETRYABLE
from tests import ROOT
from tests.fakes.serving import FakeArtist, get, open_desk, post, wait_until

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
PROMPT = "a photo of two blue stars"


def test_arguments_come_as_text_or_values():
    text = Arguments.read({"model": "nano", "replicas": "3", "gpus": "0.5", "compare": "false", "timeout": "9"})
    assert text == Arguments.read({"model": "nano", "replicas": 3, "gpus": 0.5, "compare": False, "timeout": 9})
    assert text.loading().request.name == "nano" and text.loading().profile is None
    for given, message in (
        ({}, "give either profile=FILE or model=NAME"),
        ({"model": "nano", "profile": "p.yaml"}, "give either"),
        ({"model": "nano", "replcas": 2}, "unknown argument 'replcas', did you mean replicas"),
        ({"model": "nano", "replicas": "many"}, "replicas 'many' has the wrong type"),
        ({"model": "nano", "compare": "perhaps"}, "compare 'perhaps' has the wrong type"),
    ):
        with pytest.raises(UsageError, match=message):
            Arguments.read(given)


def test_a_replica_travels_as_its_arguments():
    app = ReplicaApp(Arguments(model="nano"))
    assert pickle.loads(pickle.dumps(app)).arguments == app.arguments


def test_a_broken_or_hanging_replica_is_unhealthy():
    artist, app = FakeArtist(), ReplicaApp(Arguments(model="nano", stuck=0.05))
    app.check_health()  # before it starts
    app._desk = desk = open_desk(artist)
    app.check_health()
    artist.gate.clear()
    job = desk.hand_in([_order("a")])
    wait_until(lambda: desk.drawing_for_s() > 0.05)
    with pytest.raises(InfrastructureError, match="has been running for"):
        app.check_health()
    artist.gate.set()
    job.future.result(30)
    artist.fails["b"] = DeviceBroken("cuda:0 is broken")
    desk.hand_in([_order("b")])
    assert desk.join(30)
    with pytest.raises(InfrastructureError, match="the device is broken: cuda:0"):
        app.check_health()


def _order(prompt):
    from stagevar.serving.desk import Order, Shape

    return Order(prompt, 1, Shape((64, 64), "fake-1"))


def test_the_files_of_the_documentation_are_what_build_takes():
    texts = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE | re.DOTALL)
    files = [yaml.safe_load(text) for text in texts]
    nested = [yaml.safe_load(file["spec"]["serveConfigV2"]) for file in files if file.get("kind") == "RayService"]
    deployed = [file for file in [*files, *nested] if "applications" in file]
    assert len(deployed) == 2
    for application in (one for file in deployed for one in file["applications"]):
        assert pkgutil.resolve_name(application["import_path"]) is ray_app.build
        assert Arguments.read(application["args"]).profile == "/models/profile.yaml"
        assert [one["name"] for one in application["deployments"]] == ["stagevar"]


def test_without_rays_own_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    with pytest.raises(MissingExtra, match=r"pip install 'ray\[serve\]'"):
        ray_app.build({"model": "nano"})


# ------------------------------------------------------------------------------------------------ on a cluster


def free_port():
    """A port that nobody has, apart from those that the system hands out, of which Ray takes dozens before Serve listens."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), contextlib.closing(socket.create_server(("127.0.0.1", port))):
            return port
    raise AssertionError("a hundred ports were taken")


@pytest.fixture(scope="module")
def address(ray_cluster):
    """Host and port of the proxy of a deployment with two replicas of nano."""
    try:
        from ray import serve
    except ImportError:
        pytest.skip("Ray Serve's packages are not installed: pip install 'ray[serve]'")
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    arguments = {"model": "nano", "device": "cpu", "gpus": "1", "threads": "1", "batch": "2", "replicas": "2"}
    serve.run(ray_app.build(arguments))
    try:
        yield "127.0.0.1", port
    finally:
        serve.shutdown()


def replicas():
    """Process ids of the replicas that live."""
    import ray

    actors = ray._private.state.actors().values()
    return {a["Pid"] for a in actors if a["State"] == "ALIVE" and a["ActorClassName"].startswith("ServeReplica")}


def test_two_replicas_answer_and_a_killed_one_loses_nobody_silently(address):
    assert get(*address, "/ready") == (200, {"status": "ready"})
    assert get(*address, "/v1/models")[1]["data"][0]["id"] == "nano-full"
    status, alone = post(*address, {"prompt": PROMPT, "seed": 1})
    assert status == 200
    assert post(*address, {"prompt": PROMPT, "n": 0})[0] == 400, "errors pass through the proxy as they are"
    before = replicas()
    assert len(before) == 2
    outcomes, done = collections.Counter(), threading.Event()

    def client(number):
        while not done.is_set():
            status, answer = post(*address, {"prompt": PROMPT, "seed": 1})
            outcomes[status] += 1
            if status == 200 and answer["data"][0]["b64_json"] == alone["data"][0]["b64_json"]:
                outcomes["same"] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: outcomes[200] >= 6)
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(replicas() - before) == 1 and len(replicas()) == 2)
    answered = outcomes[200]
    wait_until(lambda: outcomes[200] >= answered + 6)
    done.set()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request was lost"
    assert outcomes["same"] > 0
    assert {status for status in outcomes if status != "same"} <= {200, *RETRYABLE}, outcomes
    print(dict(outcomes))
