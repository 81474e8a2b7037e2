"""The JSON Schema (draft 2020-12) of sweep files, built from the same tables that their reader checks against."""

from __future__ import annotations

from stagevar.profile.json_schema import DRAFT, Schema
from tuner.cluster.sweep import _NOT_IN_CELLS, AXES


def sweep_schema() -> Schema:
    """The schema of a sweep file: axes of the grid, options of every study or of one model's, resources of a cell."""
    values = {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": ["string", "integer", "number"]}}
    option = {"type": ["string", "integer", "number", "boolean"]}
    options = {
        "type": "object",
        "propertyNames": {"not": {"enum": list(_NOT_IN_CELLS)}},
        "additionalProperties": option,
    }
    amount = {"type": "number", "minimum": 0}
    return {
        "$schema": DRAFT,
        "title": "Sweep of stagevar-tune",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **dict.fromkeys(AXES, values),
            "options": options,
            "model_options": {"type": "object", "additionalProperties": options},
            "resources": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"cpus": amount, "gpus": amount},
            },
        },
        "required": ["models", "budgets"],
    }
