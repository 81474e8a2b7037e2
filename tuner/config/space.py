"""The search space: one commented YAML per model says what is searched, what counts as quality, and on which prompts.

The space is fixed: every parameter has a value in every trial, whether or not it matters there. Parameter values become
a StageSchedule here; schedules that expand alike are one schedule, named by `steps_key`. No torch, no optuna.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.resources
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from stagevar.errors import ScheduleError, StagevarError, UsageError, did_you_mean, hint
from stagevar.models import registry
from stagevar.schedule import (
    ACCELERATORS,
    BOTH,
    PRECISIONS,
    PRESETS,
    PROJECTIONS,
    StageSchedule,
    Steps,
    accelerator_names,
    preset,
)
from stagevar.schedule.grids import Grid
from stagevar.yaml_files import read_yaml
from tuner.config.analysis import Findings
from tuner.config.default_space import completed, default_space
from tuner.config.quality import check_max_drop
from tuner.metrics.quality_spec import QualitySpec, read_quality

NEVER = "never"
#: Prompts that need no file: nano's captions, GenEval-style ones over COCO's classes, ImageNet's class indices.
PROMPT_SOURCES = ("nano", "geneval", "imagenet")
Value = int | float | str


@dataclass(frozen=True)
class _Rule:
    """What values a parameter may take: numbers of a kind between two bounds, or words."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()


_RULES = {
    "structure_end": _Rule(int, 1),
    "cfg_delay": _Rule(int, 0, words=(NEVER,)),
    "branch": _Rule(str, words=BOTH),
    "rank_ratio": _Rule(float, 0.001, 1),
    "rank_decay": _Rule(float, 0.01, 1),
    "rank_delay": _Rule(int, 0),
    "projection": _Rule(str, words=PROJECTIONS),
    "rope": _Rule(str, words=("first", "index")),
    "site": _Rule(str, words=("chunk", "trunk")),
    "skip_last": _Rule(int, 0),
    "skip_inner": _Rule(int, 0),
    "fuse_layer": _Rule(int, 0),
    "accelerator": _Rule(str, words=ACCELERATORS),
    "precision": _Rule(str, words=PRECISIONS),
}
#: Values of the parameters that a space does not list.
DEFAULTS: dict[str, Value] = {
    "cfg_delay": NEVER,
    "branch": "uncond",
    "rank_ratio": 1.0,
    "rank_decay": 1.0,
    "rank_delay": 0,
    "projection": "gaussian",
    "rope": "first",
    "site": "chunk",
    "skip_last": 0,
    "skip_inner": 0,
    "fuse_layer": 0,
    "accelerator": "stagevar",
    "precision": "model",
}


@dataclass(frozen=True)
class Parameter:
    """One searched parameter.

    kind: "int" or "float" between low and high (log: on a logarithmic axis); "ordered": numbers in rising order, maybe
    with "never" last, searched by position; "choice": words without an order.
    """

    name: str
    kind: str
    low: float = 0
    high: float = 0
    log: bool = False
    values: tuple[Value, ...] = ()

    def encode(self, value: Value) -> Value:
        """A value as the sampler sees it; the nearest possible one when it lies outside."""
        if self.kind == "choice":
            return value if value in self.values else self.values[0]
        if self.kind == "ordered":
            if value == NEVER:
                return len(self.values) - 1
            return min(range(len(self.values)), key=lambda i: abs(_number(self.values[i]) - _number(value)))
        clipped = min(max(_number(value), self.low), self.high)
        return round(clipped) if self.kind == "int" else clipped

    def to_data(self) -> Any:
        """The parameter as a search-space file writes it."""
        if self.values:
            return list(self.values)
        return {"low": self.low, "high": self.high, **({"log": True} if self.log else {})}

    def decode(self, raw: Value) -> Value:
        """The value that the sampler's choice stands for."""
        return self.values[int(raw)] if self.kind == "ordered" else raw


