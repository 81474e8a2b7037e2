"""JSON Schemas (draft 2020-12) of what the runtime reads, made from the same annotations that its readers check against.

Editors complete and check YAML with them. A schema says types, keys and choices; what depends on a model, such as how many
scales it has, is checked when the file is loaded.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from stagevar.profile.envelope import Envelope
from stagevar.profile.profile import SCHEMA, SECTIONS, Profile
from stagevar.schedule import ACCELERATORS, BOTH, PRECISIONS, PROJECTIONS, StageSchedule

#: A JSON Schema as plain data.
Schema = dict[str, object]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
#: Fields of a schedule whose annotation is wider than what is accepted.
_SCHEDULE_CHOICES = {
    "branch": BOTH,
    "projection": PROJECTIONS,
    "rope": ("first", "index"),
    "site": ("chunk", "trunk"),
    "precision": PRECISIONS,
}


def schema_of(kind: Any) -> Schema:
    """The schema of an annotation, as `stagevar.sections.read_value` reads it. Raises TypeError for one it does not know."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, object):
        return {}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [schema_of(one) for one in inner]}
    if origin is tuple:
        return {"type": "array", "items": schema_of(inner[0])}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of(inner[1])}
    if dataclasses.is_dataclass(kind):
        return section_schema(typing.cast(type, kind))
    raise TypeError(f"no schema for the annotation {kind!r}")


def section_schema(kind: type) -> Schema:
    """The schema of a dataclass: its fields and no others; those without a default are required."""
    hints = typing.get_type_hints(kind)
    schema: Schema = {"type": "object", "additionalProperties": False}
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):
        schema["description"] = " ".join(kind.__doc__.split("\n\n")[0].split())
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    schema["properties"] = {field.name: schema_of(hints[field.name]) for field in fields}
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return schema | ({"required": required} if required else {})


def schedule_schema() -> Schema:
    """The schema of a StageSchedule's parameters."""
    schema = section_schema(StageSchedule)
    properties = typing.cast(dict[str, Schema], schema["properties"])
    for name, choices in _SCHEDULE_CHOICES.items():
        properties[name] = {"enum": list(choices)}
    names = {"enum": list(ACCELERATORS)}
    properties["accelerator"] = {"anyOf": [names, {"type": "array", "items": names, "minItems": 1}]}
    ratio = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    ratios = {"type": "array", "minItems": 1, "items": {"anyOf": [ratio, {"type": "array", "items": ratio}]}}
    properties["rank_ratios"] = {"anyOf": [ratios, {"type": "null"}]}
    for name in ("structure_end", "semantic_end", "rank_delay", "fuse_layer"):
        properties[name] = {"type": "integer", "minimum": 0}
    return schema


def profile_schema() -> Schema:
    """The schema of profile.yaml."""
    properties: Schema = {"schema": {"const": SCHEMA}}
    for name in (field.name for field in dataclasses.fields(Profile) if field.name != "schema"):
        if name in SECTIONS:
            properties[name] = section_schema(SECTIONS[name])
    properties |= {
        "schedule": schedule_schema(),
        "steps": {"type": "array", "items": {"type": "object"}},
        "envelope": section_schema(Envelope),
        "verified": {"type": "boolean"},
        "verdict": {"type": "string"},
        "reproduce": {"type": "string"},
    }
    required = [
        field.name
        for field in dataclasses.fields(Profile)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return {
        "$schema": DRAFT,
        "title": "Deployment profile of stagevar-tune",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": ["schema", *required],
    }
