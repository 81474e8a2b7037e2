"""What is asked of a model. Light data: importing this file imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from stagevar.schedule import StageSchedule


@dataclass(frozen=True)
class ModelRequest:
    """A model and what a user asks of it: made once from a command line, a profile or keywords, resolved by the registry.

    Plain data that travels to other processes; None, and each field's default, mean "not stated".

    Args:
        name: one of `registry.list_models()`.
        weights: None for the public (or shipped) files, fetched when needed; "random" for seeded random weights; else a
            file, a folder of shards, a folder with the public files, or a converted folder.
        tokenizer: a tokenizer file instead of the one that belongs to the model.
        text: a text encoder's folder instead of the one that belongs to the model.
        resolution: one of the model's, or an image side in pixels.
        ratio: height / width, snapped to a template; None for 1.
        device: "auto", "cpu", "cuda[:N]".
        dtype: of the transformer blocks and the tokenizer; None for bfloat16 on a GPU, float32 on the CPU.
        seed: of random weights.
        guidance: instead of the model's defaults; a number or one per scale.
        temperature: as guidance.
        batch: images per pass, for the memory check.
        kv_cache: "model", keys and values in the blocks' precision, or "int8", about half of bfloat16; None for "model".
        schedule: the only one that will run, also for the memory check; None for any.
    """

    name: str
    weights: str | Path | None = None
    tokenizer: str | Path | None = None
    text: str | Path | None = None
    resolution: str | int | None = None
    ratio: float | None = None
    device: str | torch.device = "auto"
    dtype: str | torch.dtype | None = None
    seed: int = 0
    guidance: float | Sequence[float] | None = None
    temperature: float | Sequence[float] | None = None
    batch: int = 1
    kv_cache: str | None = None
    schedule: StageSchedule | None = None

    def over(self, other: ModelRequest) -> ModelRequest:
        """What this request states, and what the other one states for the rest."""
        stated = {
            field.name: value
            for field in dataclasses.fields(self)
            # Types first: numpy's arrays compare entry by entry.
            if type(value := getattr(self, field.name)) is not type(field.default) or value != field.default
        }
        return dataclasses.replace(other, **stated)


@dataclass(frozen=True)
class LoadRequest:
    """A model and everything asked of it, checked and resolved: what a builder gets.

    Attributes:
        weights: None for the public files, "random", or a path.
        tokenizer, text: paths, instead of what belongs to the model.
        batch, schedule: images per pass and what will run, for the memory check.
        kv_cache: as in `ModelRequest`.
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
