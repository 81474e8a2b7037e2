"""The model behind the desk: the schedules and sizes that are served, drawn batch by batch with the time of every scale."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from stagevar.device_faults import free_unused, told_apart
from stagevar.engine import TEXT_BUCKET, fell_back_because
from stagevar.errors import OutOfDeviceMemory
from stagevar.models.base import LoadedModel, Sampling
from stagevar.models.registry import find, load_model, resolution_of
from stagevar.models.request import ModelRequest
from stagevar.models.text_encoder import LazyEncoder
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.profile.engine_choice import engine_for
from stagevar.profile.pipeline import warm_sampler
from stagevar.sampling.bench import bench_prompts
from stagevar.sampling.generation import Generation
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import ScaleStep, StageSchedule, Steps, exact
from stagevar.schedule.grids import INFINITY_GRIDS
from stagevar.sections import shortened
from stagevar.serving.asking import Offer
from stagevar.serving.desk import Drawn, Order
from stagevar.timing import threads_of

logger = logging.getLogger("stagevar.serving")
#: Sizes whose caches and recordings are kept at once; the least recently used one is freed for another.
SIZES_KEPT = 2
#: Lengths of text, in multiples of TEXT_BUCKET tokens, that graphs are recorded for before the server is ready.
WARM_BUCKETS = 4
#: Texts whose features are kept, in memory: at most 4 MB each for T5's longest, usually a tenth of a megabyte.
TEXTS_KEPT = 64


@dataclass(frozen=True)
class Served:
    """One served id: a schedule, and what is known about it.

    Attributes:
        schedule_hash: of the steps at the first size.
        verdict: the profile's sentence, or why there is none.
        differences: between this process and where the profile was measured, one phrase each.
    """

    id: str
    schedule: StageSchedule
    schedule_hash: str
    verdict: str
    verified: bool
    differences: tuple[str, ...] = ()


def schedule_hash(steps: Steps) -> str:
    """SHA-256 of a schedule's decided steps: equal schedules have equal hashes, whatever their parameters are called."""
    data = json.dumps(steps_to_data(steps), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(data.encode()).hexdigest()


class TimedSampler(Sampler):
    """A sampler that notes where the time of its last generation went, without waiting for the device in between."""

    def __init__(self, model: LoadedModel, engine: str):
        super().__init__(model, engine=engine)
        self._spans: list[tuple[str | int, Any, Any]] = []

    def begin(self, *args: Any, **options: Any) -> Generation:
        self._spans, before = [], self._now()
        generation = super().begin(*args, **options)
        self._spans.append(("text", before, self._now()))
        return generation

    def advance(self, generation: Generation, step: ScaleStep) -> None:
        before = self._now()
        super().advance(generation, step)
        if not step.skipped:
            self._spans.append((step.scale, before, self._now()))

    def decode(self, generation: Generation) -> np.ndarray:
        before = self._now()
        images = super().decode(generation)
        self._spans.append(("decode", before, self._now()))
        return images

    def _now(self) -> Any:
        if self.model.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.model.device))
        return event

    def spent_ms(self) -> tuple[float, tuple[float, ...], float]:
        """Milliseconds of the text, of every scale (0 where skipped), and of decoding; call it after the images are decoded.

        Where a schedule decides on the way, a later figure is the sum over the parts that the batch fell into.
        """
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        spent: dict[str | int, float] = {}
        for what, before, after in self._spans:
            ms = before.elapsed_time(after) if hasattr(before, "elapsed_time") else (after - before) * 1e3
            spent[what] = spent.get(what, 0.0) + ms
        scales = tuple(spent.get(scale, 0.0) for scale in range(len(self.model.grids)))
        return spent.get("text", 0.0), scales, spent.get("decode", 0.0)


