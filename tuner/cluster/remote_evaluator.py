"""The study's view of a cluster: an evaluator whose work is done by the workers of a RayExecutor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stagevar.schedule import Steps, exact
from tuner.cluster.dispatcher import cut
from tuner.cluster.worker import Place
from tuner.evaluation.evaluator import EvaluationInfo, Evaluator, Values
from tuner.evaluation.executor import Failed, Outcome, QualityTask
from tuner.evaluation.timed_groups import deal, merged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagevar.timing import Timing

#: Where each latency figure was measured, one JSON object per line.
MEASUREMENTS_FILE = "measurements.jsonl"


class Workers(Protocol):
    """What this module needs of a `RayExecutor`."""

    run_dir: Path | None

    @property
    def timers(self) -> int: ...

    def run(self, tasks: Sequence[QualityTask]) -> Iterator[tuple[QualityTask, list[Outcome]]]: ...

    def call(self, method: str, *arguments: Any, suspect: Any) -> Any: ...

    def time(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[tuple[Any, Place]]: ...


class RemoteEvaluator(Evaluator):
    """An Evaluator whose work is done by the workers of a RayExecutor.

    Schedules to be timed with the full schedule are distributed over all GPUs that are ready. Each GPU times the full
    schedule in the same rounds, as its sentinel, and its samples are scaled, round by round, by the sentinel's time on the
    first GPU over its time here: the ratio to the full schedule stays exactly as measured, in one process, and milliseconds
    become those of the first GPU, always the same one as long as it lives. `measurements.jsonl` records the node, process
    and GPU of every timing, and keeps samples of whole schedules as measured.
    """

    def __init__(self, executor: Workers, facts: EvaluationInfo):
        self.executor, self.facts = executor, facts
        self._full = exact(len(facts.grids)).expand(facts.grids, facts.chunks)

    def quality(self, schedules: Sequence[Steps], split: str, batch: int) -> list[Values]:
        [(_, outcomes)] = self.executor.run([QualityTask(tuple(schedules), split, batch)])
        values: list[Values] = []
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                raise RuntimeError(outcome.error)
            values.append(dict(outcome))
        return values

    def latency(self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int = 12) -> Mapping[str, Timing]:
        sentinel = next((name for name, steps in schedules.items() if steps == self._full), None)
        shares = deal(schedules, sentinel, self.executor.timers)
        measured = self.executor.time("latency", [(share, rounds, warm_up_at_most) for share in shares])
        samples = [{name: timing.samples_ms for name, timing in timings.items()} for timings, _ in measured]
        self._record("latency", samples, measured, sentinel=sentinel)
        found = merged([timings for timings, _ in measured], sentinel)
        return {name: found[name] for name in schedules}

    def step_ms(self, schedules: Sequence[Steps], rounds: int = 3) -> Mapping[Steps, tuple[float, ...]] | None:
        """Milliseconds of steps by prefix; each GPU walks similar schedules, and the full one (or the first) besides."""
        sentinel = self._full if self._full in schedules else schedules[0]
        others = [steps for steps in schedules if steps != sentinel]
        parts = cut(others, self.executor.timers) if others else [()]
        calls = [((sentinel, *(others[i] for i in part)), rounds) for part in parts]
        measured = self.executor.time("step_ms", calls)
        if any(timings is None for timings, _ in measured):
            return None
        prefixes = [sentinel[: depth + 1] for depth in range(len(sentinel))]
        sums = [np.sum([timings[prefix] for prefix in prefixes], axis=0) for timings, _ in measured]
        self._record("steps", [{"sentinel": sum_ms.tolist()} for sum_ms in sums], measured)
        found: dict[Steps, tuple[float, ...]] = {}
        for (timings, _), sum_ms in zip(measured, sums, strict=True):
            factors = sums[0] / sum_ms
            for prefix in timings.keys() - found.keys():
                found[prefix] = tuple(float(ms) for ms in np.asarray(timings[prefix]) * factors)
        return found

    def scale_ms(self, schedules: Mapping[str, Steps], rounds: int = 5) -> Mapping[str, tuple[float, ...]] | None:
        measured = self.executor.time("scale_ms", [(dict(schedules), rounds)])
        times: Mapping[str, tuple[float, ...]] | None = measured[0][0]
        if times is not None:
            self._record("scales", [times], measured)
        return times

    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        return self.executor.call("images", steps, split, batch, suspect=("images", steps))

    def _record(
        self,
        what: str,
        samples_ms: Sequence[Mapping[str, Sequence[float]]],
        measured: Sequence[tuple[Any, Place]],
        **more: Any,
    ) -> None:
        """Writes a line per GPU that took part, all with the same time."""
        if self.executor.run_dir is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with open(self.executor.run_dir / MEASUREMENTS_FILE, "a", encoding="utf-8") as handle:
            for samples, (_, place) in zip(samples_ms, measured, strict=True):
                record = {"measured": now, "what": what, **vars(place), "device": self.facts.device["name"], **more}
                plain = {name: list(values) for name, values in samples.items()}
                handle.write(json.dumps({**record, "samples_ms": plain}) + "\n")
