"""What is asked of a model. Light data: importing this file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from stagevar.schedule import StageSchedule


@dataclass(frozen=True)
class LoadRequest:
    """A model and everything asked of it, resolved: what a builder gets.

    weights: None (public files), "random", or a path. tokenizer, text: paths instead of what belongs to the model.
    batch, schedule: images per pass and what will run, for the memory check. kv_cache: see `load_model`.
    """

    spec: ModelSpec
    resolution: str
    ratio: float
    device: torch.device
    dtype: torch.dtype
    weights: str | None = None
    tokenizer: Path | None = None
    text: Path | None = None
    seed: int = 0
    guidance: float | tuple[float, ...] | None = None
    temperature: float | tuple[float, ...] | None = None
    batch: int = 1
    kv_cache: str = "model"
    schedule: StageSchedule | None = None

    @property
    def random(self) -> bool:
        return self.weights == "random"
