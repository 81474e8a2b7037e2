"""What options accept, checked before anything is loaded and without importing what they stand for."""

from __future__ import annotations

import os
from pathlib import Path

from stagevar.errors import UsageError

#: How steps reach the device: kernels launched one by one or replayed from graphs; the pieces between products as they are,
#: compiled, or Triton kernels.
ENGINES = ("eager", "compiled", "graph", "graph-compiled", "graph-kernels")
#: What --engine accepts: an engine, or the fastest one that draws the same images here (stagevar.profile.engine_choice).
ENGINE_OPTIONS = ("auto", *ENGINES)


def check_engine(name: str, device: str) -> None:
    """Raises UsageError for an unknown engine, or one that a kind of device ("cpu", "cuda") cannot run."""
    if name not in ENGINE_OPTIONS:
        raise UsageError(f"unknown engine {name!r}; use {', '.join(ENGINE_OPTIONS)}")
    if name.startswith("graph") and device != "cuda":
        raise UsageError(f"engine {name} needs a CUDA device, not {device}; use --engine eager")


def processors() -> list[int]:
    """Numbers of the processors that this process may use, empty if the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def check_threads(threads: int, device: str = "cpu") -> None:
    """Raises UsageError for more CPU threads than this process may use; a GPU's figures do not depend on them."""
    available = len(processors())
    if device == "cpu" and (threads < 1 or (available and threads > available)):
        raise UsageError(f"threads {threads} must be between 1 and the {available} processors this process may use")


def check_weights(
    weights: str | Path | None, tokenizer: str | Path | None = None, text: str | Path | None = None
) -> None:
    """Raises UsageError for paths without weights; "random" and None need no path."""
    for option, given in (("weights", weights), ("tokenizer", tokenizer), ("text", text)):
        if given is None or (option == "weights" and given == "random"):
            continue
        try:
            os.stat(given)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            other = ", or 'random'" if option == "weights" else ""
            raise UsageError(
                f"no {option} at {given!s:.200}: {reason}; give a file or folder that exists{other}"
            ) from None
