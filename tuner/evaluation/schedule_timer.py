"""Times schedules of a loaded model on one engine: whole images in turn, the steps of a tree, the scales of one image.

Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from stagevar.errors import OutOfDeviceMemory
from stagevar.schedule import ScaleStep, Steps
from tuner.evaluation.prefix_tree import walk
from tuner.evaluation.timed_groups import merged

if TYPE_CHECKING:
    import torch

    from stagevar.models.base import LoadedModel
    from stagevar.sampling.generation import Generation
    from stagevar.sampling.sampler import Sampler
    from stagevar.timing import Timing


def pinned_on(device: torch.device, threads: int) -> contextlib.AbstractContextManager[object]:
    """The context for timing on a CPU; does nothing for a GPU."""
    from stagevar.timing import pinned

    return contextlib.nullcontext() if device.type == "cuda" else pinned(threads)


class ScheduleTimer:
    """Times single images (batch 1) of one prompt.

    Args:
        model: what `load_model` returned.
        text, seed: of the prompt.
        engine: what steps run on.
        threads: on a CPU, pinned while timing.

    Every method raises RuntimeError if the engine fell back to eager, since the figures would be another engine's;
    OutOfDeviceMemory if even the smallest part does not fit; DeviceBroken if no kernel runs in this process any more.
    """

    def __init__(self, model: LoadedModel, text: str, seed: int, engine: str, threads: int):
        self.model, self.engine, self.threads = model, engine, threads
        self.prompt = [text], [seed]

    def latency(
        self, schedules: Mapping[str, Steps], sentinel: str | None, rounds: int, warm_up_at_most: int
    ) -> Mapping[str, Timing]:
        """Round-robin timings, warmed per schedule, each with its own sampler and the cache that it is deployed with.

        As many are timed in turn as fit on the device; the others follow in more groups, each with the full schedule
        (`tuner.evaluation.timed_groups`). `sentinel` is that schedule's name, None if it is not among them.
        """
        from stagevar.device_faults import free_unused, told_apart
        from stagevar.models.memory_plan import groups_that_fit

        waiting = groups_that_fit(self.model, schedules, sentinel, self.engine)
        found: list[Mapping[str, Timing]] = []
        while waiting:
            group = waiting.pop(0)
            try:
                with told_apart(self.model.device, f"timing {len(group)} schedules in turn"):
                    found.append(self.timings({name: schedules[name] for name in group}, rounds, warm_up_at_most))
                continue
            except OutOfDeviceMemory:
                others = [name for name in group if name != sentinel]
                if sentinel is None or len(others) < 2:
                    raise
            free_unused(self.model.device)
            half = len(others) // 2
            waiting[:0] = [[sentinel, *others[:half]], [sentinel, *others[half:]]]
        timings = merged(found, sentinel)
        return {name: timings[name] for name in schedules}

    def timings(self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int) -> Mapping[str, Timing]:
        """Timings of schedules that together fit on the device."""
        from stagevar.timing import measure

        samplers = {name: self.new_sampler() for name in schedules}
        runs = {
            name: lambda sampler=samplers[name], steps=steps: sampler.generate(*self.prompt, steps)
            for name, steps in schedules.items()
        }
        try:
            with self._pinned():
                found = measure(runs, rounds, self.model.device, warm_up_at_most)
            for sampler in samplers.values():
                self.check_engine(sampler)
            return found
        finally:
            for sampler in samplers.values():
                sampler.release()

    def step_ms(self, schedules: Sequence[Steps], rounds: int) -> dict[Steps, tuple[float, ...]]:
        """Milliseconds of the last scale of each distinct prefix for one image, a sample per round after a discarded first.

        Raises ValueError for schedules with a decision point.
        """
        from stagevar.device_faults import told_apart

        with told_apart(self.model.device, "timing steps"):
            return self._step_ms(schedules, rounds)

    def _step_ms(self, schedules: Sequence[Steps], rounds: int) -> dict[Steps, tuple[float, ...]]:
        from stagevar.timing import time_once

        if any(step.decision is not None for steps in schedules for step in steps):
            raise ValueError("a schedule with a decision point has no single path to time")
        device = self.model.device
        sampler = self.new_sampler()
        found: dict[Steps, list[float]] = {}

        def timed(key: Steps, run: Callable[[], object]) -> None:
            elapsed_ms = time_once(run, device)[0]
            found.setdefault(key, []).append(elapsed_ms)

        def advance(generation: Generation, step: ScaleStep) -> None:
            timed((*generation.steps, step), lambda: sampler.advance(generation, step))

        def round_() -> None:
            begun: list[Generation] = []
            start_ms, _ = time_once(lambda: begun.append(sampler.begin(*self.prompt, among=schedules)), device)
            walk(sampler, begun[0], schedules, None, advance)
            decode_ms, _ = time_once(lambda: sampler.decode(begun[0]), device)
            found.setdefault((), []).append(start_ms + decode_ms)

        with self._pinned():
            for _ in range(rounds + 1):
                round_()
        self.check_engine(sampler)
        return {key: tuple(values[1:]) for key, values in found.items()}

    def scale_ms(self, schedules: Mapping[str, Steps], rounds: int) -> dict[str, tuple[float, ...]]:
        """Median milliseconds per scale (`stagevar.sampling.scale_latency`), to explain a latency."""
        from stagevar.device_faults import told_apart
        from stagevar.sampling.scale_latency import time_scales

        sampler = self.new_sampler()
        with self._pinned(), told_apart(self.model.device, "timing scales"):
            found = time_scales(sampler, schedules, self.prompt[0][0], self.prompt[1][0], rounds)
        self.check_engine(sampler)
        return found

    def new_sampler(self) -> Sampler:
        """A sampler on this timer's engine, with its own cache."""
        from stagevar.sampling.sampler import Sampler

        return Sampler(self.model, engine=self.engine)

    def check_engine(self, sampler: Sampler) -> None:
        from stagevar.engine import fell_back_because

        why = fell_back_because(sampler.engine)
        if why is not None:
            raise RuntimeError(f"engine {self.engine} fell back to eager ({why}); use --engine eager")

    def _pinned(self) -> contextlib.AbstractContextManager[object]:
        return pinned_on(self.model.device, self.threads)