@dataclass
class ModelArtist:
    """Draws with a loaded model. Made by `load_artist`.

    Attributes:
        served: ids with their schedules, the default first.
        sizes: (width, height) -> what makes the model at that size, the loaded one first.
        batch: most images at once.
        threads: CPU threads while drawing.
        engine: its name.
        fell_back: why the engine no longer does what its name says; None while it does.
    """

    model: LoadedModel
    served: tuple[Served, ...]
    sizes: Mapping[tuple[int, int], Callable[[], LoadedModel]]
    batch: int
    threads: int | None
    engine: str
    fell_back: str | None = None
    _models: dict[tuple[int, int], LoadedModel] = field(default_factory=dict, repr=False)
    _samplers: dict[tuple[str, tuple[int, int]], tuple[TimedSampler, Steps]] = field(default_factory=dict, repr=False)

    @property
    def offer(self) -> Offer:
        """What can be asked."""
        guidance = self.guidance if self.records else None
        negated = find(self.model.name).family != "var"
        return Offer(tuple(one.id for one in self.served), tuple(self.sizes), guidance, negated)

    @property
    def guidance(self) -> float:
        """The model's own guidance scale, at its highest."""
        return max(self.model.sampling.guidance)

    @property
    def records(self) -> bool:
        """Whether the engine records graphs, which are of one batch size and one guidance."""
        return self.engine.startswith("graph")

    def draw(self, orders: Sequence[Order]) -> list[Drawn]:
        """See `stagevar.serving.desk.Artist`."""
        try:
            with told_apart(self.model.device, f"drawing {len(orders)} images at once"):
                return self._draw(orders)
        except OutOfDeviceMemory as error:
            shortage = str(error)
        self.release()  # outside of `except`, whose error holds what was being drawn
        raise OutOfDeviceMemory(shortage)

    def _draw(self, orders: Sequence[Order]) -> list[Drawn]:
        shape = orders[0].shape
        sampler, steps = self._sampler(shape.model, shape.size)
        # Recordings are of one image or of the whole batch; what is drawn to fill up is thrown away.
        missing = self.batch - len(orders) if self.records and len(orders) > 1 else 0
        rows = [*orders, *[orders[-1]] * missing]
        negative = [order.negative or "" for order in rows] if shape.negated else None
        sampling = None
        if shape.guidance is not None and shape.guidance != self.guidance:
            sampling = guided(sampler.model.sampling, shape.guidance)
        with (
            threads_of(self.threads if self.model.device.type == "cpu" else None),
            warnings.catch_warnings(action="ignore", category=UserWarning),  # text encoders quote the prompt
        ):
            prompts, seeds = [order.prompt for order in rows], [order.seed for order in rows]
            images = sampler.generate(prompts, seeds, steps, negative=negative, sampling=sampling)
        self._watch(sampler, shape.size)
        text_ms, scale_ms, decode_ms = sampler.spent_ms()
        # Copies, because an engine may draw into one buffer.
        return [Drawn(image.copy(), text_ms, scale_ms, decode_ms, len(orders)) for image in images[: len(orders)]]

    def _sampler(self, model_id: str, size: tuple[int, int]) -> tuple[TimedSampler, Steps]:
        """The sampler of an id at a size and the steps that it runs; the least recently used one makes room."""
        key = (model_id, size)
        if key not in self._samplers:
            while len(self._samplers) >= SIZES_KEPT * len(self.served):
                self._samplers.pop(next(iter(self._samplers)))[0].release()
            if size not in self._models:
                self._models[size] = self.sizes[size]()
            model = self._models[size]
            schedule = next(one.schedule for one in self.served if one.id == model_id)
            steps = schedule.expand(model.grids, len(model.transformer.chunk_layers))
            self._samplers[key] = TimedSampler(model, self.engine), steps
        self._samplers[key] = self._samplers.pop(key)  # the last one used stands last
        return self._samplers[key]

    def warm(self) -> None:
        """Draws one image and one full batch of every id at the first size, for the usual lengths of text."""
        size = next(iter(self.sizes))
        lengths = [TEXT_BUCKET * bucket for bucket in range(1, WARM_BUCKETS + 1)] if self.records else [TEXT_BUCKET]
        for one in self.served:
            sampler, steps = self._sampler(one.id, size)
            with (
                told_apart(self.model.device, "warming up"),
                threads_of(self.threads if self.model.device.type == "cpu" else None),
            ):
                warm_sampler(sampler, steps, lengths, sorted({1, self.batch}))
            self._watch(sampler, size)

    def _watch(self, sampler: Sampler, size: tuple[int, int]) -> None:
        """Says once, in the log and in what is served, that the engine fell back.

        Only at the first size: the others are outside of any profile, and each records graphs of its own.
        """
        why = None if self.fell_back or size != next(iter(self.sizes)) else fell_back_because(sampler.engine)
        if why is None:
            return
        self.fell_back = shortened(why)
        difference = f"engine {self.engine} fell back: {self.fell_back}"
        logger.warning("%s; no verdict covers what it draws: mend the cause or choose another --engine", difference)
        self.served = tuple(dataclasses.replace(one, differences=(*one.differences, difference)) for one in self.served)

    def release(self) -> None:
        """Frees caches and recordings; the next images make them again."""
        for sampler, _ in self._samplers.values():
            sampler.release()
        free_unused(self.model.device)


