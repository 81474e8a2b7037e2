"""Measurements that studies and machines share, `--store DIR`: quality of schedules, and what their steps cost.

    DIR/quality/CONTEXT/context.json          what all results in this folder have in common
    DIR/quality/CONTEXT/BATCH/SCHEDULE.json   values per metric of one schedule on one micro-batch
    DIR/steps/CONTEXT/SCHEDULE.json           cost of each of its steps, in shares of the full schedule's

Names are hashes of contents, and a file is complete or absent: it is written under another name, then renamed, and holds its
own checksum. Two writers of one name write the same result, so nothing needs a lock, and a killed writer loses only what it
was writing.

A result is reused if model, weights, prompts and seeds, sampling, metrics, precision, engine with its tolerance, and the
code that draws and judges are the same. Milliseconds are not kept: step costs are shares of the full schedule's in the same
round, and belong to one kind of device.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

import stagevar
from stagevar.files import write_text_atomically, writing
from stagevar.profile.engine_choice import TOLERANCE
from stagevar.schedule import Steps, exact
from tuner.config.prompts import PromptSet
from tuner.config.quality import MetricLimit, composite
from tuner.config.space import SearchSpace, steps_key
from tuner.evaluation.evaluator import EvaluationInfo, Evaluator, Values
from tuner.evaluation.executor import Executor, Failed, Outcome, QualityTask

if TYPE_CHECKING:
    from stagevar.timing import Timing

log = logging.getLogger(__name__)

#: What must be the same for results to be reused, by name; plain data.
Context: TypeAlias = dict[str, object]
#: Kept with every context, so that results of another layout are never reused.
LAYOUT = 1
#: The code that determines images, values or step costs.
_CODE = (
    *("stagevar/accelerators", "stagevar/engine", "stagevar/images.py", "stagevar/models", "stagevar/prompts"),
    *("stagevar/sampling", "stagevar/schedule", "stagevar/tensors"),
    *("tuner/evaluation/model_evaluator.py", "tuner/evaluation/prefix_tree.py", "tuner/evaluation/schedule_timer.py"),
    *("tuner/metrics", "tuner/similarities.py"),
)


@functools.cache
def code_digest() -> str:
    """Hash of the sources that determine images, values and step costs, comments included."""
    root = Path(stagevar.__file__).resolve().parents[1]
    found = hashlib.sha256()
    for name in _CODE:
        place = root / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def text_identity(facts: EvaluationInfo) -> Mapping[str, object] | None:
    """Which large text encoder a model has, wherever its folder lies; None without one."""
    text = facts.provenance.get("text")
    return {name: value for name, value in text.items() if name != "path"} if isinstance(text, Mapping) else None


def quality_context(facts: EvaluationInfo, space: SearchSpace, split: str) -> Context:
    """What quality results of a split depend on, besides schedule and prompts; metrics' weights and limits do not matter."""
    engine = facts.heldout_engine if split == "heldout" else "eager"
    metrics = {name: dict(spec.options) for name, spec in space.quality.items()}
    return _plain(
        {
            "layout": LAYOUT,
            "model": facts.model,
            "weights": facts.provenance.get("weights"),
            "load": facts.provenance.get("load"),
            "text": text_identity(facts),
            "pixels": facts.pixels,
            "grids": facts.grids,
            "sampling": facts.sampling,
            "metrics": {**metrics, **{name: {} for name in space.floors if name not in metrics}},
            "engine": engine,
            "tolerance": 0 if engine == "eager" else TOLERANCE,
            "device": facts.device.get("kind"),
            "dtype": facts.device.get("dtype"),
            "torch": facts.device.get("torch"),
            "code": code_digest(),
        }
    )


def cost_context(facts: EvaluationInfo) -> Context:
    """What step costs depend on, besides the schedule: above all, the device."""
    device = dict(facts.device)
    if device.get("kind") == "cpu":
        device |= {"processor": platform.processor() or platform.machine(), "host": socket.gethostname()}
    names = "model", "grids", "pixels", "engine"
    return _plain(
        {"layout": LAYOUT, **{n: getattr(facts, n) for n in names}, "device": device}
        | {"load": facts.provenance.get("load"), "sampling": facts.sampling, "code": code_digest()}
    )


