"""Engines by name."""

from __future__ import annotations

import torch

from stagevar.choices import ENGINES, check_engine
from stagevar.engine.base import EagerEngine, Engine
from stagevar.engine.graph import GraphEngine
from stagevar.engine.recorder import CudaRecorder, Recorder
from stagevar.errors import UsageError


def fell_back_because(engine: Engine) -> str | None:
    """Why an engine no longer does what its name says, None while it does; its figures would be another engine's."""
    why = engine.fallback_reason
    if why is None and engine.compiled:
        from stagevar.models import fused

        why = fused.plain_because()
    return why


def build_engine(name: str, device: torch.device, recorder: Recorder | None = None) -> Engine:
    """An engine by name.

    Args:
        name: one of ENGINES.
        recorder: used instead of CUDA graphs.

    Raises:
        UsageError: for an unknown name, or where graphs cannot be recorded.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; use {', '.join(ENGINES)}")
    check_engine(name, device.type)
    compiled = name.endswith("compiled")
    if name == "graph-kernels":
        return _with_kernels(GraphEngine(recorder or CudaRecorder(device), compiled=True))
    if name.startswith("graph"):
        return GraphEngine(recorder or CudaRecorder(device), compiled=compiled)
    return EagerEngine(compiled)


def _with_kernels(engine: GraphEngine) -> GraphEngine:
    """The engine with Triton kernels. Raises UsageError if they cannot run."""
    from stagevar.engine import decoder_kernels, kernels

    why = kernels.available()
    if why is not None:
        raise UsageError(f"engine graph-kernels cannot run here: {why}; use --engine graph-compiled")
    engine.name, engine.chained, engine.draws = "graph-kernels", kernels.chained(), kernels.draws()
    engine.swished = decoder_kernels.swished_norm()
    return engine
