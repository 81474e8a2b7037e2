"""Which engine runs a model here: the fastest of those whose images equal eager's.

A recorded graph pads text rows and a compiled kernel rounds differently, so "equal" has a tolerance: on each of two prompts
the mean absolute difference of the pixels is at most TOLERANCE of their range. A different image differs by some 20 %.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stagevar.choices import ENGINES
from stagevar.errors import InfrastructureError, UsageError, first_line
from stagevar.profile.sections import EngineSection, EngineTried

if TYPE_CHECKING:
    import numpy as np

    from stagevar.models.base import LoadedModel
    from stagevar.sampling.sampler import Sampler
    from stagevar.schedule import Steps

#: Mean absolute difference of pixels, as a share of their range, up to which an image equals eager's.
TOLERANCE = 0.01
#: An engine that is faster than a simpler one by less than this share is not worth its compiling and recording.
LEAST_GAIN = 0.02
#: Images below which comparing engines takes longer than drawing them all on the slowest.
WORTH_COMPARING = 64
#: Timed images per engine, in turn with eager.
ROUNDS = 5


def choose_engine(asked: str, device: str, trial: Callable[[str], EngineTried]) -> EngineSection:
    """The engine to run on.

    Args:
        asked: "auto", or an engine's name, which is taken as is.
        device: kind of device, "cpu" or "cuda".
        trial: measures one engine; called only for "auto" on a GPU, with "eager" first.

    Raises:
        UsageError: for an unknown name.
    """
    if asked != "auto":
        if asked not in ENGINES:
            raise UsageError(f"unknown engine {asked!r}; use auto, {', '.join(ENGINES)}")
        return EngineSection(asked, asked, "it was asked for")
    if device != "cuda":
        return EngineSection(
            "eager", "auto", f"launching kernels costs little on {device}; engines are compared only on a GPU"
        )
    return pick_engine([trial(name) for name in ENGINES])


def pick_engine(tried: Sequence[EngineTried]) -> EngineSection:
    """The simplest of the engines that are within LEAST_GAIN of the fastest; eager is always among the usable ones."""
    judged = [_judged(one) for one in tried]
    usable = [one for one in judged if one.refused is None and one.latency_ms is not None]
    fastest_ms = min((one.latency_ms or 0.0 for one in usable), default=0.0)
    chosen = next((one for one in usable if (one.latency_ms or 0.0) <= fastest_ms * (1 + LEAST_GAIN)), None)
    if chosen is None:
        return EngineSection("eager", "auto", "no engine could be measured", tuple(judged))
    eager_ms = next((one.latency_ms for one in usable if one.engine == "eager"), None)
    reason = f"{chosen.latency_ms:.1f} ms per image"
    if chosen.engine == "eager":
        reason += f"; no other engine is over {LEAST_GAIN:.0%} faster with the same images"
    else:
        gain = "" if not eager_ms else f", {eager_ms / (chosen.latency_ms or eager_ms):.2f}x as fast as eager"
        reason += f"{gain}; its images differ by {chosen.difference:.2g} of the range (allowed: {TOLERANCE:g})"
    losers = [_described(one) for one in judged if one is not chosen]
    return EngineSection(chosen.engine, "auto", "; ".join([reason, *losers]), tuple(judged))


def _judged(one: EngineTried) -> EngineTried:
    if one.refused is None and one.difference is not None and one.difference > TOLERANCE:
        why = f"its images differ by {one.difference:.2g} of the range (allowed: {TOLERANCE:g})"
        return dataclasses.replace(one, refused=why)
    return one


def _described(one: EngineTried) -> str:
    return f"{one.engine}: {one.refused}" if one.refused else f"{one.engine}: {one.latency_ms:.1f} ms"


class EngineTrials:
    """Measures engines on a loaded model: compares two images with eager's, then times the engine in turn with eager.

    Args:
        prompts, seeds: two of each.
        steps: the schedule to run.
        build: makes a sampler with a given engine.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: Steps,
        build: Callable[[str], Sampler] | None = None,
        rounds: int = ROUNDS,
    ):
        from stagevar.sampling.sampler import Sampler

        self.model, self.prompts, self.seeds, self.steps, self.rounds = model, prompts, seeds, steps, rounds
        self.build = build or (lambda name: Sampler(model, engine=name))
        self._eager: Sampler | None = None
        self._eager_images: list[np.ndarray] = []
        self._eager_ms = 0.0

    def __call__(self, name: str) -> EngineTried:
        """What was found; an engine that cannot run here, or falls back to eager, is refused with the reason.

        Errors of "eager" itself pass through, and so does an InfrastructureError.
        """
        if self._eager is None:
            self._eager = self.build("eager")
            self._eager_images = self._images(self._eager)
            self._eager_ms = self._timings({"eager": self._eager})["eager"]
        if name == "eager":
            return EngineTried("eager", self._eager_ms, 0.0)
        sampler = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an engine that falls back: it is refused below
                sampler = self.build(name)
                difference = self._difference(self._images(sampler))
                timings = self._timings({"eager": self._eager, name: sampler})
            from stagevar.engine import fell_back_because

            why = fell_back_because(sampler.engine)
            if why is not None:
                return EngineTried(name, refused=f"falls back to eager ({why:.160})")
            return EngineTried(name, self._eager_ms * timings[name] / timings["eager"], difference)
        except InfrastructureError:
            raise
        except Exception as error:  # compilers, drivers and the allocator have no common base
            return EngineTried(name, refused=first_line(error))
        finally:
            if sampler is not None:
                sampler.release()
            _free(self.model)

    def close(self) -> None:
        """Frees eager's cache."""
        if self._eager is not None:
            self._eager.release()
            self._eager = None
        _free(self.model)

    def _images(self, sampler: Sampler) -> list[np.ndarray]:
        # One image per pass, as they are timed; copies, because an engine may draw into one buffer.
        pairs = zip(self.prompts, self.seeds, strict=True)
        return [sampler.generate([prompt], [seed], self.steps)[0].copy() for prompt, seed in pairs]

    def _difference(self, images: Sequence[np.ndarray]) -> float:
        """Of the image that differs most: mean absolute difference, as a share of the range."""
        pairs = zip(images, self._eager_images, strict=True)
        return max(float(abs(a.astype(float) - b.astype(float)).mean()) / 255 for a, b in pairs)

    def _timings(self, samplers: dict[str, Sampler]) -> dict[str, float]:
        from stagevar.timing import measure

        def runner(sampler: Sampler) -> Callable[[], object]:
            return lambda: sampler.generate(self.prompts[:1], self.seeds[:1], self.steps)

        timings = measure(
            {name: runner(sampler) for name, sampler in samplers.items()}, self.rounds, self.model.device, self.rounds
        )
        return {name: timing.median_ms for name, timing in timings.items()}


def _free(model: LoadedModel) -> None:
    if model.device.type == "cuda":
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()


def engine_for(
    asked: str, model: LoadedModel, steps: Steps, prompts: Sequence[str], seeds: Sequence[int]
) -> EngineSection:
    """`choose_engine` for a loaded model, measured on two prompts where that is needed."""
    trials = EngineTrials(model, list(prompts[:2]), list(seeds[:2]), steps)
    try:
        return choose_engine(asked, model.device.type, trials)
    finally:
        trials.close()
