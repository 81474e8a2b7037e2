"""What a study needs to know about schedules: the interface of evaluators, and a description of one. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stagevar.profile.sections import EngineSection
from stagevar.schedule import Steps
from stagevar.schedule.grids import Grid

if TYPE_CHECKING:
    from stagevar.timing import Timing

Values = dict[str, np.ndarray]
WITH_TEXT = "text encoding, all scales and decoding of one image (batch 1)"
WITHOUT_TEXT = "all scales and decoding of one image (batch 1), its text features made before"


@dataclass(frozen=True)
class EvaluationInfo:
    """What is being tuned, for records and for refusing to resume on something else.

    Attributes:
        model: name.
        grids, chunks, pixels: of the model.
        device: name, kind, threads, dtype.
        engine: how steps run, the one that deployment uses.
        engine_choice: why that one.
        heldout_engine: what draws held-out images.
        includes: what a latency figure covers.
        sampling: guidance and temperature.
        provenance: the weights' hashes and the like.
        higher_is_better: per metric.
        refused: precisions of products that the device cannot run, each with the reason.
    """

    model: str
    grids: tuple[Grid, ...]
    chunks: int
    pixels: tuple[int, int]
    device: dict[str, object]
    engine: str = "eager"
    heldout_engine: str = "eager"
    includes: str = WITH_TEXT
    random_weights: bool = False
    sampling: dict[str, object] = field(default_factory=dict)
    provenance: dict[str, object] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    engine_choice: EngineSection | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


class Evaluator(ABC):
    """What a study needs to know about schedules; tests use fakes.

    Every evaluator provides quality, latency and images. The other methods explain or save work, and may return None.
    """

    facts: EvaluationInfo

    @abstractmethod
    def quality(self, schedules: Sequence[Steps], split: str, batch: int) -> list[Values]:
        """Per schedule: value per metric and "quality", one per prompt of that micro-batch."""

    @abstractmethod
    def latency(self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int = 12) -> Mapping[str, Timing]:
        """Round-robin timings of whole images, batch 1, warmed per schedule."""

    @abstractmethod
    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        """Images (B, H, W, 3) uint8 of one micro-batch."""

    def step_ms(self, schedules: Sequence[Steps], rounds: int = 3) -> Mapping[Steps, tuple[float, ...]] | None:
        """Milliseconds of the last scale of each distinct prefix for one image, a sample per round.

        The empty prefix holds text encoding, start and decoding. A table of step costs is built from this.
        """
        return None

    def scale_ms(self, schedules: Mapping[str, Steps], rounds: int = 5) -> Mapping[str, tuple[float, ...]] | None:
        """Median milliseconds per scale, to explain a latency."""
        return None

    @property
    def scales_run(self) -> int | None:
        """Number of scales run so far by walks over trees of schedules."""
        return None

    @property
    def scales_alone(self) -> int | None:
        """Number of scales that running each of those schedules alone would have taken."""
        return None
