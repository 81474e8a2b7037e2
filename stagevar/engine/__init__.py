"""How computations reach the device: engines, recorders of graphs, and the kernels that a card runs."""

from stagevar.choices import ENGINES
from stagevar.engine.base import EagerEngine, Engine, Start
from stagevar.engine.build import build_engine, fell_back_because
from stagevar.engine.graph import TEXT_BUCKET, GraphEngine
from stagevar.engine.recorder import CudaRecorder, Recorder, RecordingFailed, StaticBuffers, first_cause

__all__ = [
    "ENGINES",
    "TEXT_BUCKET",
    "CudaRecorder",
    "EagerEngine",
    "Engine",
    "GraphEngine",
    "Recorder",
    "RecordingFailed",
    "Start",
    "StaticBuffers",
    "build_engine",
    "fell_back_because",
    "first_cause",
]