@dataclass(frozen=True)
class PromptSource:
    """source: "nano", "geneval" (GenEval-style prompts over COCO's classes, from the seed), "imagenet" (class indices, for
    VAR) or a file (.txt one prompt a line, .jsonl GenEval metadata).
    search, heldout: how many of each. micro_batch: images per batch in quality evaluation, fixed for the study. added: how
    many of the held-out ones a study took in later, in order; no space file says that."""

    source: str = "nano"
    search: int = 32
    heldout: int = 256
    micro_batch: int = 16
    added: tuple[int, ...] = ()


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space.

    model: name. quality: what counts, by metric; the first is the primary one.
    floors: metric -> smallest mean allowed.
    parameters: what is searched. enqueue: presets of stagevar.schedule evaluated first. semantic_end: first scale of
    the structure stage, from analysis; structure_end is never searched below it. proposals: schedules by name that are
    evaluated before the presets.
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
        """Names of the schedules that are evaluated before the sampler proposes any."""
        return (*(name for name, _ in self.proposals), *self.enqueue)

    def known_schedule(self, name: str, grids: Sequence[Grid]) -> StageSchedule:
        """The schedule of one of `known` for these scales. Raises ScheduleError for a preset that they cannot hold."""
        return dict(self.proposals).get(name) or preset(name, grids, registry.published(self.model))

    @property
    def digest(self) -> str:
        """SHA-256 of everything the space says."""
        text = json.dumps(self.contents, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def contents(self) -> dict[str, object]:
        """Everything the space says, by field, as the identity of a run holds it: metrics are as their file states them."""
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
        """Raises UsageError when a range does not fit a model of these scales."""
        scales = len(grids)
        for parameter in self.parameters:
            limit = {
                **dict.fromkeys(("structure_end", "cfg_delay", "rank_delay"), scales),
                "skip_last": scales - 1,
                "skip_inner": scales - 2,
            }
            if parameter.name not in limit:
                continue
            high = max((_number(v) for v in parameter.values if v != NEVER), default=parameter.high)
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
        """The space without the precisions that the device refuses (precision -> why).

        Raises UsageError when that leaves no precision at all.
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

        skip_last counts scales from the end, skip_inner those right before the last one that is run. fuse_layer is 0
        wherever the branches cannot be fused at the cutoff's scale.
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
        """The point of the space nearest to any schedule: where the sampler files an enqueued preset."""
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


def drawn_settings(
    space: SearchSpace, grids: Sequence[Grid], chunks: int, seed: int, at_most: int | None = None
) -> Iterator[tuple[dict[str, Value], Steps | None]]:
    """Values drawn uniformly from the space, repeats included, each with its expansion, None where it has none.

    at_most: draws; None goes on for ever.
    """
    rng = random.Random(seed)
    for _ in itertools.count() if at_most is None else range(at_most):
        values, steps = draw(space, rng), None
        with contextlib.suppress(ScheduleError):
            steps = space.schedule(values, grids).expand(grids, chunks)
        yield values, steps


def draws(
    space: SearchSpace, grids: Sequence[Grid], chunks: int, seed: int, at_most: int | None = None
) -> Iterator[Steps]:
    """The expansions among `drawn_settings`. at_most: draws, not schedules."""
    return (steps for _, steps in drawn_settings(space, grids, chunks, seed, at_most) if steps is not None)


def steps_key(steps: Steps) -> str:
    """Short name of an expansion; equal for schedules that do the same, whatever their parameters."""
    text = repr([dataclasses.replace(step, stage="") for step in steps])
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def space_names() -> list[str]:
    """Models that a search space is shipped for."""
    folder = importlib.resources.files("search_spaces")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_space(
    model: str,
    path: Path | str | None = None,
    resolution: str | int | None = None,
    findings: Findings | None = None,
) -> SearchSpace:
    """The space of a file, or the shipped one of a model, completed by the default space of the model at the resolution.

    findings: an analysis of the model, whose boundaries, ranks and proposals go before the default's, not before a file's.

    Raises UsageError in one line for whatever is wrong with it, for a range beyond the model's scales where these are known
    before it is loaded, and for a model that has neither a default space nor a shipped file.
    """
    spec = registry.find(model)
    data = default_space(spec, resolution) if spec.scales is not None else None
    if model in space_names():
        with importlib.resources.as_file(importlib.resources.files("search_spaces") / f"{model}.yaml") as shipped:
            data = _completed(read_yaml(shipped, "search space"), data)
    if findings is not None and data is not None:
        data = findings.applied(data)
    if path is not None:
        given = read_yaml(path, "search space")
        named = given.get("model") if isinstance(given, dict) else None
        if isinstance(named, str) and named != model:
            raise UsageError(f"search space {path} is for model {named!r}, not {model!r}")
        data = _completed(given, data)
    if data is None:
        raise UsageError(
            f"{model} has no default search space, since its scales are not known before it is loaded; "
            "write one and pass --space FILE"
        )
    space = parse_space(data)
    if spec.scales is not None:
        space.fit(registry.scale_grids(model, resolution))
    return space


def _completed(given: Any, base: dict[str, object] | None) -> Any:
    """What a file says, completed by `base`; as it is where there is none, or where the checks will refuse it."""
    return completed(given, base) if isinstance(given, dict) and base is not None else given


def parse_space(data: Any) -> SearchSpace:
    """Checked space from plain YAML data. Raises UsageError naming the key, the value and the nearest valid one."""
    sections = ("model", "objectives", "constraints", "parameters", "enqueue", "proposals", "prompts", "semantic_end")
    data = _mapping(data, "search space", sections)
    if not isinstance(data.get("model"), str):
        raise UsageError("search space: model is missing; name it, such as model: nano")
    objectives = _mapping(data.get("objectives"), "objectives", ("latency", "quality"))
    if objectives.keys() != {"latency", "quality"}:
        raise UsageError(
            "search space: objectives must be latency and quality, such as {latency: ms, quality: {clip_score: 1}}"
        )
    if objectives["latency"] != "ms":
        raise UsageError(f"search space: objective latency is {objectives['latency']!r}; write latency: ms")
    floors = _mapping(data.get("constraints") or {}, "constraints", ("floors",)).get("floors") or {}
    semantic_end = data.get("semantic_end", 0)
    if isinstance(semantic_end, bool) or not isinstance(semantic_end, int) or semantic_end < 0:
        raise UsageError(f"search space: semantic_end {semantic_end!r} must be a whole number of scales")
    found = _mapping(data.get("parameters"), "parameters", tuple(_RULES))
    parameters = tuple(_parameter(name, value) for name, value in found.items())
    if "structure_end" not in found:
        raise UsageError("search space: parameters lack structure_end, the first accelerated scale")
    for parameter in parameters:
        if parameter.name != "structure_end":
            continue
        first = min(map(_number, parameter.values), default=parameter.low)
        if first < semantic_end:
            raise UsageError(f"search space: structure_end starts at {first:g}, before semantic_end {semantic_end}")
    enqueue = data.get("enqueue") or []
    if not isinstance(enqueue, list):
        raise UsageError(f"search space: enqueue {enqueue!r} must be a list of presets: {', '.join(PRESETS)}")
    for name in enqueue:
        if name not in PRESETS:
            raise UsageError(f"search space: unknown preset {name!r} in enqueue{hint(name, PRESETS)}")
    return SearchSpace(
        data["model"],
        _quality(objectives["quality"]),
        _floors(floors),
        parameters,
        tuple(enqueue),
        _prompt_source(data.get("prompts") or {}),
        semantic_end,
        _proposals(data.get("proposals") or {}),
    )


def _proposals(data: Any) -> tuple[tuple[str, StageSchedule], ...]:
    """Named schedules. Raises UsageError naming the one that is none."""
    if not isinstance(data, dict):
        raise UsageError(
            f"search space: proposals {data!r:.60} must be schedules by name, such as {{mine: {{structure_end: 10}}}}"
        )
    found = []
    for name, schedule in data.items():
        if not isinstance(name, str) or not name or name in PRESETS:
            raise UsageError(f"search space: proposal {name!r:.60} must have a name of its own, not a preset's")
        try:
            found.append((name, StageSchedule.from_dict(schedule)))
        except ScheduleError as error:
            raise UsageError(f"search space: proposal {name:.60}: {error}") from None
    return tuple(found)


def _mapping(data: Any, what: str, known: Sequence[str]) -> dict[str, object]:
    if not isinstance(data, dict):
        raise UsageError(f"search space: {what} must be a mapping of {', '.join(known)}, not {type(data).__name__}")
    for key in data:
        if key not in known:
            raise UsageError(f"search space: unknown key {key!r} in {what}{hint(key, known)}")
    return data


def _number(value: Any) -> float:
    return math.inf if value == NEVER else float(value)


def _check(name: str, value: Any) -> Value:
    rule = _RULES[name]
    if name == "accelerator":
        rule = dataclasses.replace(rule, words=accelerator_names())
    if isinstance(value, str) and value in rule.words:
        return value
    valid = not isinstance(value, bool) and isinstance(value, int if rule.kind is int else int | float)
    if rule.kind is str or not valid or not rule.low <= value <= rule.high:
        words = ", ".join(rule.words)
        span = (
            ""
            if rule.kind is str
            else f"from {rule.low:g} to {rule.high:g}"
            if rule.high < math.inf
            else f">= {rule.low:g}"
        )
        nearest = did_you_mean(value, rule.words) if rule.kind is str else ""
        kind = "" if rule.kind is str else "a whole number " if rule.kind is int else "a number "
        raise UsageError(
            f"search space: {name} {value!r} must be {kind}{span}{' or ' if words and span else ''}{words}{nearest}"
        )
    checked: Value = rule.kind(value)
    return checked


def _parameter(name: str, data: Any) -> Parameter:
    rule = _RULES[name]
    if isinstance(data, list):
        if not data:
            raise UsageError(f"search space: {name} has an empty list; give at least one value")
        values = tuple(_check(name, value) for value in data)
        if len(set(values)) < len(values):
            raise UsageError(f"search space: {name} lists a value twice")
        if rule.kind is str:
            return Parameter(name, "choice", values=values)
        return Parameter(name, "ordered", values=tuple(sorted(values, key=_number)))
    if isinstance(data, dict) and rule.kind is not str:
        data = _mapping(data, name, ("low", "high", "log"))
        for bound in ("low", "high"):
            if bound not in data:
                raise UsageError(f"search space: {name} has no {bound}; write {{low: ..., high: ...}} or a list")
        low, high, log = _check(name, data["low"]), _check(name, data["high"]), data.get("log", False)
        if isinstance(low, str) or isinstance(high, str) or low > high:
            raise UsageError(f"search space: {name} runs from {low!r} to {high!r}; low must not exceed high")
        if not isinstance(log, bool) or (log and low <= 0):
            raise UsageError(f"search space: {name} log {log!r} must be true or false, and true needs low above 0")
        return Parameter(name, "int" if rule.kind is int else "float", low, high, log)
    shape = "a list of words" if rule.kind is str else "{low: ..., high: ...} or a list"
    raise UsageError(f"search space: {name} {data!r:.60} must be {shape}")


def _quality(data: Any) -> dict[str, QualitySpec]:
    """What counts, by metric, from `{geneval: 1.0}` or `{metrics: [{name: geneval, weight: 1, max_drop: 0.02}]}`."""
    if not isinstance(data, dict) or not data:
        raise UsageError(
            f"search space: quality {data!r:.60} must be metrics with weights, such as "
            "{metrics: [{name: clip_score, weight: 1, max_drop: 0.3}]}"
        )
    from tuner.metrics.registry import metric_names

    metrics: dict[str, Any] = _listed_metrics(data) if "metrics" in data else data
    for position, (name, value) in enumerate(metrics.items()):
        _metric(name, metric_names())
        weight = value.get("weight", 1.0) if isinstance(value, dict) else value
        number = not isinstance(weight, bool) and isinstance(weight, int | float) and 0 <= weight < math.inf
        if not number or (weight == 0 and position == 0):
            least = "above 0" if position == 0 else "of at least 0"
            raise UsageError(f"search space: quality weight of {name} is {weight!r}; it must be a number {least}")
        if isinstance(value, dict) and value.get("max_drop") is not None:
            check_max_drop(name, value["max_drop"], f"search space: max_drop {value['max_drop']!r} of {name}")
    return read_quality(metrics)


def _listed_metrics(data: dict[str, object]) -> dict[str, object]:
    listed = _mapping(data, "quality", ("metrics",))["metrics"]
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"search space: quality metrics {listed!r:.60} must be a list, such as [{{name: geneval}}]")
    found: dict[str, object] = {}
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UsageError(f"search space: quality metric {entry!r:.60} must have a name, such as {{name: geneval}}")
        if entry["name"] in found:
            raise UsageError(f"search space: quality lists {entry['name']} twice")
        found[entry["name"]] = {key: value for key, value in entry.items() if key != "name"}
    return found


def _floors(data: Any) -> dict[str, float]:
    if not isinstance(data, dict):
        raise UsageError(
            f"search space: floors {data!r:.60} must be metrics with their smallest mean, such as {{psnr: 20}}"
        )
    from tuner.metrics.registry import metric_names

    for name, value in data.items():
        _metric(name, metric_names())
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"search space: floor of {name} is {value!r}; it must be a number")
    return {name: float(value) for name, value in data.items()}


def _metric(name: Any, known: Sequence[str]) -> None:
    if name not in known:
        raise UsageError(f"search space: unknown metric {name!r}{hint(name, known)}")


def _prompt_source(data: Any) -> PromptSource:
    data = _mapping(data, "prompts", ("source", "search", "heldout", "micro_batch"))
    for name, value in data.items():
        if name == "source":
            if not isinstance(value, str):
                raise UsageError(
                    f"search space: prompts source {value!r} must be {', '.join(PROMPT_SOURCES)} or a file"
                )
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"search space: prompts {name} {value!r} must be a whole number of at least 1")
    return PromptSource(**data)


def expand(schedule: StageSchedule, grids: Sequence[Grid], chunks: int) -> tuple[Steps, str]:
    """The steps of a schedule and their key."""
    try:
        steps = schedule.expand(grids, chunks)
    except StagevarError as error:
        raise UsageError(f"search space: {error}") from None
    return steps, steps_key(steps)
