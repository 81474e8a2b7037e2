"""Examples run as they are printed: the deployment script draws, the sweep is one that would start."""

import re
import runpy
import sys

from stagevar.models.registry import load_model
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.schedule import paper
from tests.test_house import ROOT
from tuner.cluster.sweep import load_sweep

EXAMPLES = ROOT / "examples"


def test_the_deployment_script_draws_with_a_profile(tmp_path, monkeypatch, capsys):
    nano = load_model("nano", device="cpu")
    schedule = paper(nano.grids)
    Profile(
        model={"name": "nano", "weights": nano.provenance["weights"], "load": nano.provenance["load"]},
        schedule=schedule,
        steps=steps_to_data(schedule.expand(nano.grids, len(nano.transformer.chunk_layers))),
        sampling={},
        envelope=present_envelope(nano, batch=1, threads=None),
        verified=False,
        verdict="made by a test",
    ).save(tmp_path / "profile.yaml")
    words = [str(tmp_path / "profile.yaml"), "a photo of a red circle", str(tmp_path / "circle.png")]
    monkeypatch.setattr(sys, "argv", ["deploy.py", *words])
    runpy.run_path(str(EXAMPLES / "deploy.py"), run_name="__main__")
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")
    assert re.fullmatch(r"made by a test\n\d+ ms\n", capsys.readouterr().out)


def test_the_sweep_has_a_cell_per_budget_and_seed():
    cells = load_sweep(EXAMPLES / "sweep.yaml").cells()
    assert [cell.axes["budget"] for cell in cells] == ["60%", "60%", "75%", "75%"]
    assert all("--trials=20" in cell.argv for cell in cells)