def _plain(data: Context) -> Context:
    """A context as it comes back from JSON."""
    plain: Context = json.loads(json.dumps(data, sort_keys=True, default=str))
    return plain


def differing(other: Context, context: Context) -> list[str]:
    """What differs between two contexts, by name."""
    return [name for name in (*context, *(other.keys() - context)) if other.get(name) != context.get(name)]


def named(context: Context) -> str:
    """What a context is about, in words."""
    return ", ".join(name for name in context if name != "layout")


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Store:
    """A folder of measurements.

    Methods raise InfrastructureError if the disk fails and UsageError if the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, kind: str, context: Context) -> Path:
        """The folder of a context, created if missing."""
        folder = self.folder / kind / _digest(context)
        path = folder / "context.json"
        if not path.exists():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_text_atomically(path, json.dumps(context, indent=1) + "\n")
        return folder

    def read(self, path: Path) -> Any | None:
        """The data in a file; None if it is missing or damaged."""
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            return held["data"] if held["check"] == _digest(held["data"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path, data: Any) -> None:
        """Writes a file atomically."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, json.dumps({"check": _digest(data), "data": data}))

    def unlike(self, kind: str, context: Context) -> list[tuple[int, str]]:
        """How other results of this model differ: their number and one phrase, the most similar first."""
        found = []
        for path in sorted(self.folder.glob(f"{kind}/*/context.json")):
            try:
                other = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if not isinstance(other, dict) or other == context or other.get("model") != context["model"]:
                continue
            names = differing(other, context)
            count = sum(1 for one in path.parent.rglob("*.json") if one != path)
            found.append((len(names), count, f"another {' and '.join(names)}"))
        return [(count, why) for _, count, why in sorted(found) if count]


@dataclass
class StoreCounts:
    """Results taken from a store and results that had to be computed, in images."""

    reused: int = 0
    made: int = 0


class StoredExecutor(Executor):
    """Has another executor run only what the store lacks, and stores it.

    Args:
        limits: of this study; its composite is computed from stored values.

    Attributes:
        counts: images reused and computed.
    """

    name: ClassVar[str] = "stored"

    def __init__(
        self,
        executor: Executor,
        store: Store,
        facts: EvaluationInfo,
        space: SearchSpace,
        prompts: Mapping[str, PromptSet],
        limits: Sequence[MetricLimit],
    ):
        self.executor, self.store, self.prompts = executor, store, prompts
        self._contexts = {split: quality_context(facts, space, split) for split in prompts}
        self._limits = limits
        self.counts = StoreCounts()

    def reasons(self) -> list[str]:
        """What is reused and what is not, a line each, as far as known before anything runs."""
        context = self._contexts["search"]
        folder = self.store.folder / "quality" / _digest(context)
        held = sum(1 for path in folder.rglob("*.json") if path.name != "context.json")
        lines = []
        if held:
            same = named(context)
            lines.append(f"{held:,} results have the same {same}: reused")
        lines += [f"{count:,} results have {why}: not reused" for count, why in self.store.unlike("quality", context)]
        return lines or [f"no results of {context['model']} yet"]

    def run(self, tasks: Sequence[QualityTask]) -> Iterator[tuple[QualityTask, list[Outcome]]]:
        waiting: dict[QualityTask, list[tuple[QualityTask, dict[int, Outcome]]]] = {}
        for task in tasks:
            known = self._known(task)
            missing = tuple(steps for index, steps in enumerate(task.schedules) if index not in known)
            size = len(self.prompts[task.split].batch(task.batch)[1])
            self.counts.reused += len(known) * size
            self.counts.made += len(missing) * size
            log.info(
                "store: %s micro-batch %d: %d schedules reused, %d not stored yet",
                *(task.split, task.batch, len(known), len(missing)),
            )
            if not missing:
                yield task, [known[index] for index in range(len(task.schedules))]
                continue
            waiting.setdefault(QualityTask(missing, task.split, task.batch), []).append((task, known))
        for part, outcomes in self.executor.run(list(waiting)):
            for steps, outcome in zip(part.schedules, outcomes, strict=True):
                if not isinstance(outcome, Failed):
                    values = {m: [float(v) for v in row] for m, row in outcome.items() if m != "quality"}
                    self.store.write(self._path(steps, part.split, part.batch), values)
            for task, known in waiting[part]:
                made = iter(outcomes)
                yield task, [known[i] if i in known else next(made) for i in range(len(task.schedules))]

    def close(self) -> None:
        self.executor.close()

    def _known(self, task: QualityTask) -> dict[int, Outcome]:
        size, found = len(self.prompts[task.split].batch(task.batch)[1]), {}
        for index, steps in enumerate(task.schedules):
            values = self.store.read(self._path(steps, task.split, task.batch))
            if values is not None and all(len(row) == size for row in values.values()):
                found[index] = self._with_composite(values)
        return found

    def _with_composite(self, values: Mapping[str, Sequence[float]]) -> Outcome:
        rows = {metric: np.asarray(row, dtype=np.float64) for metric, row in values.items()}
        return {**rows, "quality": composite(rows, self._limits)}

    def _path(self, steps: Steps, split: str, batch: int) -> Path:
        folder = self.store.open("quality", self._contexts[split])
        return folder / _digest(self.prompts[split].batch(batch)) / f"{steps_key(steps)}.json"


