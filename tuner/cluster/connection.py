"""The door to Ray: whether it is installed, and how this process joins a cluster or starts one.

The only module that imports ray, and only inside functions: everything else works without it.
"""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

from stagevar import extras
from stagevar.errors import UsageError, first_line


def check_installed() -> None:
    """Raises UsageError naming the extra if ray is missing; imports nothing."""
    extras.require("running on a cluster", "ray")


def require(name: str = "ray") -> Any:
    """The module `ray`, or a part such as "ray.tune". Raises UsageError naming the extra if it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # they import torch to write files nobody reads
    check_installed()
    try:
        import ray

        return ray if name == "ray" else importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({error}); pip install 'stagevar-tune[ray]'") from None


def connect(address: str | None = None) -> Callable[[], None]:
    """Joins the cluster at `address` ("auto": this machine's), or starts one here that only this machine can reach.

    Returns a function that disconnects; it does nothing if this process was already connected. Raises UsageError.
    """
    if address is None and "ray" not in sys.modules:
        # Read when ray is imported. The first keeps it on the loopback, which it otherwise maps to the network's address;
        # the others keep other users of this machine out, with a token that nobody else learns.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = require()
    if ray.is_initialized():
        return lambda: None
    options: dict[str, object] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UsageError(f"no Ray cluster at {address!r} ({first_line(error)}); start one: docs/cluster.md") from None
    return ray.shutdown
