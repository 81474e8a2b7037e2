"""One process that serves: it binds, loads, answers, stops gracefully, and ends with a code that a supervisor understands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar import extras
from stagevar.errors import UsageError
from stagevar.serving.app import Keys, Limits, build_app
from stagevar.serving.asking import MOST_IMAGES
from stagevar.serving.desk import Artist, Desk

if TYPE_CHECKING:
    import uvicorn

    from stagevar.serving.drawing import Loading

logger = logging.getLogger("stagevar.serving")
#: Seconds that an idle connection stays open; more than clients' pools keep theirs, so that the client closes first.
IDLE_S = 75
#: Connections at once; more are answered with 503.
MOST_CONNECTIONS = 1000


@dataclass(frozen=True)
class Serving:
    """How a server listens and stops.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        queue: images that may wait.
        grace_s: for accepted requests when the process is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 64
    grace_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port} must be between 0 and 65535")
        if self.queue < MOST_IMAGES:
            raise UsageError(
                f"--queue {self.queue} must be at least {MOST_IMAGES}, the most images that one request may ask for"
            )


def keys_of(path: Path) -> list[str]:
    """API keys from a file, one per line; empty lines and lines that begin with # are ignored. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"--api-key-file {path} is not UTF-8 text; save it as UTF-8") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {path} has no key; write one per line")
    for number, key in enumerate(keys, 1):
        if not key.isprintable() or max(key) > "\xff":
            raise UsageError(f"--api-key-file {path}: key {number} holds a character that no header can; use ASCII")
    return keys


def read_keys(path: Path) -> Keys:
    """What a server accepts of a file of API keys. Raises UsageError."""
    return Keys.of(keys_of(path))


def require_packages() -> None:
    """Raises MissingExtra if the extra [serve] is not installed."""
    extras.require("stagevar serve", *extras.PACKAGES["serve"])


def serve(loading: Loading, serving: Serving, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes what was accepted.

    Args:
        announce: called with the address once it listens; /ready says when the model is warm.

    Raises:
        UsageError: an address that cannot be used, or what loading the model refuses.
        DeviceBroken: no kernel runs any more; a new process is needed.
        KeyboardInterrupt: after Ctrl-C, once everything has stopped.
    """
    require_packages()
    with _log_on_stderr(), contextlib.closing(_listen(serving)) as listener:
        desk = Desk(lambda: load_and_warm(loading), serving.queue)
        stopped_by = asyncio.run(_run(desk, serving, listener, announce))
        desk.join(5)
    if desk.error is not None:
        raise desk.error
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


def load_and_warm(loading: Loading) -> Artist:
    """What the desk draws with; what it warns about is logged, each line once."""
    from stagevar.serving.drawing import load_artist  # with torch, which takes seconds: in the desk's thread

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        artist = load_artist(loading)
        artist.warm()
    for line in dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)):
        logger.warning("%s", line)
    logger.info(
        "ready: %s, batch %d, engine %s", ", ".join(one.id for one in artist.served), artist.batch, artist.engine
    )
    return artist


def _listen(serving: Serving) -> socket.socket:
    """A bound socket. Raises UsageError."""
    try:
        family, *_, address = socket.getaddrinfo(serving.host, serving.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)  # type: ignore[arg-type]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"cannot listen on {serving.host:.100}:{serving.port}: {reason}; choose another --host or --port"
        raise UsageError(message) from None


async def _run(desk: Desk, serving: Serving, listener: socket.socket, announce: Callable[[str], None]) -> int | None:
    """Serves until a signal, which is returned, or until the desk ends by itself."""
    import uvicorn

    loop = asyncio.get_running_loop()
    config = uvicorn.Config(
        build_app(desk, serving.limits, serving.keys),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=int(serving.grace_s) + 5,
    )
    server = _quiet_server(config)
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        if len(signals) > 1:
            server.force_exit = True
            desk.give_up()
            return
        logger.info("%s: finishing what was accepted, for at most %g s", signal.Signals(number).name, serving.grace_s)
        desk.stop()
        server.should_exit = True
        loop.call_later(serving.grace_s, desk.give_up)

    def end(error: BaseException) -> None:
        server.should_exit = True

    desk.on_end = end
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    host, port = listener.getsockname()[:2]
    # Only now: whoever has read the address may send a signal.
    announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    if not serving.keys.hashes and host not in ("127.0.0.1", "::1"):
        logger.warning("listening on %s without API keys: anyone who reaches it can draw; see --api-key-file", host)
    await server.serve(sockets=[listener])
    return signals[0] if signals else None


def _quiet_server(config: uvicorn.Config) -> uvicorn.Server:
    """uvicorn's server, without its own signal handlers, which would end the process by the signal once more."""
    import uvicorn

    class Quiet(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Quiet(config)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Our lines, and uvicorn's about requests that are not HTTP, one line each on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    levels = {logger: logging.INFO, logging.getLogger("uvicorn.error"): logging.WARNING}
    for one, level in levels.items():
        one.setLevel(level)
        one.addHandler(handler)
        one.propagate = False
    try:
        yield
    finally:
        for one in levels:
            one.removeHandler(handler)
            one.propagate = True