def guided(sampling: Sampling, guidance: float) -> Sampling:
    """The sampling with another guidance scale; values that rise over the scales are stretched, so that 1 stays off."""
    top = max(sampling.guidance)
    if top == 1:
        return dataclasses.replace(sampling, guidance=(guidance,) * len(sampling.guidance))
    values = tuple(1 + (value - 1) * (guidance - 1) / (top - 1) for value in sampling.guidance)
    return dataclasses.replace(sampling, guidance=values)


# ------------------------------------------------------------------------------------------------ loading


@dataclass(frozen=True)
class Loading:
    """What is loaded, and how it runs.

    Args:
        request: the model, with the profile's options where there is a profile.
        profile: whose schedule is served; None serves the full one.
        compare: also serve the full schedule.
        engine: instead of the profile's, which "auto" takes.
        batch: images per run instead of the profile's; 0 takes it.
        threads: CPU threads instead of the profile's.
    """

    request: ModelRequest
    profile: Profile | None = None
    compare: bool = False
    engine: str = "auto"
    batch: int = 0
    threads: int | None = None


def load_artist(loading: Loading) -> ModelArtist:
    """Loads the model and determines what is served; call `ModelArtist.warm` next.

    Warns:
        UserWarning: once for each difference from where the profile was measured.

    Raises:
        UsageError, ProfileError, WeightsError: as `Profile.pipeline` and `load_model` do.
    """
    profile = loading.profile
    if profile is None:
        model = load_model(loading.request, batch=loading.batch or 1)
        batch, threads = loading.batch or 1, loading.threads
        engine = _engine(loading.engine, model)
        served = [full_schedule(model)]
    else:
        pipeline = profile.pipeline_of(
            loading.request, engine=loading.engine, batch=loading.batch, threads=loading.threads
        )
        model, batch, threads = pipeline.sampler.model, pipeline.batch, pipeline.threads
        engine = pipeline.sampler.engine.name
        present = present_envelope(model, batch=batch, threads=threads, engine=engine)
        digest = schedule_hash(pipeline.steps)
        served = [
            Served(
                f"{model.name}-{digest[:8]}",
                profile.schedule,
                digest,
                profile.verdict,
                profile.verified,
                tuple(profile.differences(model, present)),
            )
        ]
        if loading.compare:
            served.append(full_schedule(model))
    if isinstance(model.text, LazyEncoder):
        model.text.keep_recent(TEXTS_KEPT)  # users' prompts have no end, and the disk cache forgets none
    sizes = {size_of(model): lambda: model, **_templates(model, loading.request.resolution)}
    return ModelArtist(model, tuple(served), sizes, batch, threads, engine)


def full_schedule(model: LoadedModel) -> Served:
    """The schedule that leaves nothing out."""
    schedule = exact(len(model.grids))
    steps = schedule.expand(model.grids, len(model.transformer.chunk_layers))
    return Served(f"{model.name}-full", schedule, schedule_hash(steps), "full schedule, nothing is accelerated", False)


def size_of(model: LoadedModel) -> tuple[int, int]:
    """(width, height) in pixels."""
    height, width = model.pixels
    return width, height


def _engine(asked: str, model: LoadedModel) -> str:
    steps = exact(len(model.grids)).expand(model.grids, len(model.transformer.chunk_layers))
    return engine_for(asked, model, steps, bench_prompts(model, 2), [0, 1]).name


def _templates(model: LoadedModel, resolution: str | int | None) -> dict[tuple[int, int], Callable[[], LoadedModel]]:
    """The model at Infinity's other ratios of this resolution; weights are shared. Empty for other families."""
    if find(model.name).family != "infinity":
        return {}
    from stagevar.models.infinity.loader import at_ratio, pixels_at

    chosen = resolution_of(model.name, resolution)
    made: dict[tuple[int, int], Callable[[], LoadedModel]] = {}
    for ratio in sorted(INFINITY_GRIDS):
        height, width = pixels_at(chosen, ratio)
        if (height, width) != model.pixels:
            made[width, height] = partial(at_ratio, model, chosen, ratio)
    return made
