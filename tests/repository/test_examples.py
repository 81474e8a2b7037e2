"""Examples run as they are printed: scripts, the sweep, and a package of plug-ins with its own tests."""

import inspect
import json
import re
import runpy
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stagevar.analysis import find_similarity
from stagevar.models import registry
from stagevar.models.registry import load_model
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.schedule import paper
from stagevar.testing.accelerators import GRIDS
from stagevar.testing.tiny import tiny_infinity
from tests import ROOT
from tests.fakes import studies as fakes
from tests.fakes.plugin_package import install
from tuner.cli import doctor
from tuner.cli import tune as tune_command
from tuner.cluster.sweep import load_sweep
from tuner.config.space_file import load_space
from tuner.metrics.registry import create

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


def test_a_study_from_python_leaves_its_front_as_a_table(tmp_path, monkeypatch, capsys):
    def build(checked, progress, stop):
        return fakes.study(checked.run_dir, trials=checked.args.trials, command=checked.command, stop=stop)

    monkeypatch.setattr(tune_command, "build_study", build)
    main = runpy.run_path(str(EXAMPLES / "tune.py"))["main"]
    main("nano", "60%", str(tmp_path / "run"), trials=5, progress=False)
    front = pd.read_csv(tmp_path / "run" / "front.csv")
    said = capsys.readouterr().out.splitlines()
    assert len(front) >= 1 and front["on_front"].all()
    assert sum(" ms with " in line for line in said) == len(front)
    assert said[-1] == f"look at {tmp_path / 'run' / 'report.html'}"


# ------------------------------------------------------------------------------------------------ the notebook


NOTEBOOK = json.loads((EXAMPLES / "tune_nano.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_was_executed_from_top_to_bottom_and_kept_its_outputs():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CODE) and "error" not in {output["output_type"] for output in outputs}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "<b>verified</b>" in "".join(CODE[0]["outputs"][-1]["data"]["text/html"])
    assert not re.search(r"/(home|root|tmp|usr|work)/", json.dumps([cell["outputs"] for cell in CODE]))
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """On a make-believe study with the notebook's own options; `make notebook` executes the real one."""
    checked_options = []

    def build(checked, progress, stop):
        checked_options.append((checked.args.heldout, checked.args.fresh))
        return fakes.study(checked.run_dir, trials=checked.args.trials, command=checked.command, stop=stop)

    def expand(profile, model):  # the make-believe model has other scales
        return paper(model.grids).expand(model.grids, len(model.transformer.chunk_layers))

    monkeypatch.setattr(tune_command, "build_study", build)
    monkeypatch.setattr(Profile, "expand", expand)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    names = {}
    for cell in CODE:
        exec(compile("".join(cell["source"]), "tune_nano.ipynb", "exec"), names)
    assert len(checked_options) == 1 and names["result"].report == Path("../outputs/notebook/report.html")
    assert len(names["known"]) > len(names["front"]) >= 1
    assert "report: ../outputs/notebook/report.html" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the package of plug-ins

PLUGIN = EXAMPLES / "plugin"


@pytest.fixture(scope="module")
def acme(tmp_path_factory):
    """The package as an installer leaves it, by the entry points of its pyproject.toml."""
    points = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
    offers = {group: {name: target.split(":")[1] for name, target in names.items()} for group, names in points.items()}
    folder = install(tmp_path_factory.mktemp("site"), "acme", offers, (PLUGIN / "acme.py").read_text())
    sys.modules.pop("acme", None)  # of other tests' packages, by the same name
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("acme", None)


def test_the_plugins_are_offered_and_work_by_their_names(acme):
    assert [finding.state for finding in doctor.check_plugins()] == ["ok"] * 4
    assert registry.load_model("nano-warm", device="cpu").sampling.temperature[0] == 1.1
    space = load_space("nano", PLUGIN / "space.yaml")
    assert list(space.quality) == ["geneval_nano", "sharpness"]
    stripes = np.zeros((1, 8, 8, 3), np.uint8)
    stripes[:, ::2] = 255
    assert create("sharpness").score(stripes, ["stripes"]).tolist() == [127.5]
    assert find_similarity("palette").score(stripes, stripes).tolist() == [1.0]


def _contract(name):
    spec = spec_from_file_location("test_acme", PLUGIN / "test_acme.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def test_its_own_tests_are_the_contracts(acme):
    """Two of the accelerator's, all of the others'; the whole suite runs with `pytest examples/plugin`."""
    spread = _contract("TestSpread")
    model = tiny_infinity(GRIDS)
    spread.test_neutral_setting_is_exact_through_the_real_path(model, None)
    spread.test_a_batch_row_is_the_single_prompt(model, None)
    for contract in (_contract("TestPalette"), _contract("TestSharpness")):
        values = {"metric": contract.build(), "images": contract.draw()} if hasattr(contract, "draw") else {}
        for name in (name for name in dir(contract) if name.startswith("test_")):
            test = getattr(contract, name)
            test(**{key: values[key] for key in inspect.signature(test).parameters})
