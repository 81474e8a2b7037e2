"""Writes the published JSON Schemas: `python -m tests.schemas`. A test compares them with what the code generates."""

import json

from stagevar.profile.json_schema import profile_schema
from tests import ROOT
from tuner.cluster.sweep_schema import sweep_schema
from tuner.config.json_schema import space_schema

SCHEMAS = {
    "stagevar/data/profile.schema.json": profile_schema,
    "search_spaces/search_space.schema.json": space_schema,
    "search_spaces/sweep.schema.json": sweep_schema,
}


def text_of(schema):
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    for name, make in SCHEMAS.items():
        (ROOT / name).write_text(text_of(make()))
        print(name)
