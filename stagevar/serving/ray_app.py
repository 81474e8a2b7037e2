"""The same application on several GPUs: a Ray Serve deployment with one replica per GPU. Routing and restarts are Ray's.

    serve run stagevar.serving.ray_app:build profile=/models/profile.yaml replicas=4

docs/serving.md has a configuration file with autoscaling, and KubeRay's.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagevar import extras
from stagevar.errors import InfrastructureError, UsageError, did_you_mean
from stagevar.models.request import ModelRequest
from stagevar.profile import Profile
from stagevar.sections import shown
from stagevar.serving.app import Keys, Limits, build_app
from stagevar.serving.server import Serving, load_and_warm, read_keys, require_packages

if TYPE_CHECKING:
    from fastapi import FastAPI

    from stagevar.serving.desk import Desk
    from stagevar.serving.drawing import Loading

Message = MutableMapping[str, object]
#: Seconds between Ray's health checks of a replica.
HEALTH_PERIOD_S = 2.0
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Arguments:
    """What `build` takes, as text or as values: the options of `stagevar serve`, and two more.

    Attributes:
        replicas: how many, unless autoscaling is configured.
        gpus: per replica; 1 by default, 0 with device cpu.
    """

    profile: str | None = None
    model: str | None = None
    compare: bool = False
    device: str = "auto"
    engine: str = "auto"
    batch: int = 0
    threads: int | None = None
    queue: int = 64
    timeout: float = 60.0
    stuck: float = 300.0
    api_key_file: str | None = None
    replicas: int = 1
    gpus: float | None = None

    @classmethod
    def read(cls, given: Mapping[str, object]) -> Arguments:
        """The arguments, checked. Raises UsageError for an unknown one or a value of the wrong type."""
        kinds: dict[str, Callable[[Any], object]] = {
            "compare": _truth,
            **dict.fromkeys(("batch", "threads", "queue", "replicas"), int),
            **dict.fromkeys(("timeout", "stuck", "gpus"), float),
        }
        values: dict[str, object] = {}
        for name, value in given.items():
            if name not in cls.__dataclass_fields__:
                raise UsageError(f"unknown argument {shown(name)}{did_you_mean(name, cls.__dataclass_fields__)}")
            try:
                values[name] = kinds.get(name, str)(value)
            except (TypeError, ValueError, KeyError):
                raise UsageError(f"{name} {shown(value)} has the wrong type; see stagevar serve --help") from None
        arguments = cls(**values)  # type: ignore[arg-type]
        if (arguments.profile is None) == (arguments.model is None):
            raise UsageError("give either profile=FILE or model=NAME")
        return arguments

    def loading(self) -> Loading:
        """What a replica loads. Raises ProfileError for a profile that cannot be read there."""
        from stagevar.serving.drawing import Loading

        profile = None if self.profile is None else Profile.load(self.profile)
        request = ModelRequest(self.model or "") if profile is None else profile.model.request
        request = dataclasses.replace(request, device=self.device)
        return Loading(request, profile, self.compare, self.engine, self.batch, self.threads)

    def keys(self) -> Keys:
        return Keys() if self.api_key_file is None else read_keys(Path(self.api_key_file))


def _truth(value: object) -> bool:
    return value if isinstance(value, bool) else _WORDS[str(value).lower()]


class ReplicaApp:
    """An ASGI application that makes its model where it starts: only its arguments are sent to a replica.

    It has started once the model is warm; Ray sends no request before that.
    """

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self._app: FastAPI | None = None
        self._desk: Desk | None = None

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if self._app is None:
            self._app = self._build()

        async def send_when_ready(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                assert self._desk is not None
                await asyncio.to_thread(self._desk.wait_until_loaded)
                if self._desk.error is not None:
                    message = {"type": "lifespan.startup.failed", "message": str(self._desk.error)}
            await send(message)

        await self._app(scope, receive, send_when_ready if scope["type"] == "lifespan" else send)

    def _build(self) -> FastAPI:
        from stagevar.serving.desk import Desk

        chosen = self.arguments
        self._desk = Desk(lambda: load_and_warm(chosen.loading()), chosen.queue)
        return build_app(self._desk, Limits(timeout_s=chosen.timeout, stuck_s=chosen.stuck), chosen.keys())

    def check_health(self) -> None:
        """Raises InfrastructureError if the replica must be replaced: its device is broken, or a batch hangs."""
        if self._desk is None:
            return
        if self._desk.state == "broken":
            raise InfrastructureError(f"the device is broken: {self._desk.error}")
        if self._desk.drawing_for_s() > self.arguments.stuck:
            raise InfrastructureError(f"one batch has been running for {self._desk.drawing_for_s():.0f} s")


def build(args: Mapping[str, object]) -> Any:
    """The Ray Serve application, for `serve run` and configuration files: a `ray.serve.Application`.

    Args:
        args: see `Arguments`.

    Raises:
        UsageError: before anything is started.
    """
    require_packages()
    extras.require("stagevar.serving.ray_app", "ray")
    try:
        from ray import serve
    except ImportError:
        raise extras.MissingExtra("serving on Ray also needs Ray Serve: pip install 'ray[serve]'") from None
    arguments = Arguments.read(args)
    Serving(queue=arguments.queue)  # its bounds
    gpus = arguments.gpus if arguments.gpus is not None else float(arguments.device != "cpu")

    @serve.deployment(
        name="stagevar",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_gpus": gpus, "num_cpus": 1},
        max_ongoing_requests=arguments.queue,  # they wait at the replica, which draws them together
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=30,
    )
    @serve.ingress(ReplicaApp(arguments))
    class Replica:
        def check_health(self) -> None:
            self.app.check_health()  # type: ignore[attr-defined]

    return Replica.bind()  # type: ignore[attr-defined]
