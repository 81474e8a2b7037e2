"""Sweeps: what a sweep file may say, cells, table and report, and a sweep whose driver is killed and restored."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from stagevar.errors import UsageError
from tests import ROOT
from tests.fakes.ray_tune import FakeTune
from tuner.cli.sweep import RUNNER, check, run_cell
from tuner.cluster.sweep import AXES, CELL_FILE, check_cells, load_sweep, run_sweep
from tuner.report.sweep_page import write_table
from tuner.results.run_dir import driver_lock


def sweep_file(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


GRID = """
models: [nano, infinity-tiny]
budgets: [60%, 25ms]
seeds: [0, 1]
options: {trials: 6, max-drop: 0.1}
"""


def test_cells_are_every_combination_as_command_lines(tmp_path):
    cells = load_sweep(sweep_file(tmp_path, GRID)).cells()
    assert len(cells) == 8 == len({cell.name for cell in cells})
    assert cells[3].name == "nano-25ms-1"
    assert cells[3].argv == ("--model=nano", "--budget=25ms", "--seed=1", "--trials=6", "--max-drop=0.1")
    assert cells[0].resources == {"CPU": 1}
    check_cells(cells, check)


def test_options_of_one_model_win_over_those_of_all(tmp_path):
    text = f"{GRID}model_options: {{infinity-tiny: {{weights: random, trials: 3}}}}"
    cells = load_sweep(sweep_file(tmp_path, text)).cells()
    assert cells[3].argv == ("--model=nano", "--budget=25ms", "--seed=1", "--trials=6", "--max-drop=0.1")
    assert cells[7].argv == (
        "--model=infinity-tiny", "--budget=25ms", "--seed=1", "--trials=3", "--max-drop=0.1", "--weights=random",
    )  # fmt: skip
    check_cells(cells, check)


def test_what_only_the_nodes_have_is_not_asked_of_the_machine_that_starts_the_sweep(tmp_path):
    text = GRID.replace("trials: 6", "trials: 6, engine: graph, device: cuda, threads: 512")
    check_cells(load_sweep(sweep_file(tmp_path, text)).cells(), check)
    with pytest.raises(UsageError, match="'warp'"):
        check_cells(load_sweep(sweep_file(tmp_path, text.replace("engine: graph", "engine: warp"))).cells(), check)


def test_kinds_of_gpu_and_resolutions_are_axes(tmp_path):
    text = "models: [infinity-2b]\nbudgets: [1s]\nresolutions: [0.25M, 1M]\ngpus: [H100, L40]\nresources: {cpus: 4}"
    cells = load_sweep(sweep_file(tmp_path, text)).cells()
    assert [cell.name for cell in cells][:2] == ["infinity-2b-0.25M-1s-H100", "infinity-2b-0.25M-1s-L40"]
    assert cells[1].resources == {"CPU": 4, "GPU": 1, "accelerator_type:L40": 0.001}
    assert cells[1].argv == ("--model=infinity-2b", "--resolution=0.25M", "--budget=1s")
    check_cells(cells, check)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [nano]", "needs models and budgets"),
        ("models: nano\nbudgets: [60%]", "must be a list of different values"),
        ("models: [nano, nano]\nbudgets: [60%]", "must be a list of different values"),
        ("models: [nano]\nbudgets: [60%]\nmodel: x", "unknown key 'model'"),
        ("models: [nano]\nbudgets: [60%]\noptions: {out: here}", "option 'out' cannot be set"),
        ("models: [nano]\nbudgets: [60%]\noptions: {executor: ray}", "option 'executor' cannot be set"),
        ("models: [nano]\nbudgets: [60%]\nmodel_options: {nano: {out: here}}", "option 'out' cannot be set"),
        ("models: [nano]\nbudgets: [60%]\nmodel_options: {nano: 3}", "model_options of nano must be options"),
        ("models: [nano]\nbudgets: [60%]\nmodel_options: {nono: {trials: 3}}", "must name models of the sweep"),
        ("models: [nano]\nbudgets: [60%]\nresources: {gpus: many}", "must be a number of at least 0"),
        ("models: [nano]\nbudgets: [60%]\nresources: {ram: 3}", "must be {cpus: NUMBER, gpus: NUMBER}"),
        ("models: [nano]\nbudgets: [60%]\ngpus: [H100]\nresources: {gpus: 0}", "must give each cell a GPU"),
        ("models: [nano]\nbudgets: [[1]]", "must be a list of different values"),
        ("- nano", "needs models and budgets"),
    ],
)
def test_a_bad_sweep_file_is_one_line(tmp_path, text, message):
    with pytest.raises(UsageError, match=message.replace("{", r"\{").replace("}", r"\}")):
        load_sweep(sweep_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [nano, nono]\nbudgets: [60%]", "sweep cell nono-60pct: .*nano"),
        ("models: [nano]\nbudgets: [60]", "sweep cell nano-60: "),
        ("models: [nano]\nbudgets: [60%]\noptions: {trails: 3}", "did you mean --trials"),
    ],
)
def test_cells_are_checked_before_anything_runs(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        check_cells(load_sweep(sweep_file(tmp_path, text)).cells(), check)


def test_another_sweep_or_a_strange_folder_is_not_touched(tmp_path):
    cells = load_sweep(sweep_file(tmp_path, GRID)).cells()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is not empty and holds no sweep"):
        run_sweep(cells, strange, RUNNER)
    other = tmp_path / "other"
    (other / "cells").mkdir(parents=True)
    (other / "sweep.json").write_text('{"cells": []}')
    with pytest.raises(UsageError, match="holds another sweep"):
        run_sweep(cells, other, RUNNER)


def test_table_and_report_list_failures_and_escape_what_users_typed(tmp_path):
    good = {
        "cell": "a",
        "model": "nano",
        "budget": "60%",
        "seed": 0,
        "verdict": "verified",
        "full_ms": 20.0,
        "pick_ms": 10.0,
    }
    good |= {
        "speedup": 2.0,
        "quality": -0.01,
        "quality_low": -0.02,
        "quality_high": 0.0,
        "profile": "cells/a/profile.yaml",
    }
    bad = {"cell": "b", "model": "<b>x", "budget": "60%", "seed": 1, "verdict": "failed", "reason": "no <weights>"}
    table, report = write_table([good, bad], AXES.values(), tmp_path)
    rows = list(csv.DictReader(table.open()))
    assert [row["cell"] for row in rows] == ["a", "b"]
    assert rows[0]["seed"] == "0" and rows[0]["speedup"] == "2.0" and rows[1]["speedup"] == ""
    page = report.read_text()
    assert "1 of 2 studies finished" in page and "2.00x" in page and 'href="cells/a/profile.yaml"' in page
    assert "no &lt;weights&gt;" in page and "<b>x" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_sweep_that_is_killed_once_and_restored_ends_complete(ray_cluster, tmp_path):
    """2 models x 2 budgets, and a fifth cell that always fails, two at a time; the driver dies in the middle of the third."""
    (tmp_path / "driver-fake-b-60pct-0").touch()
    command = [sys.executable, "-m", "tests.fakes.cluster_sweep", str(tmp_path), ray_cluster.address]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    out = tmp_path / "out"
    done = {path.parent.name: path.stat().st_mtime_ns for path in out.glob(f"cells/fake-*/{CELL_FILE}")}
    assert 0 < len(done) < 4 and not (out / "sweep.csv").exists()

    restored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert restored.returncode == 0, restored.stderr[-2000:]
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["verdict"] for row in rows] == ["verified"] * 4 + ["failed"], [row.get("reason") for row in rows]
    assert "no such weights" in rows[4]["reason"] and rows[4]["cell"] == "broken-60pct-0"
    assert all((out / row["profile"]).is_file() and (out / row["report"]).is_file() for row in rows[:4])
    assert restored.stdout == ""  # Ray Tune's words are in a file
    assert "4 of 5 studies finished" in (out / "sweep.html").read_text()
    # What had ended was not run again; the cell that was cut off went on from its own journal.
    for name, written in done.items():
        assert (out / "cells" / name / CELL_FILE).stat().st_mtime_ns == written
    lines = [json.loads(line) for line in (out / "cells" / "fake-b-60pct-0" / "trials.jsonl").read_text().splitlines()]
    trials = [line["candidate"]["trial"] for line in lines if line["kind"] == "trial"]
    assert len(trials) == len(set(trials)) == 6


def outcome(verdict, code=0, reason=""):
    return {"verdict": verdict, "exit_code": code, "reason": reason}


def test_the_same_command_tries_again_what_has_no_verdict_and_keeps_the_rest(tmp_path, monkeypatch):
    tune = FakeTune().install(monkeypatch)
    cells = load_sweep(sweep_file(tmp_path, "models: [nano]\nbudgets: [60%]\nseeds: [0, 1, 2, 3, 4]")).cells()
    names = [cell.name for cell in cells]
    first = iter(
        [
            outcome("verified"),
            outcome("failed", 2, "is being driven by process 7"),
            outcome("partial", 130),
            outcome("failed", 6, "disk full"),
            outcome("infeasible", 3),
        ]
    )
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: next(first))
    rows = run_sweep(cells, tmp_path / "out", RUNNER)
    assert rows[1]["reason"] == "is being driven by process 7" and rows[3]["exit_code"] == 6
    (tmp_path / "out" / "tune").mkdir()  # what Ray Tune itself remembers of a run no longer counts
    tune.ran.clear()
    said = []
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: outcome("verified"))
    rows = run_sweep(cells, tmp_path / "out", RUNNER, say=said.append)
    assert tune.ran == names[1:4] and said[0] == f"continuing the sweep in {tmp_path / 'out'}: 3 of 5 cells left"
    assert said[1:3] == [f"cell {names[1]}: started", f"cell {names[1]}: verified"]
    assert [row["verdict"] for row in rows] == ["verified"] * 4 + ["infeasible"]

    (tmp_path / "out" / "cells" / names[2] / CELL_FILE).unlink()
    (tmp_path / "out" / "cells" / names[4] / CELL_FILE).write_text("torn")
    tune.ran.clear()
    run_sweep(cells, tmp_path / "out", RUNNER)
    assert tune.ran == [names[2], names[4]]
    monkeypatch.setattr("tuner.cluster.connection.connect", None)  # nothing left: no cluster either
    assert len(run_sweep(cells, tmp_path / "out", RUNNER)) == 5


def test_ctrl_c_leaves_stopped_cells_and_ends_with_130(tmp_path, monkeypatch, capsys):
    from tuner.cli import main

    out = tmp_path / "out"
    file = sweep_file(tmp_path, "models: [nano]\nbudgets: [60%]\nseeds: [0, 1, 2, 3]")
    (out / "cells" / "nano-60pct-2").mkdir(parents=True)
    cells = load_sweep(file).cells()
    plan = {"cells": [[cell.name, list(cell.argv), dict(cell.resources)] for cell in cells]}
    (out / "sweep.json").write_text(json.dumps(plan))
    (out / "cells" / "nano-60pct-2" / "trials.jsonl").touch()
    FakeTune(stop_after=2).install(monkeypatch)
    outcomes = iter([outcome("verified"), outcome("failed", 130, "rerun the same command to resume")])
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: next(outcomes))
    assert main(["sweep", str(file), "--out", str(out)]) == 130
    said = capsys.readouterr()
    assert "the same command continues" in said.err and "failed" not in said.out
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["verdict"] for row in rows] == ["verified", "stopped", "stopped", "stopped"]
    assert [row["reason"] for row in rows[2:]] == ["while it ran; what it measured is kept", "before it started"]
    page = (out / "sweep.html").read_text()
    assert "1 of 4 studies finished" in page and "<h2>Stopped" in page and "<h2>Failed" not in page
    again = FakeTune().install(monkeypatch)
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: outcome("verified"))
    assert main(["sweep", str(file), "--out", str(out), "--quiet"]) == 0
    assert again.ran == [row["cell"] for row in rows[1:]]


GPU_NODE = {"CPU": 8, "GPU": 2, "accelerator_type:H100": 1}


@pytest.mark.parametrize(
    ("more", "nodes", "occupied", "says", "visible"),
    [
        ("", [{"CPU": 8}, GPU_NODE], {"CPU": 1, "GPU": 1}, True, "0"),
        ("resources: {gpus: 0.5}", [GPU_NODE], {"CPU": 1, "GPU": 0.5}, False, "0"),
        ("resources: {gpus: 0}", [GPU_NODE], {"CPU": 1}, False, ""),
        ("options: {device: cpu}", [GPU_NODE], {"CPU": 1}, False, ""),
        ("", [{"CPU": 8}], {"CPU": 1}, False, ""),
    ],
)
def test_a_cell_has_a_gpu_of_its_own_unless_its_file_says_otherwise(
    tmp_path, monkeypatch, more, nodes, occupied, says, visible
):
    tune = FakeTune(nodes=nodes).install(monkeypatch)
    seen, said = [], []
    monkeypatch.setattr(
        "tuner.cli.sweep.run_cell",
        lambda argv, run_dir: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or outcome("verified"),
    )
    cells = load_sweep(sweep_file(tmp_path, f"models: [nano]\nbudgets: [60%]\n{more}")).cells()
    run_sweep(cells, tmp_path / "out", RUNNER, say=said.append)
    assert tune.resources == {"nano-60pct": occupied} and seen == [visible]
    assert any("each cell gets a GPU of its own" in line for line in said) == says


@pytest.mark.parametrize(
    ("more", "nodes", "message"),
    [
        (
            "gpus: [h200]",
            [GPU_NODE],
            "cell nano-60pct-h200: no GPU of kind 'h200' in the cluster, which has H100; correct",
        ),
        ("gpus: [H100]", [{"CPU": 8}], "no GPU of kind 'H100' in the cluster, which has no GPU of a known kind;"),
        (
            "resources: {gpus: 1}",
            [{"CPU": 8}, {"CPU": 4}],
            "needs 1 CPU and 1 GPU on one node; the largest node has 8 CPUs and 0 GPUs;",
        ),
        (
            "resources: {cpus: 64}",
            [GPU_NODE, {"CPU": 16}],
            "needs 64 CPUs and 1 GPU on one node; the largest node has 8 CPUs and 2 GPUs of kind H100;",
        ),
        (  # no single node has both
            "resources: {cpus: 16, gpus: 1}",
            [GPU_NODE, {"CPU": 16}],
            "needs 16 CPUs and 1 GPU on one node; the largest node has 8 CPUs and 2 GPUs of kind H100;",
        ),
    ],
)
def test_a_cell_that_fits_no_node_is_refused_in_one_line(tmp_path, monkeypatch, more, nodes, message):
    tune = FakeTune(nodes=nodes).install(monkeypatch)
    cells = load_sweep(sweep_file(tmp_path, f"models: [nano]\nbudgets: [60%]\n{more}")).cells()
    with pytest.raises(UsageError, match=message):
        run_sweep(cells, tmp_path / "out", RUNNER)
    assert tune.ran == []
    # Nothing ran yet, so the file may be corrected without another --out.
    cells = load_sweep(sweep_file(tmp_path, "models: [nano]\nbudgets: [60%]\nresources: {cpus: 4, gpus: 0}")).cells()
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: outcome("failed"))
    run_sweep(cells, tmp_path / "out", RUNNER)
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: outcome("verified"))
    cells = load_sweep(sweep_file(tmp_path, "models: [nano]\nbudgets: [60%]\nresources: {cpus: 2, gpus: 0}")).cells()
    assert run_sweep(cells, tmp_path / "out", RUNNER)[0]["verdict"] == "verified"
    assert tune.resources == {"nano-60pct": {"CPU": 2}} and tune.ran == ["nano-60pct"] * 2


def test_kinds_of_gpu_are_found_in_any_case(tmp_path, monkeypatch):
    tune = FakeTune(nodes=[{"CPU": 64}, GPU_NODE]).install(monkeypatch)
    cells = load_sweep(sweep_file(tmp_path, "models: [nano]\nbudgets: [60%]\ngpus: [h100]")).cells()
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: outcome("verified"))
    run_sweep(cells, tmp_path / "out", RUNNER)
    assert tune.resources == {"nano-60pct-h100": {"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}}


def test_relative_paths_are_those_of_the_folder_where_the_command_was_typed(tmp_path, monkeypatch):
    from tuner.cli import main

    FakeTune().install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAGEVAR_STORE", "shared")
    (tmp_path / "nano").mkdir()
    shutil.copy(ROOT / "search_spaces" / "nano.yaml", tmp_path / "mine.yaml")
    text = """
