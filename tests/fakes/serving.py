"""Servers for tests: a stand-in for a model that draws at once, an application in a thread, `stagevar serve` as a process."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from stagevar.errors import UsageError
from stagevar.models.base import LoadedModel
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.schedule import StageSchedule, paper
from stagevar.serving.asking import Offer
from stagevar.serving.desk import Desk, Drawn, Order

SIZES = ((64, 64), (32, 96))


def save_profile(
    nano: LoadedModel,
    path: Path,
    batch: int = 1,
    schedule: StageSchedule | None = None,
    verified: bool = True,
    **envelope: str,
) -> str:
    """A profile of nano for batches of this size. schedule: the paper's by default. envelope: fields said to be otherwise."""
    schedule = schedule or paper(nano.grids)
    Profile(
        model={"name": "nano", "weights": nano.provenance["weights"], "load": nano.provenance["load"]},
        schedule=schedule,
        steps=steps_to_data(schedule.expand(nano.grids, len(nano.transformer.chunk_layers))),
        sampling={},
        envelope=dataclasses.replace(present_envelope(nano, batch=batch, threads=1), **envelope),
        verified=verified,
        verdict="verified: made by a test" if verified else "made by a test",
    ).save(path)
    return str(path)


@dataclass
class FakeArtist:
    """Paints every image in the color of its seed.

    gate: drawing waits for it. fails: what is raised for an order, by its prompt. batches: the seeds of every call.
    """

    batch: int = 4
    gate: threading.Event = field(default_factory=threading.Event)
    fails: dict[str, Exception] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    engine: str = "eager"
    fell_back: str | None = None
    guidance: float = 3.0
    offer: Offer = field(default_factory=lambda: Offer(("fake-1", "fake-full"), SIZES))
    sizes: tuple[tuple[int, int], ...] = SIZES

    def __post_init__(self) -> None:
        self.gate.set()
        self.model = SimpleNamespace(name="fake")
        self.served = tuple(
            SimpleNamespace(id=one, schedule_hash="00ff", verdict="verified", verified=True, differences=())
            for one in self.offer.models
        )

    def draw(self, orders: Sequence[Order]) -> list[Drawn]:
        self.batches.append([order.seed for order in orders])
        self.began.release()
        assert self.gate.wait(180)
        for order in orders:
            if order.prompt in self.fails:
                raise self.fails[order.prompt]
        width, height = orders[0].shape.size
        return [
            Drawn(np.full((height, width, 3), order.seed % 256, np.uint8), 1.0, (2.0, 3.0), 4.0, len(orders))
            for order in orders
        ]

    def wait_for_batch(self) -> None:
        """Returns when one more batch was begun."""
        assert self.began.acquire(timeout=180)


def open_desk(artist: FakeArtist, limit: int = 64) -> Desk:
    """A desk that is ready."""
    desk = Desk(lambda: artist, limit)
    desk.start()
    wait_until(lambda: desk.state == "ready")
    return desk


def wait_until(holds, seconds: float = 180.0) -> None:
    """Polls until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.005)


@contextlib.contextmanager
def in_thread(desk: Desk, ready: bool = True, **options) -> Iterator[tuple[str, int]]:
    """The application over a desk on a free port of this process: (host, port). ready: wait until it is."""
    import uvicorn

    from stagevar.serving.app import build_app

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        config = uvicorn.Config(
            build_app(desk, **options), log_config=None, access_log=False, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started and (not ready or desk.state != "loading"))
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(30)


@contextlib.contextmanager
def as_process(*words: str, code: str = "", wait: bool = True) -> Iterator[tuple[subprocess.Popen, str, int]]:
    """`stagevar serve` with these options: (process, host, port). code: run before it. wait: until it is ready."""
    start = f"import sys\n{code}\nfrom stagevar.cli.command import main\nsys.exit(main({['serve', '--port', '0', *words]!r}))"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    process.log = lines
    process.reader = reader
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), (address, lines)
        host, _, port = address.removeprefix("http://").rpartition(":")
        if wait:
            wait_until(lambda: get(host, int(port), "/ready")[0] == 200 or process.poll() is not None)
        yield process, host, int(port)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
        reader.join(30)


def get(host: str, port: int, path: str, **headers: str) -> tuple[int, dict]:
    """Status and JSON of a GET."""
    return ask(host, port, "GET", path, None, headers)


def post(host: str, port: int, body, **headers: str) -> tuple[int, dict]:
    """Status and JSON of a request for images. body: plain data, or the bytes themselves."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(host, port, "POST", "/v1/images/generations", content, {"content-type": "application/json", **headers})


def ask(host: str, port: int, method: str, path: str, content: bytes | None, headers: dict) -> tuple[int, dict]:
    """Status and JSON of a request; text that is no JSON comes as {"text": ...}."""
    connection = http.client.HTTPConnection(host, port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        text = response.read().decode()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, {"text": text}


def refusing(message: str) -> UsageError:
    """What a model raises for a prompt that it cannot draw."""
    return UsageError(message)
