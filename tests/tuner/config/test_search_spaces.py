"""The search spaces of the Infinity models: readable, within the scales of their model, the paper's setting inside."""

import pytest

from stagevar.models.registry import list_models, model_parts, published, resolve
from stagevar.schedule import StageSchedule, preset
from tuner.config.space_file import load_space


@pytest.mark.parametrize("name", [model.name for model in list_models() if model.family == "infinity"])
def test_a_space_fits_its_model_and_holds_the_papers_setting(name):
    parts = model_parts(resolve(name, weights="random", device="cpu"))
    chunks = len(parts.transformer.module.chunk_layers)
    space = load_space(name)
    space.fit(parts.grids)
    presets = {each: preset(each, parts.grids, published(name)) for each in space.enqueue}
    assert {"stagevar-paper", "stagevar-released", "fastvar"} <= set(presets)
    assert len({schedule.expand(parts.grids, chunks) for schedule in presets.values()}) == len(presets)

    paper = presets["stagevar-paper"]
    values = space.nearest_values(paper, parts.grids)
    assert values["structure_end"] == paper.structure_end and values["branch"] == "uncond" and values["cfg_delay"] == 0
    assert values["rank_ratio"] == 0.177
    back = space.schedule(values, parts.grids)
    assert isinstance(back, StageSchedule) and back.cfg_cutoff == paper.cfg_cutoff
    assert back.semantic_end == space.semantic_end <= paper.structure_end