models: [nano, infinity-tiny]
budgets: [60%]
options: {storage: "sqlite:///rel.db", prompts: nano, max-drop: 0.6}
model_options: {nano: {space: mine.yaml}, infinity-tiny: {store: mine, prompts: geneval, weights: random}}
"""
    seen = []
    monkeypatch.setattr(
        "tuner.cli.sweep.run_cell",
        lambda argv, run_dir: seen.append((argv, os.environ["STAGEVAR_STORE"])) or outcome("verified"),
    )
    assert main(["sweep", str(sweep_file(tmp_path, text)), "--out", "out", "--quiet"]) == 0
    (first, store), (second, _) = seen
    assert store == str(tmp_path / "shared")
    assert f"--storage=sqlite:///{tmp_path}/rel.db" in first and "--prompts=nano" in first
    assert f"--space={tmp_path / 'mine.yaml'}" in first
    assert f"--store={tmp_path / 'mine'}" in second and "--weights=random" in second


def test_two_drivers_of_one_sweep_are_refused_in_one_line(tmp_path, monkeypatch):
    FakeTune().install(monkeypatch)
    cells = load_sweep(sweep_file(tmp_path, "models: [nano]\nbudgets: [60%]")).cells()
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: outcome("failed", 2))
    run_sweep(cells, tmp_path / "out", RUNNER)
    with driver_lock(tmp_path / "out"), pytest.raises(UsageError, match="is being driven by process"):
        run_sweep(cells, tmp_path / "out", RUNNER)
    assert (tmp_path / "out" / "cells" / cells[0].name / CELL_FILE).exists()


def test_the_verb_checks_its_file_first(tmp_path, capsys):
    from tuner.cli import main

    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert (
        main(["sweep", str(sweep_file(tmp_path, "models: [nono]\nbudgets: [60%]")), "--out", str(tmp_path / "o")]) == 2
    )
    assert "did you mean" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_cell_that_lost_its_infrastructure_is_not_done_and_the_sweep_ends_with_6(tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    from tuner import cli
    from tuner.cluster import sweep

    class Tune:
        Trainable = object
        PlacementGroupFactory = staticmethod(lambda *_, **__: None)
        with_resources = staticmethod(lambda kind, _: kind)

    outcomes = iter(
        [{"verdict": "failed", "exit_code": 6, "reason": "disk full"}, {"verdict": "verified", "exit_code": 0}]
    )
    monkeypatch.setattr("tuner.cli.sweep.run_cell", lambda argv, run_dir: next(outcomes))
    cell = {"name": "a", "argv": ["--seed", "0"]}
    trainable = sweep._trainable(Tune, "tuner.cli.sweep:run_cell", tmp_path)()
    trainable.config = {"cell": cell}
    done = tmp_path / "cells" / "a" / sweep.CELL_FILE
    with pytest.raises(RuntimeError, match="disk full"):
        trainable.step()
    row = sweep._row(SimpleNamespace(name="a", axes={}), tmp_path, "RuntimeError: disk full")
    assert not done.exists() and (row["exit_code"], row["reason"]) == (6, "RuntimeError: disk full")
    trainable.step()
    assert done.exists(), "the rerun tries it again"
    monkeypatch.setattr(sweep, "load_sweep", lambda path: SimpleNamespace(cells=list))
    monkeypatch.setattr(sweep, "check_cells", lambda cells, check: None)
    monkeypatch.setattr(
        sweep, "run_sweep", lambda *_, **__: [{**row, "cell": "a"}, {"cell": "b", "verdict": "verified"}]
    )
    assert cli.main(["sweep", "s.yaml", "--out", str(tmp_path), "--quiet"]) == 6


@pytest.mark.parametrize("ends", [True, False])
def test_a_cell_waits_for_the_process_of_a_killed_sweep(tmp_path, monkeypatch, ends):
    run_dir, held, waits = tmp_path / "cell", contextlib.ExitStack(), []
    run_dir.mkdir()
    held.enter_context(driver_lock(run_dir))

    def sleep(seconds):
        waits.append(seconds)
        if ends and len(waits) == 2:
            held.close()

    def study(words):
        with driver_lock(run_dir):
            return 5

    monkeypatch.setattr("tuner.cli.sweep.time.sleep", sleep)
    monkeypatch.setattr("tuner.cli.sweep.ENDING_S", 1e6 if ends else 0.0)
    monkeypatch.setattr("tuner.cli.command.main", study)
    with held:
        if ends:
            assert run_cell(["--model=nano"], run_dir)["exit_code"] == 5 and len(waits) == 2
        else:
            with pytest.raises(UsageError, match="is being driven by process"):
                run_cell(["--model=nano"], run_dir)
