"""Reading search spaces: a model's shipped file or one of the user's, completed by the default space and checked key by key."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagevar.errors import ScheduleError, UsageError, hint
from stagevar.models import registry
from stagevar.schedule import PRESETS, StageSchedule
from stagevar.yaml_files import read_yaml
from tuner.config.analysis import Findings
from tuner.config.default_space import completed, default_space
from tuner.config.parameters import RULES, as_number, checked_mapping, read_parameter
from tuner.config.quality import check_max_drop
from tuner.config.space import PROMPT_SOURCES, PromptSource, SearchSpace
from tuner.metrics.quality_spec import QualitySpec, read_quality


def space_names() -> list[str]:
    """Models that have a shipped search space."""
    folder = importlib.resources.files("search_spaces")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_space(
    model: str,
    path: Path | str | None = None,
    resolution: str | int | None = None,
    findings: Findings | None = None,
) -> SearchSpace:
    """The space in a file, or the one shipped for a model, completed by the model's default space at the resolution.

    Args:
        model: a registered model.
        path: the file, None for the shipped one.
        resolution: of the images, None for the model's own.
        findings: an analysis of the model; its boundaries, ranks and proposals override the default space, not a file.

    Raises:
        UsageError: in one line, for anything wrong with the file, for a range beyond the model's scales if these are known
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
            "write one and pass it with --space FILE"
        )
    space = parse_space(data)
    if spec.scales is not None:
        space.fit(registry.scale_grids(model, resolution))
    return space


def _completed(given: Any, base: dict[str, object] | None) -> Any:
    """What a file says, completed by `base`; unchanged if there is no base, or if the checks will reject it."""
    return completed(given, base) if isinstance(given, dict) and base is not None else given


def parse_space(data: Any) -> SearchSpace:
    """Checked space from plain YAML data. Raises UsageError naming the key, the value and the nearest valid one."""
    sections = ("model", "objectives", "constraints", "parameters", "enqueue", "proposals", "prompts", "semantic_end")
    data = checked_mapping(data, "search space", sections)
    if not isinstance(data.get("model"), str):
        raise UsageError("search space: model is missing; name it, such as model: nano")
    objectives = checked_mapping(data.get("objectives"), "objectives", ("latency", "quality"))
    if objectives.keys() != {"latency", "quality"}:
        raise UsageError(
            "search space: objectives must be latency and quality, such as {latency: ms, quality: {clip_score: 1}}"
        )
    if objectives["latency"] != "ms":
        raise UsageError(f"search space: objective latency is {objectives['latency']!r}; write latency: ms")
    floors = checked_mapping(data.get("constraints") or {}, "constraints", ("floors",)).get("floors") or {}
    semantic_end = data.get("semantic_end", 0)
    if isinstance(semantic_end, bool) or not isinstance(semantic_end, int) or semantic_end < 0:
        raise UsageError(f"search space: semantic_end {semantic_end!r} must be a whole number of scales")
    found = checked_mapping(data.get("parameters"), "parameters", tuple(RULES))
    parameters = tuple(read_parameter(name, value) for name, value in found.items())
    if "structure_end" not in found:
        raise UsageError("search space: parameters lack structure_end, the first accelerated scale")
    for parameter in parameters:
        if parameter.name != "structure_end":
            continue
        first = min(map(as_number, parameter.values), default=parameter.low)
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
    """Named schedules. Raises UsageError naming an invalid one."""
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
    listed = checked_mapping(data, "quality", ("metrics",))["metrics"]
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
    data = checked_mapping(data, "prompts", ("source", "search", "heldout", "micro_batch"))
    for name, value in data.items():
        if name == "source":
            if not isinstance(value, str):
                raise UsageError(
                    f"search space: prompts source {value!r} must be {', '.join(PROMPT_SOURCES)} or a file"
                )
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"search space: prompts {name} {value!r} must be a whole number of at least 1")
    return PromptSource(**data)
