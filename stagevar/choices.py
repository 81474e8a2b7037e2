"""Names that options accept, without importing what they stand for."""

from __future__ import annotations

#: How steps reach the device: kernels launched one by one or replayed from graphs, the pieces between products compiled or not.
ENGINES = ("eager", "compiled", "graph", "graph-compiled")
#: What --engine accepts: an engine, or the fastest one that draws the same images here (stagevar.engine_choice).
ENGINE_OPTIONS = ("auto", *ENGINES)
