"""Default spaces: every registered model tunes without a file of its own, at each of its resolutions; files complete them."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from stagevar.errors import UsageError
from stagevar.models import registry
from stagevar.models.registry import find, list_models, published, scale_grids
from stagevar.schedule import preset
from tests.fakes.studies import CHUNKS
from tuner.cli import main
from tuner.config.default_space import default_space
from tuner.config.space_file import load_space, parse_space

MODELS = [model.name for model in list_models()]
WITH_SCALES = [model.name for model in list_models() if model.scales is not None]


@pytest.mark.parametrize("model", MODELS)
def test_a_dry_run_of_every_model_ends_well_and_can_prove_its_limits_twice_over(model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", model, "--budget", "2s", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"] == model and plan["engine"] == "auto" and plan["limits"]
    for limit in plan["limits"]:
        assert limit["provable_drop"] <= limit["max_drop"] / 2, limit
        assert limit["provable_drop_discordant"] <= limit["max_drop"], limit
    source = plan["prompts"]["source"]
    assert source == {"nano": "nano", "var": "imagenet"}.get(find(model).family, "geneval")
    # What is printed is a search-space file: it reads back as the same space.
    said = {section: value for section, value in plan["space"].items() if section != "source"}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    assert load_space(model, tmp_path / "space.yaml").to_data() == load_space(model).to_data()


@pytest.mark.parametrize(("model", "resolution"), [(m, r) for m in WITH_SCALES for r in find(m).resolutions])
def test_a_default_space_fits_every_resolution_and_holds_the_carried_setting(model, resolution):
    space, grids = load_space(model, resolution=resolution), scale_grids(model, resolution)
    space.fit(grids)
    setting = preset("stagevar-paper", grids, published(model))
    nearest = space.nearest_values(setting, grids)
    assert nearest["structure_end"] == setting.structure_end and nearest["branch"] == "uncond"
    assert nearest["cfg_delay"] == 0 and nearest["rank_delay"] == setting.rank_delay
    assert space.semantic_end == setting.semantic_end == space.parameters[0].low
    assert space.parameters[0].high == len(grids) - 1
    row = published(model)
    chunks = row.chunks if row and row.chunks > 1 else CHUNKS
    expanded = {preset(name, grids, row).expand(grids, chunks) for name in space.enqueue}
    assert len(expanded) == len(space.enqueue) == 4 and space.enqueue[0] == "stagevar-paper"


def test_the_published_mean_share_is_searched_on_the_familys_own_scales_alone():
    def shares(model, resolution=None):
        return default_space(find(model), resolution)["parameters"]["rank_ratio"]

    assert shares("star-1.7b")[:2] == [0.02, 0.053] and 0.053 not in shares("star-1.7b-512")
    assert 0.177 in shares("infinity-8b") and 0.177 in shares("var-d16")


def write(tmp_path, **sections):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


def test_a_file_states_only_what_differs(tmp_path):
    default = load_space("infinity-8b")
    given = load_space("infinity-8b", write(tmp_path, model="infinity-8b", prompts={"heldout": 1024}))
    assert given == dataclasses.replace(default, prompts=dataclasses.replace(default.prompts, heldout=1024))


def test_the_advice_to_tune_on_ones_own_prompts_can_be_followed(tmp_path, capsys):
    """Without its comment signs, the block in infinity-8b.yaml is a space that needs nothing but the file of prompts."""
    shipped = (Path(__file__).parents[3] / "search_spaces" / "infinity-8b.yaml").read_text(encoding="utf-8")
    start = shipped.index("# prompts:\n")
    block = "\n".join(line.removeprefix("# ") for line in shipped[start : shipped.index("\n\n", start)].splitlines())
    (tmp_path / "prompts.txt").write_text("\n".join(f"a photo of car number {n}" for n in range(400)))
    advice = yaml.safe_load(block.replace("prompts.txt", str(tmp_path / "prompts.txt")))
    path = write(tmp_path, model="infinity-8b", **advice)
    assert load_space("infinity-8b", path).to_data()["objectives"]["latency"] == "ms"
    words = ["--model", "infinity-8b", "--budget", "2s", "--dry-run"]
    assert main([*words, "--space", str(path)]) == 0
    capsys.readouterr()
    assert main([*words, "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "no GenEval metadata (tag, include); give JSONL with it, or judge by metrics" in capsys.readouterr().err


def test_given_parameters_replace_the_defaults_and_bring_the_boundary_down(tmp_path):
    early = {"structure_end": {"low": 3, "high": 5}, "branch": ["cond"]}
    space = load_space("infinity-8b", write(tmp_path, model="infinity-8b", parameters=early))
    assert [p.name for p in space.parameters] == ["structure_end", "branch"] and space.semantic_end == 3
    late = {"structure_end": [9, 11]}
    assert load_space("infinity-8b", write(tmp_path, model="infinity-8b", parameters=late)).semantic_end == 7
    with pytest.raises(UsageError, match="before semantic_end 5"):
        load_space("infinity-8b", write(tmp_path, model="infinity-8b", parameters=early, semantic_end=5))


@pytest.mark.parametrize(
    "parameters", ["all", [], {"structure_end": None}, {"structure_end": {"low": "a"}}, {"structure_end": [True]}, {}]
)
def test_parameters_that_cannot_be_read_are_one_line(tmp_path, parameters):
    with pytest.raises(UsageError, match="search space"):
        load_space("infinity-8b", write(tmp_path, model="infinity-8b", parameters=parameters))


def test_a_range_beyond_the_scales_of_the_resolution_is_refused_before_loading(tmp_path, capsys):
    file = write(tmp_path, model="infinity-8b", parameters={"structure_end": {"low": 7, "high": 12}})
    words = ["--model", "infinity-8b", "--budget", "2s", "--space", str(file), "--dry-run"]
    assert main(words) == 0
    assert main([*words, "--resolution", "512"]) == 2
    assert "structure_end reaches 12, but infinity-8b has 10 scales" in capsys.readouterr().err
    assert main(["--model", "infinity-8b", "--budget", "2s", "--resolution", "512", "--dry-run"]) == 0


def test_a_model_without_scales_or_file_is_named(monkeypatch):
    monkeypatch.setattr(registry, "SPECS", dict(registry.SPECS))
    registry.register(dataclasses.replace(find("nano"), name="strange", scales=None))
    with pytest.raises(UsageError, match=r"strange has no default search space.*--space FILE"):
        load_space("strange")


def test_the_default_is_data_that_the_checks_of_files_read():
    for model in WITH_SCALES:
        assert parse_space(default_space(find(model))).model == model
