"""The published JSON Schemas are what the code generates; YAML that we ship or write validates."""

import copy
import json
import re
import subprocess

import jsonschema
import pytest
import yaml

from stagevar.errors import UsageError
from stagevar.models import registry
from stagevar.profile import PROFILE_JSON_SCHEMA, Profile
from tests import DATA, ROOT
from tests.frozen import SAMPLE
from tests.schemas import SCHEMAS, text_of
from tuner.cluster.sweep import load_sweep
from tuner.config.default_space import default_space
from tuner.config.space_file import parse_space
from tuner.report.export import export
from tuner.results.result import StudyResult
from tuner.results.run_dir import discard

PROFILE, SPACE, SWEEP = (json.loads((ROOT / name).read_text()) for name in SCHEMAS)
MODELINE = re.compile(r"# yaml-language-server: \$schema=(\S+)")


def valid(data, schema):
    return jsonschema.Draft202012Validator(schema).is_valid(data)


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas_are_what_the_code_generates(name):
    schema = SCHEMAS[name]()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (ROOT / name).read_text() == text_of(schema), "run python -m tests.schemas"


def shipped():
    """Every YAML file of the repository but those of other tools and of earlier versions, which stand as they were written."""
    listed = subprocess.run(["git", "ls-files", "*.yaml"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split() if not name.startswith((".", "tests/data/"))]


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_shipped_files_name_their_schema_first_and_validate(path):
    first, text = path.read_text().split("\n", 1)
    named = path.parent / MODELINE.fullmatch(first)[1]
    assert named.resolve().relative_to(ROOT).as_posix() in SCHEMAS
    data = yaml.safe_load(text)
    if path.parent.name == "plugin":  # names of its own, which no schema of ours can know
        data["objectives"]["quality"]["metrics"][1]["name"] = "ssim"
        data["parameters"]["accelerator"] = ["fastvar"]
    jsonschema.validate(data, json.loads(named.read_text()))


def test_a_run_lays_the_schema_beside_the_profile_that_names_it(tmp_path):
    paths = export(StudyResult.load(SAMPLE), tmp_path)
    first = paths[0].read_text().split("\n", 1)[0]
    assert (tmp_path / MODELINE.fullmatch(first)[1]).read_bytes() == PROFILE_JSON_SCHEMA.read_bytes()
    assert PROFILE_JSON_SCHEMA.relative_to(ROOT).as_posix() in SCHEMAS
    assert Profile.load(paths[0]) == Profile.load(SAMPLE / "profile.yaml")
    discard(tmp_path)
    assert list(tmp_path.iterdir()) == []


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
