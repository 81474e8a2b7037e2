"""JSON Schemas (draft 2020-12) of search spaces and sweeps, built from the same tables that their readers check against.

A search space states only what differs from its model's default, so almost nothing is required.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stagevar.profile.json_schema import DRAFT, Schema, schedule_schema
from stagevar.schedule import PRESETS
from tuner.config.parameters import NEVER, RULES
from tuner.config.space import PROMPT_SOURCES
from tuner.metrics.registry import METRIC_NAMES

_FINITE: Schema = {"type": "number"}
_NOT_NEGATIVE = {"type": "number", "minimum": 0}
_COUNT = {"type": "integer", "minimum": 1}


def _closed(properties: Mapping[str, Schema], **more: Any) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties), **more}


def parameter_schema(name: str) -> Schema:
    """What a search space may say about a parameter: a range, a list of numbers, or a list of words."""
    rule = RULES[name]
    if rule.kind is str:
        return {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"enum": list(rule.words)}}
    number: Schema = {"type": "integer" if rule.kind is int else "number"}
    number |= {"minimum": rule.low} if rule.low > -math.inf else {}
    number |= {"maximum": rule.high} if rule.high < math.inf else {}
    value = {"anyOf": [number, {"enum": list(rule.words)}]} if rule.words else number
    interval = _closed({"low": number, "high": number, "log": {"type": "boolean"}}, required=["low", "high"])
    return {"anyOf": [interval, {"type": "array", "minItems": 1, "uniqueItems": True, "items": value}]}


def space_schema(metric_names: Sequence[str] = METRIC_NAMES) -> Schema:
    """The schema of a search-space file. metric_names: those that quality and floors may name."""
    weights: Schema = {"weight": _NOT_NEGATIVE, "max_drop": {"type": ["number", "null"]}}
    options = {"type": "object", "properties": weights}
    listed = {
        **options,
        "properties": {"name": {"enum": list(metric_names)}, **weights},
        "required": ["name"],
    }
    quality = _closed(
        {
            **{name: {"anyOf": [_NOT_NEGATIVE, options]} for name in metric_names},
            "metrics": {"type": "array", "minItems": 1, "items": listed},
        },
        minProperties=1,
    )
    sources: Schema = {"anyOf": [{"enum": list(PROMPT_SOURCES)}, {"type": "string"}]}
    prompts = _closed({"source": sources, "search": _COUNT, "heldout": _COUNT, "micro_batch": _COUNT})
    floors = _closed(dict.fromkeys(metric_names, _FINITE))
    return {
        "$schema": DRAFT,
        "title": "Search space of stagevar-tune",
        "description": f"Numbers may be searched by position; cfg_delay may be {NEVER!r}, which keeps guidance throughout.",
        **_closed(
            {
                "model": {"type": "string"},
                "objectives": _closed({"latency": {"const": "ms"}, "quality": quality}),
                "constraints": _closed({"floors": floors}),
                "parameters": _closed({name: parameter_schema(name) for name in RULES}),
                "enqueue": {"type": "array", "items": {"enum": list(PRESETS)}},
                "proposals": {"type": "object", "additionalProperties": schedule_schema()},
                "prompts": prompts,
                "semantic_end": {"type": "integer", "minimum": 0},
            }
        ),
    }
