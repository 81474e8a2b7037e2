"""Measures a server that speaks OpenAI's images endpoint, ours or another: `stagevar bench --serve URL`. Standard library only.

Every client sends its next request once the last one is answered (a closed loop), so at most `concurrency` are under way. The
levels are measured one after the other, each after one uncounted request per client.
"""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

import numpy as np

from stagevar.errors import InfrastructureError, UsageError
from stagevar.sections import shown
from stagevar.serving.refusal import RETRYABLE

#: Seconds that a client waits for an answer.
PATIENCE_S = 600.0
#: Clients at once, each a thread.
MOST_CLIENTS = 1000


@dataclass(frozen=True)
class Answer:
    """One request: HTTP status (0 if the connection broke), milliseconds, images received."""

    status: int
    ms: float
    images: int


@dataclass(frozen=True)
class Level:
    """Results at one concurrency; `seconds` run from the first request to the last answer."""

    concurrency: int
    seconds: float
    answers: tuple[Answer, ...] = field(repr=False)

    def row(self) -> dict[str, float | int | dict[str, int]]:
        """Plain data: latency percentiles of the requests that brought images, images per second, statuses."""
        good_ms = [answer.ms for answer in self.answers if answer.status == 200]
        row: dict[str, float | int | dict[str, int]] = {"concurrency": self.concurrency, "requests": len(self.answers)}
        for share in (50, 90, 99):
            row[f"p{share}_ms"] = round(float(np.percentile(good_ms, share)), 2) if good_ms else math.nan
        row["images_per_s"] = round(sum(answer.images for answer in self.answers) / self.seconds, 3)
        row["statuses"] = counted(answer.status for answer in self.answers)
        return row


def counted(statuses: Iterable[int]) -> dict[str, int]:
    """How many answers had each status, in the order of the statuses."""
    return {str(status): count for status, count in sorted(Counter(statuses).items())}


def measure_server(
    url: str,
    concurrency: Sequence[int],
    requests: int,
    prompts: Sequence[str],
    key: str | None = None,
    body: Mapping[str, object] | None = None,
) -> list[Level]:
    """Measures a server at several levels of concurrency, in the given order.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        requests: per level.
        prompts: used in turn, with seeds 0, 1, ...
        key: API key.
        body: further fields of every request.

    Raises:
        UsageError: for an unsupported URL, too many clients, or a server that refuses every request.
        InfrastructureError: if nothing answers there, or nothing is drawn.
    """
    address = _address(url)
    if max(concurrency) > MOST_CLIENTS:
        raise UsageError(f"--concurrency {max(concurrency)} is too large; at most {MOST_CLIENTS} clients at once")
    levels = []
    for clients in concurrency:
        _run(address, clients, clients, prompts, key, body or {})
        level = _run(address, clients, requests, prompts, key, body or {})
        if not any(answer.images for answer in level.answers):
            raise _nothing_drawn(url, [answer.status for answer in level.answers])
        levels.append(level)
    return levels


def _nothing_drawn(url: str, statuses: Sequence[int]) -> UsageError | InfrastructureError:
    """The error of a level without images: the user's if sending the same again cannot help, else the server's."""
    said = f"{url:.100} drew nothing: statuses {counted(statuses)}"
    if not all(400 <= status < 500 and status not in RETRYABLE for status in statuses):
        return InfrastructureError(f"{said}; see its log")
    if set(statuses) <= {401, 403}:
        return UsageError(f"{said}; give a key that the server accepts with --api-key-file")
    if set(statuses) <= {404, 405}:
        return UsageError(f"{said}; check --serve: POST /v1/images/generations is not offered there")
    return UsageError(f"{said}; the server refuses such requests, its log has the reason")


def _address(url: str) -> SplitResult:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        valid = parts.scheme in ("http", "https") and (parts.port is None or parts.port > 0)
        valid = valid and bool((parts.hostname or "").encode("idna")) and parts.path.isascii()
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(f"--serve {shown(url)} is not a URL; give one such as http://127.0.0.1:8000")
    return parts


def _run(
    address: SplitResult,
    clients: int,
    requests: int,
    prompts: Sequence[str],
    key: str | None,
    body: Mapping[str, object],
) -> Level:
    numbers, lock = iter(range(requests)), threading.Lock()
    answers: list[Answer] = []

    def next_number() -> Iterator[int]:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            yield number

    def client() -> None:
        connection = _connect(address)
        for number in next_number():
            fields = {"prompt": prompts[number % len(prompts)], "seed": number, **body}
            answer, connection = _ask(connection, address, fields, key)
            with lock:
                answers.append(answer)
        connection.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Level(clients, time.perf_counter() - began, tuple(answers))


def _connect(address: SplitResult) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    return kind(address.hostname or "", address.port, timeout=PATIENCE_S)


def _ask(
    connection: http.client.HTTPConnection, address: SplitResult, fields: Mapping[str, object], key: str | None
) -> tuple[Answer, http.client.HTTPConnection]:
    """One request, and the connection for the next one."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    path = address.path.rstrip("/").removesuffix("/v1") + "/v1/images/generations"
    began = time.perf_counter()
    try:
        connection.request("POST", path, json.dumps(fields), headers)
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return Answer(0, (time.perf_counter() - began) * 1e3, 0), _connect(address)
    elapsed_ms = (time.perf_counter() - began) * 1e3
    images = 0
    if response.status == 200:
        try:
            images = len(json.loads(content)["data"])
        except (ValueError, KeyError, TypeError):
            return Answer(0, elapsed_ms, 0), connection
    return Answer(response.status, elapsed_ms, images), connection


def format_levels(rows: Sequence[Mapping[str, object]]) -> str:
    """Plain text, one line per level."""
    titles = ("concurrency", "requests", "p50_ms", "p90_ms", "p99_ms", "images_per_s")
    lines = ["  ".join(f"{title.replace('_', ' '):>12}" for title in titles) + "  statuses"]
    for row in rows:
        statuses = row["statuses"]
        assert isinstance(statuses, Mapping)
        others = ", ".join(f"{count} x {status}" for status, count in statuses.items())
        lines.append("  ".join(f"{row[title]:>12}" for title in titles) + f"  {others}")
    return "\n".join(lines)
