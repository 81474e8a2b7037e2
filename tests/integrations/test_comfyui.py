"""ComfyUI's nodes with nano, run as ComfyUI runs them: entry point, schema, validation, execution.

Against ComfyUI's own code where COMFYUI names a checkout, else against the part of its published interface that they use.
"""

import asyncio
import importlib.util
import inspect
import os
import re
import shutil
import sys
import tomllib

import numpy as np
import pytest
import torch

from stagevar.models.registry import load_model
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import exact, paper
from tests import ROOT
from tests.fakes import comfyui as comfy_stand_in
from tests.fakes.serving import save_profile

FOLDER = ROOT / "integrations" / "comfyui"
PROMPT = "a photo of two blue stars"


@pytest.fixture(scope="module")
def nodes():
    """The three classes by node id, from the folder's entry point."""
    with pytest.MonkeyPatch.context() as patch:
        if checkout := os.environ.get("COMFYUI"):
            patch.syspath_prepend(checkout)
        else:
            for name, module in comfy_stand_in.modules().items():
                patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("stagevar_nodes", FOLDER / "__init__.py")
        package = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "stagevar_nodes", package)
        spec.loader.exec_module(package)
        extension = asyncio.run(package.comfy_entrypoint())
        found = asyncio.run(extension.get_node_list())
        yield {node.GET_SCHEMA().node_id: node for node in found}
        sys.modules.pop("stagevar_nodes.nodes", None)


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", device="cpu")


@pytest.fixture(scope="module")
def profile(nano, tmp_path_factory):
    return save_profile(nano, tmp_path_factory.mktemp("comfy") / "profile.yaml", 2)


@pytest.fixture(scope="module")
def pipeline(nodes, profile):
    loaded, verdict = nodes["StageVarLoadProfile"].execute(profile=profile, device="cpu").result
    assert verdict == "verified: made by a test"
    return loaded


def drawn(nano, schedule, seed):
    steps = schedule.expand(nano.grids, len(nano.transformer.chunk_layers))
    return Sampler(nano).generate([PROMPT], [seed], steps)[0]


def test_three_nodes_whose_inputs_are_what_they_execute_with(nodes):
    assert sorted(nodes) == ["StageVarCompare", "StageVarGenerate", "StageVarLoadProfile"]
    for node in nodes.values():
        schema = node.GET_SCHEMA()
        parameters = inspect.signature(node.execute).parameters
        assert [one.id for one in schema.inputs] == list(parameters)
        optional = {name for name, parameter in parameters.items() if parameter.default is not parameter.empty}
        assert {one.id for one in schema.inputs if one.optional} <= optional, "an input that is left out has a default"
        assert schema.category == "stagevar" and schema.display_name and schema.description
    made = nodes["StageVarLoadProfile"].GET_SCHEMA().outputs[0].io_type
    assert {nodes[name].GET_SCHEMA().inputs[0].io_type for name in ("StageVarGenerate", "StageVarCompare")} == {made}


def test_a_profile_that_cannot_be_read_is_refused_at_its_node(nodes, profile, tmp_path):
    check = nodes["StageVarLoadProfile"].validate_inputs
    assert check(profile=profile) is True
    assert "missing.yaml" in check(profile="missing.yaml")
    (tmp_path / "bad.yaml").write_text("schema: other/1\n")
    assert "schema 'other/1' is not supported" in check(profile=str(tmp_path / "bad.yaml"))


def test_the_model_is_loaded_again_when_the_profile_changed(nodes, profile, tmp_path):
    fingerprint = nodes["StageVarLoadProfile"].fingerprint_inputs
    copy = tmp_path / "copy.yaml"
    shutil.copy(profile, copy)
    before = fingerprint(profile=str(copy), device="cpu")
    assert fingerprint(profile=str(copy), device="cpu") == before
    copy.write_text(copy.read_text() + "\n")
    assert fingerprint(profile=str(copy)) != before
    assert fingerprint(profile="missing.yaml") == ("missing.yaml", None)


def test_images_are_those_of_generate_as_comfyui_wants_them(nodes, pipeline, nano):
    [images] = nodes["StageVarGenerate"].execute(pipeline=pipeline, prompt=PROMPT, seed=4, images=3).result
    assert images.shape == (3, 64, 64, 3) and images.dtype == torch.float32 and images.device.type == "cpu"
    assert images.min() >= 0 and images.max() <= 1
    first = (images[0] * 255).round().to(torch.uint8).numpy()
    assert np.abs(first.astype(int) - drawn(nano, paper(nano.grids), 4).astype(int)).max() <= 2
    [other] = (
        nodes["StageVarGenerate"].execute(pipeline=pipeline, prompt=PROMPT, seed=4, negative="a red circle").result
    )
    assert not torch.equal(other[0], images[0])


def test_comparing_gives_both_images_and_both_latencies(nodes, pipeline, nano):
    tuned, full, line = nodes["StageVarCompare"].execute(pipeline=pipeline, prompt=PROMPT, seed=4).result
    for image, schedule in ((tuned, paper(nano.grids)), (full, exact(len(nano.grids)))):
        assert image.shape == (1, 64, 64, 3)
        assert np.array_equal((image[0] * 255).round().to(torch.uint8).numpy(), drawn(nano, schedule, 4))
    assert re.fullmatch(r"tuned \d+ ms, full \d+ ms: [\d.]+x, one run each after a warm-up run", line)


def test_both_schedules_of_a_comparison_run_on_the_profiles_threads(nodes, pipeline, monkeypatch):
    before, during, generate = torch.get_num_threads(), [], Sampler.generate

    def counting(self, *args, **options):
        during.append(torch.get_num_threads())
        return generate(self, *args, **options)

    monkeypatch.setattr(Sampler, "generate", counting)
    torch.set_num_threads(2)
    try:
        nodes["StageVarCompare"].execute(pipeline=pipeline, prompt=PROMPT, seed=4)
    finally:
        torch.set_num_threads(before)
    assert pipeline.threads == 1 and during == [1, 1, 1, 1]


def test_the_folder_can_be_published():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert "comfyui" not in project["project"]["name"].lower(), "the registry's rule"
    assert project["tool"]["comfy"]["PublisherId"] and project["project"]["dependencies"] == ["stagevar-tune[infinity]"]
