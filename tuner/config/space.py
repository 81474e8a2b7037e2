"""The search space: one commented YAML per model says what is searched, what counts as quality, and on which prompts.

The space is fixed: every parameter has a value in every trial, whether or not it matters there. Parameter values become
a StageSchedule here; schedules that expand alike are one schedule, named by `steps_key`. No torch, no optuna.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from stagevar.errors import ScheduleError, UsageError
from stagevar.models import registry
from stagevar.schedule import (
    PRESETS,
    StageSchedule,
    Steps,
    preset,
)
from stagevar.schedule.grids import Grid
from tuner.config.parameters import DEFAULTS, NEVER, Parameter, Value, as_number
from tuner.metrics.quality_spec import QualitySpec

#: Prompts that need no file: nano's captions, GenEval-style ones over COCO's classes, ImageNet's class indices.
PROMPT_SOURCES = ("nano", "geneval", "imagenet")


@dataclass(frozen=True)
class PromptSource:
    """Where a study's prompts come from.

    Attributes:
        source: "nano", "geneval" (GenEval-style prompts over COCO's classes, from the seed), "imagenet" (class indices, for
            VAR) or a file (.txt with one prompt per line, .jsonl with GenEval metadata).
        search, heldout: how many of each.
        micro_batch: images per batch in quality evaluation, fixed for the study.
        added: how many of the held-out ones a study added later, in order; never in a space file.
    """

    source: str = "nano"
    search: int = 32
    heldout: int = 256
    micro_batch: int = 16
    added: tuple[int, ...] = ()


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space.

    Attributes:
        model: name.
        quality: what counts, by metric; the first is the primary one.
        floors: metric -> smallest mean allowed.
        parameters: what is searched.
        enqueue: presets of stagevar.schedule that are evaluated first.
        semantic_end: first scale of the structure stage, from analysis; structure_end is never searched below it.
        proposals: schedules by name that are evaluated before the presets.
    """

    model: str
    quality: Mapping[str, QualitySpec]
    floors: Mapping[str, float]
    parameters: tuple[Parameter, ...]
    enqueue: tuple[str, ...]
    prompts: PromptSource
    semantic_end: int = 0
    proposals: tuple[tuple[str, StageSchedule], ...] = ()

    @property
    def known(self) -> tuple[str, ...]:
        """Names of the schedules that are evaluated before the trial sampler proposes any."""
        return (*(name for name, _ in self.proposals), *self.enqueue)

    def known_schedule(self, name: str, grids: Sequence[Grid]) -> StageSchedule:
        """The schedule of one of `known` for these scales. Raises ScheduleError for a preset that they cannot hold."""
        return dict(self.proposals).get(name) or preset(name, grids, registry.published(self.model))

    @property
    def settings(self) -> int | None:
        """How many settings it holds; several may expand to one schedule. None if a parameter is continuous."""
        counts = [len(parameter.choices or ()) for parameter in self.parameters]
        return math.prod(counts) if all(counts) else None

    @property
    def digest(self) -> str:
        """SHA-256 of everything the space says."""
        text = json.dumps(self.contents, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def contents(self) -> dict[str, object]:
        """Everything the space says, by field, as in a run's identity: metrics as their file states them."""
        quality = {name: spec.to_data() if spec.stated is None else spec.stated for name, spec in self.quality.items()}
        return {**dataclasses.asdict(dataclasses.replace(self, quality={})), "quality": quality}

    def to_data(self) -> dict[str, object]:
        """The space as the plain data of a search-space file, nothing left out."""
        metrics = [{"name": name, **spec.to_data()} for name, spec in self.quality.items()]
        return {
            "model": self.model,
            "objectives": {"latency": "ms", "quality": {"metrics": metrics}},
            "constraints": {"floors": dict(self.floors)},
            "semantic_end": self.semantic_end,
            "parameters": {p.name: p.to_data() for p in self.parameters},
            "enqueue": list(self.enqueue),
            **({"proposals": {n: schedule.to_dict() for n, schedule in self.proposals}} if self.proposals else {}),
            "prompts": {k: v for k, v in dataclasses.asdict(self.prompts).items() if k != "added"},
        }

    def fit(self, grids: Sequence[Grid]) -> None:
        """Raises UsageError if a range does not fit a model with these scales."""
        scales = len(grids)
        for parameter in self.parameters:
            limit = {
                **dict.fromkeys(("structure_end", "cfg_delay", "rank_delay"), scales),
                "skip_last": scales - 1,
                "skip_inner": scales - 2,
            }
            if parameter.name not in limit:
                continue
            high = max((as_number(v) for v in parameter.values if v != NEVER), default=parameter.high)
            if high > limit[parameter.name]:
                raise UsageError(
                    f"search space: {parameter.name} reaches {high:g}, but {self.model} has {scales} scales; "
                    f"keep it at or below {limit[parameter.name]}"
                )
        for name in self.enqueue:
            PRESETS[name](grids)
        for name, schedule in self.proposals:
            if schedule.structure_end > scales:
                raise UsageError(
                    f"search space: proposal {name} begins at scale {schedule.structure_end}, but {self.model} has {scales}"
                )

    def runnable(self, refused: Mapping[str, str]) -> SearchSpace:
        """The space without the precisions that the device cannot run (precision -> why).

        Raises UsageError if that leaves no precision.
        """
        if not any(p.name == "precision" and refused.keys() & set(p.values) for p in self.parameters):
            return self

        def left(parameter: Parameter) -> Parameter:
            if parameter.name != "precision":
                return parameter
            values = tuple(value for value in parameter.values if value not in refused)
            if not values:
                first = str(parameter.values[0])
                raise UsageError(
                    f"search space: precision {first} cannot run here ({refused[first]}); add model to its values"
                )
            return dataclasses.replace(parameter, values=values)

        return dataclasses.replace(self, parameters=tuple(map(left, self.parameters)))

    def schedule(self, values: Mapping[str, Value], grids: Sequence[Grid]) -> StageSchedule:
        """The schedule of one set of values: the k-th accelerated scale keeps rank_ratio * rank_decay ** k.

        skip_last counts scales from the end, skip_inner those right before the last one that is run. fuse_layer is 0 if
        the branches cannot be fused at the cutoff's scale.
        """
        given = {**DEFAULTS, **values}
        scales = len(grids)
        start = int(given["structure_end"])
        delay = None if given["cfg_delay"] == NEVER else int(given["cfg_delay"])
        if delay is not None and start + delay >= scales:
            delay = None
        accelerated = max(1, scales - start - int(given["rank_delay"]))
        ratios = tuple(float(given["rank_ratio"]) * float(given["rank_decay"]) ** k for k in range(accelerated))
        last = scales - 1 - int(given["skip_last"])
        skip = {*range(max(1, last - int(given["skip_inner"])), last), *range(last + 1, scales)}
        projected = given["accelerator"] == "stagevar" and any(ratio < 1 for ratio in ratios)
        fuses = delay is not None and given["branch"] == "cond" and start + delay not in skip
        if projected and delay is not None and int(given["rank_delay"]) <= delay:
            fuses = False
        return StageSchedule(
            structure_end=start,
            semantic_end=min(self.semantic_end, start),
            cfg_delay=delay,
            branch=cast(Literal["cond", "uncond"], given["branch"]),
            rank_ratios=None if all(r == 1 for r in ratios) else ratios,
            rank_delay=int(given["rank_delay"]),
            projection=str(given["projection"]),
            rope=str(given["rope"]),
            site=str(given["site"]),
            skip=tuple(sorted(skip)),
            accelerator=str(given["accelerator"]),
            precision=str(given["precision"]),
            fuse_layer=int(given["fuse_layer"]) if fuses else 0,
        )

    def nearest_values(self, schedule: StageSchedule, grids: Sequence[Grid]) -> dict[str, Value]:
        """The point of the space nearest to a schedule, under which the trial sampler files an enqueued preset."""
        scales = len(grids)
        ratios = schedule.rank_ratios or (1.0,)
        means = [sum(r) / len(r) if isinstance(r, tuple) else r for r in ratios]
        if schedule.energy is not None:
            steps = schedule.expand(grids, 1)
            means = [
                s.processed_tokens() / s.tokens / len(s.branches) for s in steps[schedule.structure_end :] if s.branches
            ]
        accelerator = schedule.accelerator
        run = [s for s in range(scales) if s not in schedule.skip]
        wanted = {
            "structure_end": schedule.structure_end,
            "cfg_delay": NEVER if schedule.cfg_delay is None else schedule.cfg_delay,
            "branch": schedule.branch,
            "rank_ratio": means[0] if means else 1.0,
            "rank_decay": (means[-1] / means[0]) ** (1 / (len(means) - 1)) if len(means) > 1 else 1.0,
            "rank_delay": schedule.rank_delay,
            "projection": schedule.projection,
            "rope": schedule.rope,
            "site": schedule.site,
            "skip_last": scales - 1 - run[-1],
            "skip_inner": run[-1] - 1 - run[-2] if len(run) > 1 else 0,
            "fuse_layer": schedule.fuse_layer,
            "accelerator": accelerator[0] if isinstance(accelerator, tuple) else accelerator,
            "precision": schedule.precision,
        }
        return {p.name: p.decode(p.encode(wanted[p.name])) for p in self.parameters}


def draw(space: SearchSpace, rng: random.Random) -> dict[str, Value]:
    """Values drawn uniformly from the space."""
    values: dict[str, Value] = {}
    for parameter in space.parameters:
        if parameter.kind in ("choice", "ordered"):
            values[parameter.name] = rng.choice(parameter.values)
        elif parameter.kind == "int":
            values[parameter.name] = rng.randint(int(parameter.low), int(parameter.high))
        else:
            ends = (parameter.low, parameter.high)
            value = rng.uniform(*map(math.log, ends)) if parameter.log else rng.uniform(*ends)
            values[parameter.name] = math.exp(value) if parameter.log else value
    return values


def drawn_settings(space: SearchSpace, seed: int, at_most: int | None = None) -> Iterator[dict[str, Value]]:
    """Values drawn uniformly from the space, repeats included; None never ends."""
    rng = random.Random(seed)
    return (draw(space, rng) for _ in (itertools.count() if at_most is None else range(at_most)))


def all_or_drawn_settings(space: SearchSpace, seed: int, at_most: int) -> Iterator[dict[str, Value]]:
    """Every setting of a space that holds at most so many, otherwise so many drawn ones."""
    if space.settings is None or space.settings > at_most:
        return drawn_settings(space, seed, at_most)
    names = [parameter.name for parameter in space.parameters]
    every = itertools.product(*(parameter.choices or () for parameter in space.parameters))
    return (dict(zip(names, values, strict=True)) for values in every)


def expanded(
    space: SearchSpace, grids: Sequence[Grid], chunks: int, found: Iterable[dict[str, Value]]
) -> Iterator[tuple[dict[str, Value], Steps | None]]:
    """Each setting with its expansion, None if it has none."""
    for values in found:
        steps = None
        with contextlib.suppress(ScheduleError):
            steps = space.schedule(values, grids).expand(grids, chunks)
        yield values, steps


def draws(
    space: SearchSpace, grids: Sequence[Grid], chunks: int, seed: int, at_most: int | None = None
) -> Iterator[Steps]:
    """The expansions of `drawn_settings`; `at_most` counts draws, not schedules."""
    return (s for _, s in expanded(space, grids, chunks, drawn_settings(space, seed, at_most)) if s is not None)


def steps_key(steps: Steps) -> str:
    """Short name of an expansion; the same for all schedules with the same steps, whatever their parameters."""
    text = repr([dataclasses.replace(step, stage="") for step in steps])
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
