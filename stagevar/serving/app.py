"""The HTTP side: OpenAI's images endpoint over a desk. FastAPI is imported when an application is made, not before."""

# No `from __future__ import annotations` here: FastAPI reads the annotations of functions made inside a function.
import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from stagevar import __version__
from stagevar.sections import shown
from stagevar.serving.answers import answer_data, models_data, png_text, request_schema
from stagevar.serving.asking import Asked, read_body, read_request, size_text
from stagevar.serving.desk import Desk, Drawn, Order, Shape
from stagevar.serving.metrics import Metrics
from stagevar.serving.refusal import Refusal, not_ready

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from stagevar.serving.drawing import ModelArtist

logger = logging.getLogger("stagevar.serving")
#: Bytes of a body that are read, and that are thrown away so that the client gets to read why it was refused.
LARGEST_BODY, LARGEST_THROWN_AWAY = 64 * 1024, 32 * 1024 * 1024
#: Seconds until a request whose body is still on its way is refused because the server stops.
STOP_SEEN_S = 0.25
#: Status in log and metrics if the client closed the connection, as in nginx; nobody receives it.
CLIENT_LEFT = 499
#: The page contains everything it needs and talks only to its own server.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)


@dataclass(frozen=True)
class Limits:
    """Time limits of a server.

    Attributes:
        timeout_s: from the last byte of a request to its answer.
        body_s: for a client to send its request.
        stuck_s: a batch that takes longer makes /health fail, so that a supervisor restarts the process.
    """

    timeout_s: float = 60.0
    body_s: float = 10.0
    stuck_s: float = 300.0


@dataclass(frozen=True)
class Keys:
    """Accepted API keys, kept as hashes; without any, every client is served."""

    hashes: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        """From the keys themselves."""
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    def check(self, header: str | None) -> None:
        """Raises Refusal for an Authorization header that is missing or has none of the keys."""
        if not self.hashes:
            return
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Refusal("no API key was sent; use the header Authorization: Bearer KEY", 401, code="missing_api_key")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        equal = [
            hmac.compare_digest(digest, one) for one in self.hashes
        ]  # all of them, so that the time reveals nothing
        if not any(equal):
            raise Refusal("the API key is not valid for this server", 401, code="invalid_api_key")


