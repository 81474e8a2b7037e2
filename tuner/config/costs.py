"""What a study will take, estimated before anything is loaded: settings of the space, images, files to fetch, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from stagevar.models.downloads import Download, model_downloads
from stagevar.models.request import ModelRequest
from tuner.metrics.downloads import metric_downloads
from tuner.metrics.quality_spec import QualitySpec

#: The most schedules that are verified: the best ones with skipped scales, and as many without.
FINALISTS_PER_KIND = 3


def images_at_most(trials: int, search: int, heldout: int) -> int:
    """Images drawn for quality if no schedule is pruned and none shares scales with another."""
    return (1 + trials) * search + (1 + 2 * FINALISTS_PER_KIND) * heldout


def drawing_line(trials: int, search: int, heldout: int, full_ms: float) -> str:
    """An upper limit of the drawing time, from the first timing; batches and shared scales reduce it."""
    images = images_at_most(trials, search, heldout)
    hours = images * full_ms / 3.6e6
    drawing = f"at most {images:,} images of {full_ms:,.0f} ms: {hours:.1f} hours of drawing"
    return f"{drawing}, sensitivities and metrics not counted"


def downloads_of(model: ModelRequest, quality: Mapping[str, QualitySpec]) -> list[Download]:
    """Files of a model and of a space's metrics. Imports torch, loads nothing."""
    from stagevar.models.registry import resolve

    request = resolve(model)
    return [*model_downloads(request), *([] if request.random else metric_downloads(quality))]


@dataclass(frozen=True)
class MemoryPlan:
    """The most bytes that one image and a micro-batch need, and what the device has, None if unknown."""

    device: str
    one_image_bytes: int
    micro_batch_bytes: int
    free_bytes: int | None
    fits: bool | None

    @property
    def line(self) -> str:
        """In words."""
        gib = 2**30
        needs = (
            f"{self.one_image_bytes / gib:.1f} GiB for one image, {self.micro_batch_bytes / gib:.1f} for a micro-batch"
        )
        if self.free_bytes is None:
            return f"{needs} on {self.device}"
        fits = "" if self.fits else ": it does not fit"
        return f"{needs} on {self.device}, {self.free_bytes / gib:.1f} GiB are free{fits}"


def memory_plan(model: ModelRequest, micro_batch: int) -> MemoryPlan | None:
    """The memory that a study needs; None for a model that fits anywhere."""
    from stagevar.models.memory import available_bytes, estimate_model
    from stagevar.models.registry import resolve

    request = resolve(model)
    if not request.spec.parts:
        return None
    one = estimate_model(model)
    batch = estimate_model(dataclasses.replace(model, batch=micro_batch))
    least = max(one.generating, one.encoding)
    free = available_bytes(request.device)
    return MemoryPlan(str(request.device), least, batch.peak, free, None if free is None else least <= free)
