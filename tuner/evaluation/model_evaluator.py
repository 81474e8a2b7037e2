"""Evaluates schedules on a loaded model: quality by a walk over the tree of their steps, latency by timing whole images.

Importing this module imports no torch; building a ModelEvaluator does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stagevar.errors import OutOfDeviceMemory
from stagevar.models.request import ModelRequest
from stagevar.profile.sections import EngineSection
from stagevar.schedule import PRECISIONS, ScaleStep, Steps, exact
from tuner.config.prompts import PromptSet
from tuner.evaluation.evaluator import WITH_TEXT, WITHOUT_TEXT, EvaluationInfo, Evaluator, Values
from tuner.evaluation.prefix_tree import walk
from tuner.evaluation.schedule_timer import ScheduleTimer, pinned_on

if TYPE_CHECKING:
    from stagevar.models.base import LoadedModel
    from stagevar.sampling.generation import Generation
    from stagevar.sampling.sampler import Sampler
    from stagevar.timing import Timing
    from tuner.metrics.base import Metric
    from tuner.metrics.quality_spec import QualitySpec
    from tuner.metrics.registry import CompositeQuality


def fitting_micro_batch(model: ModelRequest, wanted: int, quality: Mapping[str, QualitySpec]) -> int:
    """Images per batch for a study: `wanted`, halved until a batch fits on the device beside the metrics' models.

    The models of `quality`, metrics as in the search space, stay on the device throughout; random weights have none. The
    result follows from the device's total memory, not from what is free, so that the same command gives the same study.
    """
    from stagevar.models.memory import largest_batch, total_bytes
    from stagevar.models.memory_plan import CARD_SHARE
    from stagevar.models.registry import resolve
    from tuner.metrics.downloads import metric_downloads

    request = resolve(model)
    total = total_bytes(request.device)
    if total is None or not request.spec.parts:  # nano fits anywhere
        return wanted
    judged = {} if request.random else quality
    metrics_bytes = sum(download.about_bytes or 0 for download in metric_downloads(judged))
    return largest_batch(model, wanted, int(CARD_SHARE * total) - metrics_bytes)


def load_evaluator(
    model: ModelRequest,
    prompts: Mapping[str, PromptSet],
    quality: Mapping[str, QualitySpec],
    floors: Mapping[str, float],
    **options: Any,
) -> ModelEvaluator:
    """Loads a model and the metrics that a study evaluates with, in its own process or in a cluster's workers.

    Takes the arguments of `ModelEvaluator`, its options by keyword.
    """
    from stagevar.models import registry
    from stagevar.models.text_encoder import LazyEncoder

    loaded = registry.load_model(model)
    if isinstance(loaded.text, LazyEncoder):
        # A large text encoder is loaded once; its features stay on disk, and it is freed before the model needs memory.
        loaded.text.prepare([text for part in prompts.values() for text in part.texts])
    return ModelEvaluator(loaded, prompts, quality, floors, **options)


class ModelEvaluator(Evaluator):
    """Evaluates on a loaded model, in this process.

    Args:
        model: what `load_model` returned.
        prompts: "search" and "heldout" sets.
        quality: metrics of the composite; ignored for random weights.
        floors: further metrics to compute.
        threads: CPU threads of every latency, pinned while timing.
        drawing_threads: CPU threads that draw and judge images, `threads` if None; they do not change the images.
        engine: what latency is timed on (stagevar.engine); "auto" chooses one here (stagevar.profile.engine_choice), and an
            earlier choice is kept. Search images are drawn eagerly: a prefix that is run once is not worth recording, and
            if other kernels round differently, images drift equally for a schedule and the full one that it is paired with.
            Held-out images are drawn as they will be served, on this engine and one at a time, so that a verdict is about
            exactly those images; the eager engine draws the same ones in any batch.
        references_dir: where the full schedule's images are kept between batches; in memory if None.
        keep_bytes: memory for the full schedule's scales on the search prompts, from which later walks start; None takes a
            quarter of the free memory, 0 keeps nothing.

    Attributes:
        scales_run: scales run by the walks.
        scales_alone: scales that running each schedule alone would have taken.
        rows_at_once: images of a micro-batch that are drawn together, fewer once memory ran out; None for all of them.

    If memory runs out, methods free what they hold and try again in smaller parts: fewer images, fewer schedules timed in
    turn. They raise OutOfDeviceMemory if even the smallest part does not fit, and DeviceBroken if no kernel runs in this
    process any more; neither is a schedule's fault.
    """

    scales_run: int = 0
    scales_alone: int = 0

    def __init__(
        self,
        model: LoadedModel,
        prompts: Mapping[str, PromptSet],
        quality: Mapping[str, QualitySpec],
        floors: Mapping[str, float] | None = None,
        *,
        threads: int = 1,
        drawing_threads: int | None = None,
        engine: str | EngineSection = "eager",
        references_dir: Path | None = None,
        keep_bytes: int | None = None,
    ):
        import torch

        from stagevar.engine import build_engine
        from stagevar.models.text_encoder import LazyEncoder
        from stagevar.sampling.sampler import Sampler

        if isinstance(engine, str) and engine != "auto":
            build_engine(engine, model.device)  # rejected before anything is measured
        self.model, self.prompts, self.threads, self.references_dir = model, prompts, threads, references_dir
        self.drawing_threads = None if model.device.type == "cuda" else drawing_threads
        self.sampler = Sampler(model)
        if model.device.type == "cpu":
            torch.set_num_threads(threads)
        self.composite: CompositeQuality | None = None
        self.extra: dict[str, Metric] = {}
        directions: dict[str, bool] = {}
        if not model.random_weights:
            from tuner.metrics.registry import create, create_composite

            self.composite = create_composite(quality, device=str(model.device))
            self.extra = {n: create(n, device=str(model.device)) for n in floors or {} if n not in quality}
            metrics = {**{name: metric for name, (_, metric) in self.composite.parts.items()}, **self.extra}
            directions = {name: metric.higher_is_better for name, metric in metrics.items()}
            texts = [text for prompt_set in prompts.values() for text in prompt_set.texts]
            for name, metric in metrics.items():
                for remark in metric.remarks(texts) if metric.needs_prompt else ():
                    warnings.warn(f"{name}: {remark}")
        self.keep_bytes = keep_bytes
        self.rows_at_once: int | None = None
        self._kept: dict[int, Generation] = {}
        self._serving: Sampler | None = None
        self._encoded: dict[tuple[str, int, int, int], Any] = {}
        self._references: dict[tuple[str, int], np.ndarray] = {}
        self.full = exact(len(model.grids)).expand(model.grids, self.sampler.chunks)
        choice = engine if isinstance(engine, EngineSection) else self._choose_engine(engine)
        self.engine = choice.name
        first = prompts["search"]
        self.timer = ScheduleTimer(model, first.texts[0], first.seeds[0], self.engine, threads)
        cuda = model.device.type == "cuda"
        self.facts = EvaluationInfo(
            model.name,
            tuple(model.grids),
            self.sampler.chunks,
            model.pixels,
            {
                "name": torch.cuda.get_device_name(model.device) if cuda else "cpu",
                "kind": model.device.type,
                "threads": None if cuda else threads,
                "dtype": str(model.dtype).removeprefix("torch."),
                "torch": torch.__version__,
            },
            engine=self.engine,
            heldout_engine=self.engine,
            engine_choice=choice,
            includes=WITHOUT_TEXT if isinstance(model.text, LazyEncoder) else WITH_TEXT,
            random_weights=model.random_weights,
            sampling={
                "guidance": list(model.sampling.guidance),
                "temperature": list(model.sampling.temperature),
                "top_k": model.sampling.top_k,
                "top_p": model.sampling.top_p,
            },
            provenance=dict(model.provenance),
            higher_is_better=directions,
            refused=self._refused() if cuda else {},
        )

    def _refused(self) -> dict[str, str]:
        from stagevar.models.precision import refused_because

        found = {name: refused_because(name, self.model.device) for name in PRECISIONS if name != "model"}
        return {name: why for name, why in found.items() if why is not None}

    def _choose_engine(self, asked: str) -> EngineSection:
        """Chooses an engine on the full schedule and two search prompts, if that needs measuring."""
        from stagevar.profile.engine_choice import engine_for

        prompts = self.prompts["search"]
        with pinned_on(self.model.device, self.threads):
            return engine_for(asked, self.model, self.full, prompts.texts, prompts.seeds)

    # ------------------------------------------------------------------------------------------------ quality

    def quality(self, schedules: Sequence[Steps], split: str, batch: int) -> list[Values]:
        """See `Evaluator`. Raises RuntimeError for random weights: they draw noise that no metric should judge."""
        if self.composite is None:
            raise RuntimeError(f"{self.model.name} has random weights: there is no quality to measure")
        reference = self._reference(split, batch) if self._needs_reference else None
        parts = self._in_parts(split, batch, lambda rows: self._quality(schedules, split, batch, rows, reference))
        self.scales_alone += sum(not step.skipped for steps in schedules for step in steps)
        return [
            {metric: np.concatenate([part[index][metric] for part in parts]) for metric in parts[0][index]}
            for index in range(len(schedules))
        ]

    def _quality(
        self, schedules: Sequence[Steps], split: str, batch: int, rows: slice, reference: np.ndarray | None
    ) -> list[Values]:
        """Values of some of a micro-batch's images, per schedule."""
        composite = self.composite
        assert composite is not None  # `quality` has made sure of it
        everything, _ = self.prompts[split].batch(batch)
        prompts, mine = everything[rows], None if reference is None else reference[rows]
        found: dict[int, Values] = {}

        def score(indices: list[int], images: np.ndarray) -> None:
            values = composite.score_parts(images, prompts, mine)
            values |= {name: metric.score(images, prompts, mine) for name, metric in self.extra.items()}
            values["quality"] = np.asarray(composite.combine(values))
            found.update(dict.fromkeys(indices, values))

        sampler = self._drawing(split)
        advance = self._advance(batch) if split == "search" and len(prompts) == len(everything) else None
        generation = self._begin(sampler, split, batch, rows, schedules)
        self.scales_run += walk(sampler, generation, schedules, score, advance)
        self.timer.check_engine(sampler)
        return [found[index] for index in range(len(schedules))]

    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        def part(rows: slice) -> np.ndarray:
            found: list[np.ndarray] = []
            sampler = self._drawing(split)
            generation = self._begin(sampler, split, batch, rows, [steps])
            walk(sampler, generation, [steps], lambda _, images: found.append(images.copy()))
            self.timer.check_engine(sampler)
            return found[0]

        return np.concatenate(self._in_parts(split, batch, part))

    def _drawing(self, split: str) -> Sampler:
        """The sampler that draws a set of prompts: held-out images come from the engine that serves."""
        if split == "heldout" and self.engine != "eager":
            if self._serving is None:
                self.sampler.release()
                self._serving = self.timer.new_sampler()
            return self._serving
        self._end_serving()
        return self.sampler

    def _release(self) -> None:
        """Frees the caches used for drawing; they are created again when needed."""
        self.sampler.release()
        self._end_serving()

    def _end_serving(self) -> None:
        if self._serving is not None:
            self._serving.release()
            self._serving = None

    def _in_parts(self, split: str, batch: int, run: Callable[[slice], Any]) -> list[Any]:
        """Calls `run` on the rows of a micro-batch, all at once or, in order, in parts that fit."""
        from stagevar.device_faults import free_unused, told_apart
        from stagevar.timing import threads_of

        count, done, found = len(self.prompts[split].batch(batch)[0]), 0, []
        while done < count:
            most = 1 if self._drawing(split) is self._serving else self.rows_at_once or count
            size = min(most, count - done)
            try:
                with threads_of(self.drawing_threads), told_apart(self.model.device, f"drawing {size} images at once"):
                    found.append(run(slice(done, done + size)))
                done += size
                continue
            except OutOfDeviceMemory:
                if size == 1 and not self._kept:
                    self._release()
                    raise
            # Out here the error is gone, and with it the frames that held the memory.
            if self._kept:
                self._kept.clear()
                self.keep_bytes = 0
            else:
                self.rows_at_once = -(-size // 2)
                warnings.warn(
                    f"{size} images at once need more memory than is free: drawing {self.rows_at_once} at once"
                )
            self._release()
            free_unused(self.model.device)
        return found

    def _advance(self, batch: int) -> Callable[[Generation, ScaleStep], bool]:
        """Advances from the kept scales of the full schedule as long as the paths agree; keeps them when they are run."""
        kept, last = self._kept.get(batch), len(self.full) - 1

        def advance(generation: Generation, step: ScaleStep) -> bool:
            scale = generation.scale
            if kept is not None and scale < last and [*generation.steps, step] == kept.steps[: scale + 1]:
                self.sampler.advance_like(generation, kept)
                return True
            self.sampler.advance(generation, step)
            on_full_path = scale + 1 == last and tuple(generation.steps) == self.full[:last]
            if on_full_path and batch not in self._kept and self._may_keep(generation):
                self._kept[batch] = self.sampler.split(generation, range(generation.batch))
            return False

        return advance

    def _may_keep(self, generation: Generation) -> bool:
        if generation.resident is not None:
            return False  # its buffers belong to recorded graphs, for which replaying a scale is cheaper than copying
        from stagevar.models.memory import available_bytes

        needed = generation.cache.memory_bytes
        if self.keep_bytes is None:
            room = (available_bytes(self.model.device) or 0) // 4
            # All of the set or none: half of it would only displace what walks need.
            return self.prompts["search"].batches * needed <= room + sum(
                g.cache.memory_bytes for g in self._kept.values()
            )
        return (len(self._kept) + 1) * needed <= self.keep_bytes

    @property
    def _needs_reference(self) -> bool:
        metrics = [*self.extra.values(), *([] if self.composite is None else [self.composite])]
        return any(metric.needs_reference for metric in metrics)

    def _begin(self, sampler: Sampler, split: str, batch: int, rows: slice, schedules: Sequence[Steps]) -> Generation:
        from tuner.metrics.base import prompt_text

        prompts, seeds = self.prompts[split].batch(batch)
        texts, key = [prompt_text(prompt) for prompt in prompts[rows]], (split, batch, rows.start, rows.stop)
        if key not in self._encoded:
            self._encoded[key] = self.model.text.encode(texts)
        # Later walks start from what an eager one keeps, regardless of what their schedules restore from.
        among = schedules if sampler is self._serving else None
        return sampler.begin(texts, list(seeds[rows]), among=among, encoded=self._encoded[key])

    def _reference(self, split: str, batch: int) -> np.ndarray:
        """The full schedule's images of a micro-batch, drawn once per study."""
        if self.references_dir is None:
            if (split, batch) not in self._references:
                self._references[split, batch] = self.images(self.full, split, batch)
            return self._references[split, batch]
        path = self.references_dir / f"{split}-{batch:04d}.npy"
        # A batch that was the last one and not full may have grown with the set since then.
        if not path.exists() or len(np.load(path, mmap_mode="r")) != len(self.prompts[split].batch(batch)[1]):
            self.references_dir.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".tmp")
            with open(partial, "wb") as handle:
                np.save(handle, self.images(self.full, split, batch))
            partial.replace(path)
        return np.load(path)

    # ------------------------------------------------------------------------------------------------ latency

    def latency(self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int = 12) -> Mapping[str, Timing]:
        """See `Evaluator` and `ScheduleTimer`."""
        sentinel = next((name for name, steps in schedules.items() if steps == self.full), None)
        self._release()
        return self.timer.latency(schedules, sentinel, rounds, warm_up_at_most)

    def step_ms(self, schedules: Sequence[Steps], rounds: int = 3) -> dict[Steps, tuple[float, ...]]:
        """See `Evaluator` and `ScheduleTimer`."""
        self._release()
        return self.timer.step_ms(schedules, rounds)

    def scale_ms(self, schedules: Mapping[str, Steps], rounds: int = 5) -> dict[str, tuple[float, ...]]:
        """See `Evaluator` and `ScheduleTimer`."""
        self._release()
        return self.timer.scale_ms(schedules, rounds)