class StoredCosts(Evaluator):
    """An evaluator that takes step costs from a store if it has them. Everything else is the evaluator's own."""

    def __init__(self, evaluator: Evaluator, store: Store):
        self._evaluator, self._store, self.facts = evaluator, store, evaluator.facts
        self._context = cost_context(evaluator.facts)
        self._full = exact(len(evaluator.facts.grids)).expand(evaluator.facts.grids, evaluator.facts.chunks)
        self.steps_timed = self.steps_reused = 0

    def quality(self, schedules: Sequence[Steps], split: str, batch: int) -> list[Values]:
        return self._evaluator.quality(schedules, split, batch)

    def latency(self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int = 12) -> Mapping[str, Timing]:
        return self._evaluator.latency(schedules, rounds, warm_up_at_most)

    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        return self._evaluator.images(steps, split, batch)

    def scale_ms(self, schedules: Mapping[str, Steps], rounds: int = 5) -> Mapping[str, tuple[float, ...]] | None:
        return self._evaluator.scale_ms(schedules, rounds)

    @property
    def scales_run(self) -> int | None:
        return self._evaluator.scales_run

    @property
    def scales_alone(self) -> int | None:
        return self._evaluator.scales_alone

    def step_ms(self, schedules: Sequence[Steps], rounds: int = 3) -> dict[Steps, tuple[float, ...]] | None:
        """See `Evaluator`; in shares of the full schedule's scales in the same round. Only schedules not stored are timed."""
        known = {steps: shares for steps in schedules if (shares := self._held(steps, rounds)) is not None}
        missing = [steps for steps in schedules if steps not in known]
        self.steps_reused, self.steps_timed = len(known), len(missing)
        log.info("store: step costs of %d schedules reused, %d timed", len(known), len(missing))
        found: dict[Steps, tuple[float, ...]] = {}
        if missing:
            asked = [self._full, *(steps for steps in missing if steps != self._full)]
            times = self._evaluator.step_ms(asked, rounds)
            if times is None:
                return None
            unit_R = np.sum([times[self._full[: depth + 1]] for depth in range(len(self._full))], axis=0)
            found = {prefix: tuple(float(v) for v in np.asarray(row) / unit_R) for prefix, row in times.items()}
            for steps in asked:
                shares = [found[steps[:depth]] for depth in range(len(steps) + 1) if steps[:depth] in found]
                if len(shares) == len(steps) + 1:
                    self._store.write(self._path(steps), shares)
        for steps, shares in known.items():
            for depth, row in enumerate(shares):
                found.setdefault(steps[:depth], row)
        return found

    def _held(self, steps: Steps, rounds: int) -> list[tuple[float, ...]] | None:
        shares = self._store.read(self._path(steps))
        if shares is None or len(shares) != len(steps) + 1 or any(len(row) != rounds for row in shares):
            return None
        return [tuple(row) for row in shares]

    def _path(self, steps: Steps) -> Path:
        return self._store.open("steps", self._context) / f"{steps_key(steps)}.json"