def build_app(desk: Desk, limits: Limits | None = None, keys: Keys | None = None) -> "FastAPI":
    """The application; it starts the desk when it begins, and closes it when it ends."""
    from fastapi import FastAPI

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        desk.start()
        yield
        desk.stop()

    app = FastAPI(title="stagevar serve", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    metrics = Metrics(desk)
    desk.on_batch = metrics.batch
    _refuse_in_shape(app)
    _add_page_and_probes(app, desk, metrics, limits or Limits())
    _add_models(app, desk, keys or Keys())
    _add_images(app, Counter(desk, metrics, limits or Limits(), keys or Keys()))
    return app


def _refuse_in_shape(app: "FastAPI") -> None:
    """Errors of every kind as OpenAI's clients read them, one line in the log."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException

    @app.exception_handler(Refusal)
    async def on_refusal(request: Request, refusal: Refusal) -> Response:
        _log(request, refusal.status, str(refusal))
        return JSONResponse(refusal.body(), refusal.status, refusal.headers())

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        path = shown(request.url.path)
        if error.status_code == 405:
            refusal = Refusal(f"{path} does not take {request.method}", 405, code="method_not_allowed")
        elif error.status_code == 404:
            refusal = Refusal(f"there is no {path} here; images are at /v1/images/generations", 404, code="not_found")
        else:
            refusal = Refusal(str(error.detail), error.status_code, code="http_error")
        response = await on_refusal(request, refusal)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        refusal = Refusal(
            "the request could not be answered; the server's log has the reason", 500, code="internal_error"
        )
        return await on_refusal(request, refusal)


def _add_page_and_probes(app: "FastAPI", desk: Desk, metrics: Metrics, limits: Limits) -> None:
    """GET /, /health, /ready and /metrics."""
    from fastapi.responses import HTMLResponse, JSONResponse, Response

    page = (files("stagevar") / "serving" / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def get_page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"})

    @app.get("/health")
    async def get_health() -> Response:
        """Whether the process should live: 503 once the device is broken or a batch hangs."""
        drawing_s = desk.drawing_for_s()
        if desk.state == "broken" or drawing_s > limits.stuck_s:
            why = "broken" if desk.state == "broken" else f"one batch has been running for {drawing_s:.0f} s"
            return JSONResponse({"status": why}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def get_ready() -> Response:
        """Whether requests are accepted."""
        return JSONResponse({"status": desk.state}, 200 if desk.state == "ready" else 503)

    @app.get("/metrics", include_in_schema=False)
    async def get_metrics() -> Response:
        content, kind = metrics.text()
        return Response(content, media_type=kind)


def _add_models(app: "FastAPI", desk: Desk, keys: Keys) -> None:
    """GET /v1/models and /v1/models/ID."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    @app.get("/v1/models")
    async def get_models(request: Request) -> Response:
        keys.check(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": list(models_data(_artist(desk)).values())})

    @app.get("/v1/models/{name}")
    async def get_model(request: Request, name: str) -> Response:
        keys.check(request.headers.get("authorization"))
        served = models_data(_artist(desk))
        if name not in served:
            message = f"model {shown(name)} is not served here; this server has {', '.join(served)}"
            raise Refusal(message, 404, code="model_not_found", param="model")
        return JSONResponse(served[name])


def _add_images(app: "FastAPI", counter: "Counter") -> None:
    """POST /v1/images/generations."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    @app.post("/v1/images/generations", openapi_extra=request_schema())
    async def post_generations(request: Request) -> Response:
        began = time.monotonic()
        try:
            answer, what = await counter.serve(request)
            status = 200
            response: Response = JSONResponse(answer)
        except Refusal as refusal:
            status, what = refusal.status, refusal.logged
            response = JSONResponse(refusal.body(), status, refusal.headers())
        except _ClientLeft:
            status, what, response = CLIENT_LEFT, "the client disconnected", Response(status_code=CLIENT_LEFT)
        seconds = time.monotonic() - began
        counter.metrics.answered(status, seconds)
        _log(request, status, f"{what} ({seconds * 1e3:.0f} ms)")
        return response


@dataclass(frozen=True)
class Counter:
    """Takes requests for images and hands out their images."""

    desk: Desk
    metrics: Metrics
    limits: Limits
    keys: Keys

    async def serve(self, request: "Request") -> tuple[dict[str, object], str]:
        """The answer, and a line about it. Raises Refusal, and _ClientLeft if the client no longer waits."""
        began = time.monotonic()
        self.keys.check(request.headers.get("authorization"))
        body = await self._whole_body(request)
        if self.desk.state != "ready":
            raise not_ready(self.desk.state)
        asked = read_request(read_body(body), _artist(self.desk).offer)
        self.metrics.asked(len(asked.seeds))
        drawn, waited_s = await self._drawn(request, asked)
        encoding = time.monotonic()
        images = await asyncio.to_thread(lambda: [png_text(one.pixels) for one in drawn])
        self.metrics.phase("queue", waited_s)
        self.metrics.phase("encode", time.monotonic() - encoding)
        times_ms = {"queue_ms": round(waited_s * 1e3, 2), "total_ms": round((time.monotonic() - began) * 1e3, 2)}
        answer = answer_data(_artist(self.desk), asked, drawn, images, times_ms)
        return answer, f"n={len(images)} size={size_text(asked.size)} seed={asked.seeds[0]} model={asked.model}"

    async def _whole_body(self, request: "Request") -> bytes:
        """The body. Raises Refusal if it is not acceptable, late, or still on its way when the server stops."""
        reading = asyncio.ensure_future(_body(request))
        late_s = time.monotonic() + self.limits.body_s
        try:
            while not (await asyncio.wait({reading}, timeout=min(self.limits.body_s, STOP_SEEN_S)))[0]:
                if self.desk.state not in ("loading", "ready"):
                    raise not_ready(self.desk.state, close=True)
                if time.monotonic() >= late_s:
                    message = f"the request did not arrive within {self.limits.body_s:g} s"
                    raise Refusal(message, 408, code="slow_request", close=True)
            return reading.result()
        finally:
            reading.cancel()

    async def _drawn(self, request: "Request", asked: Asked) -> tuple[list[Drawn], float]:
        """The images, and the seconds that they waited."""
        shape = Shape(asked.size, asked.model, asked.guidance, asked.negative is not None)
        job = self.desk.hand_in([Order(asked.prompt, seed, shape, asked.negative) for seed in asked.seeds])
        drawing, leaving = asyncio.wrap_future(job.future), asyncio.ensure_future(_left(request))
        try:
            timeout_s = self.limits.timeout_s
            both: set[asyncio.Future[Any]] = {drawing, leaving}
            done, _ = await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if drawing in done:
                return drawing.result(), job.waited_s or 0.0
            if leaving in done:
                raise _ClientLeft
            message = f"no image within {timeout_s:g} s; try again, with a smaller n, or on another server"
            raise Refusal(message, 504, code="timeout", retry_after_s=1)
        finally:
            leaving.cancel()
            if not drawing.done():
                self.desk.withdraw(job)


class _ClientLeft(Exception):
    """The client no longer waits for the answer."""


def _log(request: "Request", status: int, what: str) -> None:
    """One line per request, whatever it holds, but never its prompts."""
    path = request.url.path if len(request.url.path) <= 60 else f"{request.url.path[:57]}..."
    line = " ".join(f"{request.method} {path} {status} {what}".split())
    logger.log(
        logging.INFO if status < 500 else logging.WARNING, "%s", line.encode("ascii", "backslashreplace").decode()
    )


def _artist(desk: Desk) -> "ModelArtist":
    if desk.artist is None:
        raise not_ready("loading" if desk.state == "loading" else desk.state)
    return desk.artist  # type: ignore[return-value]


async def _body(request: "Request") -> bytes:
    """The whole body. Raises Refusal for another content type or one that is too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= LARGEST_BODY:
                body += chunk
            elif size > LARGEST_THROWN_AWAY:
                break
    except Exception as error:
        if type(error).__name__ == "ClientDisconnect":
            raise _ClientLeft from None
        raise
    if size > LARGEST_BODY:
        message = f"the body is larger than {LARGEST_BODY} bytes"
        raise Refusal(message, 413, code="too_large", close=size > LARGEST_THROWN_AWAY)
    if kind != "application/json":
        raise Refusal(
            f"content-type {shown(kind)} is not supported; send application/json", 415, code="bad_content_type"
        )
    return bytes(body)


async def _left(request: "Request") -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
