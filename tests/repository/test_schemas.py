"""The published JSON Schemas are what the code generates; YAML that we ship or write validates."""

import copy
import json
import re

import jsonschema
import pytest
import yaml

from stagevar.errors import UsageError
from stagevar.models import registry
from stagevar.profile import Profile
from tests import DATA, ROOT
from tests.schemas import SCHEMAS, text_of
from tuner.cluster.sweep import load_sweep
from tuner.config.default_space import default_space
from tuner.config.space import parse_space

PROFILE, SPACE, SWEEP = (json.loads((ROOT / name).read_text()) for name in SCHEMAS)
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
MODELINE = re.compile(r"^# yaml-language-server: \$schema=(\S+)$", re.MULTILINE)


def valid(data, schema):
    return jsonschema.Draft202012Validator(schema).is_valid(data)


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas_are_what_the_code_generates(name):
    schema = SCHEMAS[name]()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (ROOT / name).read_text() == text_of(schema), "run python -m tests.schemas"


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_shipped_spaces_validate_and_name_their_schema(path):
    text = path.read_text()
    jsonschema.validate(yaml.safe_load(text), SPACE)
    named = MODELINE.findall(text)
    assert len(named) == 1 and (path.parent / named[0]).name == "search_space.schema.json"
    assert (path.parent / named[0]).is_file()


def test_other_spaces_of_the_repository_validate():
    for path in (ROOT / "benchmarks").glob("*.yaml"):
        data = yaml.safe_load(path.read_text())
        if "parameters" in data:
            jsonschema.validate(data, SPACE)


@pytest.mark.parametrize("spec", [spec for spec in registry.list_models() if spec.scales], ids=lambda spec: spec.name)
def test_default_spaces_validate_as_plain_data(spec):
    jsonschema.validate(default_space(spec), SPACE)


def profiles():
    return sorted((DATA / "frozen").rglob("profile.yaml"))


@pytest.mark.parametrize("path", profiles(), ids=lambda path: path.parent.name)
def test_exported_profiles_validate(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), PROFILE)
    jsonschema.validate(Profile.load(path).to_dict(), PROFILE)


def test_there_is_an_exported_profile():
    assert profiles()


#: A path into nano's space, a value there, and whether it may stand there: reader and schema must agree.
CHANGES = [
    (("parameters", "structure_end"), {"low": 4, "high": 7}, True),
    (("parameters", "structure_end"), {"low": 4}, False),
    (("parameters", "structure_end"), [4.5], False),
    (("parameters", "cfg_delay"), [0, "never"], True),
    (("parameters", "cfg_delay"), [0, "always"], False),
    (("parameters", "cfg_delay"), [-1], False),
    (("parameters", "rank_ratio"), [0.5, 1.5], False),
    (("parameters", "rank_ratio"), [0.5, 0.5], False),
    (("parameters", "branch"), ["cond"], True),
    (("parameters", "branch"), {"low": 0, "high": 1}, False),
    (("parameters", "colour"), [1], False),
    (("objectives", "latency"), "s", False),
    (("objectives", "quality"), {"metrics": [{"name": "geneval_nano", "max_drop": 0.05}]}, True),
    (("objectives", "quality"), {"metrics": [{"weight": 1}]}, False),
    (("objectives", "quality"), {"beauty": 1}, False),
    (("objectives", "quality"), {"geneval_nano": -1}, False),
    (("constraints", "floors"), {"psnr": 18}, True),
    (("constraints", "floors"), {"psnr": "high"}, False),
    (("enqueue",), ["stagevar-paper"], True),
    (("enqueue",), ["stagevar-papre"], False),
    (("proposals",), {"mine": {"structure_end": 5, "rank_ratios": [0.5, [0.2, 0.1]]}}, True),
    (("proposals",), {"mine": {"structure_end": 5, "rank_ratios": [2]}}, False),
    (("proposals",), {"mine": {"skip": [1]}}, False),
    (("prompts", "heldout"), 0, False),
    (("prompts", "heldout"), 12, True),
    (("semantic_end",), 2, True),
    (("semantic_end",), "two", False),
]


@pytest.mark.parametrize(("place", "value", "accepted"), CHANGES, ids=lambda value: str(value)[:40])
def test_reader_and_schema_of_spaces_agree(place, value, accepted):
    data = copy.deepcopy(yaml.safe_load((ROOT / "search_spaces" / "nano.yaml").read_text()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert valid(data, SPACE) == accepted
    if accepted:
        parse_space(data)
    else:
        with pytest.raises(UsageError):
            parse_space(data)


@pytest.mark.parametrize(
    ("data", "accepted"),
    [
        ({"models": ["nano"], "budgets": ["60%", "80%"], "seeds": [0, 1], "options": {"trials": 8}}, True),
        ({"models": ["nano"], "budgets": ["60%"], "resources": {"cpus": 2}}, True),
        ({"models": ["nano"], "budgets": ["60%"], "model_options": {"nano": {"exhaustive": True}}}, True),
        ({"models": ["nano"]}, False),
        ({"models": [], "budgets": ["60%"]}, False),
        ({"models": ["nano", "nano"], "budgets": ["60%"]}, False),
        ({"models": ["nano"], "budgets": ["60%"], "options": {"out": "there"}}, False),
        ({"models": ["nano"], "budgets": ["60%"], "resources": {"cpus": -1}}, False),
        ({"models": ["nano"], "budgets": ["60%"], "model": "nano"}, False),
    ],
)
def test_reader_and_schema_of_sweeps_agree(data, accepted, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(data))
    assert valid(data, SWEEP) == accepted
    if accepted:
        load_sweep(path)
    else:
        with pytest.raises(UsageError):
            load_sweep(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), "stagevar-profile/0"),
        (("envelope", "engine"), "fast"),
        (("envelope", "batch"), "one"),
        (("schedule", "branch"), "both"),
        (("latency", "median_ms"), "quick"),
        (("verified",), "yes"),
        (("colour",), 1),
    ],
)
def test_a_profile_that_is_refused_does_not_validate(place, value, tmp_path):
    data = yaml.safe_load(profiles()[0].read_text())
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert not valid(data, PROFILE)
    with pytest.raises(UsageError):
        Profile.from_dict(data)
