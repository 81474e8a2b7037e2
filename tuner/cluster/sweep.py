"""`stagevar-tune sweep sweep.yaml`: one study per cell of a grid, run as Ray Tune trials; one table, one report.

Each cell is the command that a user would type, with its own resources and run directory (`<out>/cells/<name>/`, with
profile.yaml and report.html). Ray Tune starts cells as resources allow and restarts a cell whose process dies (the study
resumes). A cell that fails is listed and stops no other. What a sweep has done is in its cells' folders alone: the same
command runs every cell that has no verdict yet, whatever ended the run before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pkgutil
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagevar.console import STOPPED
from stagevar.errors import InfrastructureError, UsageError, first_line
from stagevar.files import write_text_atomically
from stagevar.folders import visible
from stagevar.profile import plain
from stagevar.yaml_files import read_yaml
from tuner.cluster.nodes import KIND_PREFIX
from tuner.cluster.sweep_placement import placed, with_default_gpus
from tuner.cluster.worker import free_memory
from tuner.report.sweep_page import write_table
from tuner.results.run_dir import EVIDENCE_FILE, LOCK_FILE, driver_lock

AXES = {"models": "model", "resolutions": "resolution", "budgets": "budget", "gpus": "gpu", "seeds": "seed"}
SWEEP_FILE, CELL_FILE = "sweep.json", "cell.json"
RAY_FOLDER, RAY_LOG = "tune", "ray_tune.log"
#: Outcomes that the same command tries again.
_OPEN = ("failed", "partial")
#: Options that a cell may not have: with them it would not be a full study in one process, or the sweep sets them.
_NOT_IN_CELLS = (
    "executor",
    "ray-address",
    "gpu-kind",
    "out",
    "fresh",
    "dry-run",
    "json",
    "quiet",
    "verbose",
    *AXES.values(),
)
#: How often a cell whose process died is restarted.
RESTARTS = 2


@dataclass(frozen=True)
class Cell:
    """One study: its name, the options that distinguish it from the others, its command line and its resources."""

    name: str
    axes: Mapping[str, object]
    argv: tuple[str, ...]
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file.

    Attributes:
        axes: values per axis of the grid.
        options: further options of every study, by their names on the command line.
        model_options: the same for the studies of one model, by its name; they take precedence.
        cpus, gpus: what each cell occupies; gpus may be a fraction, None leaves it to the cluster.
    """

    axes: Mapping[str, tuple[Any, ...]]
    options: Mapping[str, object] = field(default_factory=dict)
    model_options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    cpus: float = 1
    gpus: float | None = None

    def cells(self) -> list[Cell]:
        """Every combination, in the order of the file."""
        found = []
        for values in itertools.product(*self.axes.values()):
            axes = dict(zip((AXES[axis] for axis in self.axes), values, strict=True))
            name = "-".join(str(value).replace("%", "pct").replace("/", "_") for value in axes.values())
            words: list[str] = []
            given = {**self.options, **self.model_options.get(axes["model"], {})}
            for option, value in {**{k: v for k, v in axes.items() if k != "gpu"}, **given}.items():
                if value is True:
                    words.append(f"--{option}")
                elif value is not False and value is not None:
                    words.append(f"--{option}={value}")
            resources: dict[str, float] = {"CPU": self.cpus} if self.cpus else {}
            if self.gpus is not None:
                resources["GPU"] = self.gpus
            elif given.get("device") == "cpu":
                resources["GPU"] = 0
            if "gpu" in axes:
                resources[f"{KIND_PREFIX}{axes['gpu']}"] = 0.001
            found.append(Cell(name, axes, tuple(words), resources))
        return found


def load_sweep(path: Path | str) -> Sweep:
    """Reads a sweep file. Raises UsageError naming the key and what it may be."""
    data = read_yaml(Path(path), "sweep")
    allowed = (*AXES, "options", "model_options", "resources")
    for key in data if isinstance(data, dict) else ():
        if key not in allowed:
            raise UsageError(f"sweep: unknown key {key!r}; use {', '.join(allowed)}")
    if not isinstance(data, dict) or not data.get("models") or not data.get("budgets"):
        raise UsageError("sweep: needs models and budgets, such as models: [nano], budgets: [60%, 80%]")
    axes: dict[str, tuple[Any, ...]] = {}
    for axis in AXES:
        values = data.get(axis)
        if values is None:
            continue
        simple = isinstance(values, list) and values and all(isinstance(v, str | int | float) for v in values)
        if not simple or len(set(map(str, values))) != len(values):
            raise UsageError(f"sweep: {axis} {values!r:.60} must be a list of different values")
        axes[axis] = tuple(values)
    options = _options(data.get("options") or {}, "options")
    by_model = data.get("model_options") or {}
    if not isinstance(by_model, dict) or by_model.keys() - set(axes["models"]):
        raise UsageError(f"sweep: model_options {by_model!r:.60} must name models of the sweep: {axes['models']}")
    by_model = {model: _options(given, f"model_options of {model}") for model, given in by_model.items()}
    resources = data.get("resources") or {}
    if not isinstance(resources, dict) or resources.keys() - {"cpus", "gpus"}:
        raise UsageError(f"sweep: resources {resources!r:.60} must be {{cpus: NUMBER, gpus: NUMBER}}")
    for name, amount in resources.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 0:
            raise UsageError(f"sweep: resources {name} {amount!r} must be a number of at least 0")
    sweep = Sweep(
        axes, options, by_model, resources.get("cpus", 1), resources.get("gpus", 1 if "gpus" in axes else None)
    )
    if "gpus" in axes and sweep.gpus == 0:
        raise UsageError("sweep: gpus names kinds of GPU, so resources must give each cell a GPU, such as {gpus: 1}")
    return sweep


def _options(given: Any, where: str) -> dict[str, object]:
    """Options with their values. Raises UsageError."""
    if not isinstance(given, dict) or not all(isinstance(v, str | int | float | bool) for v in given.values()):
        raise UsageError(f"sweep: {where} must be options of stagevar-tune with their values, such as {{trials: 30}}")
    for name in given:
        if name in _NOT_IN_CELLS:
            raise UsageError(f"sweep: option {name!r} cannot be set for all cells; axes: {', '.join(AXES)}")
    return dict(given)


def check_cells(cells: Sequence[Cell], check: Callable[[Sequence[str]], object]) -> None:
    """Raises UsageError, naming the cell, for the first cell whose command line `check` rejects; runs nothing."""
    for cell in cells:
        try:
            check(cell.argv)
        except UsageError as error:
            raise UsageError(f"sweep cell {cell.name}: {error}") from None


def run_sweep(
    cells: Sequence[Cell],
    out: Path,
    runner: str,
    address: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, object]]:
    """Runs or continues a sweep in `out`; returns a row per cell, in order. Raises UsageError.

    Args:
        cells: the studies.
        out: the sweep's folder; on several nodes, one that all of them share.
        runner: "module:function" that takes a cell's command line and run directory and returns its row.
        address: of the Ray cluster; None starts one here.
        say: called with a line of progress.
        environment: variables of every cell's process, beyond those of its node.
    """
    from tuner.cluster.connection import check_installed

    check_installed()
    out = out.resolve()
    _check_folder(out)
    with driver_lock(out):
        continued = _claim(out, cells)
        left = [cell for cell in cells if not _has_verdict(out / "cells" / cell.name)]
        if continued:
            say(f"continuing the sweep in {out}: {len(left)} of {len(cells)} cells left")
        died = _run_cells(left, out, runner, address, say, environment) if left else {}
        rows = [_row(cell, out, died.get(cell.name)) for cell in cells]
        write_table(rows, AXES.values(), out)
    return rows


def _has_verdict(run_dir: Path) -> bool:
    """Whether a cell is done; forgets the outcome of one that is not, so that it runs again."""
    path = run_dir / CELL_FILE
    try:
        if json.loads(path.read_text(encoding="utf-8"))["verdict"] not in _OPEN:
            return True
        path.unlink()
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError):
        path.unlink()
    return False


def _occupied(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if amount}


def _run_cells(
    cells: Sequence[Cell],
    out: Path,
    runner: str,
    address: str | None,
    say: Callable[[str], None],
    environment: Mapping[str, str] | None,
) -> dict[str, str]:
    """Runs cells on the cluster; returns the errors of those whose process died, by their names."""
    from tuner.cluster.connection import connect, require

    disconnect = connect(address)
    try:
        tune = require("ray.tune")
        nodes = [node["Resources"] for node in require().nodes() if node["Alive"]]
        wanted = {cell.name: cell.resources for cell in cells}
        with_gpus = with_default_gpus(wanted, nodes)
        resources = placed(with_gpus, nodes)
        if with_gpus != wanted:
            say(
                "the sweep states no gpus, so each cell gets a GPU of its own; resources: {gpus: 0.5} lets two share one"
            )
        # Ray Tune would never revisit a trial that ended, so every run is a new experiment.
        shutil.rmtree(out / RAY_FOLDER, ignore_errors=True)
        grid = [{"name": c.name, "argv": list(c.argv), "resources": _occupied(resources[c.name])} for c in cells]
        tuner = tune.Tuner(
            _trainable(tune, runner, out, environment),
            param_space={"cell": tune.grid_search(grid)},
            run_config=tune.RunConfig(
                name=RAY_FOLDER,
                storage_path=str(out),
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                callbacks=[_announcing(tune, out, say)],
                verbose=0,
            ),
            tune_config=tune.TuneConfig(reuse_actors=True),
        )
        # Ray Tune prints to stdout, which is reserved for our own output.
        with open(out / RAY_LOG, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), _own_interrupts():
            results = tuner.fit()
        # Ray Tune keeps the errors of processes that died; a study's own messages are in its cell's file.
        return {r.config["cell"]["name"]: str(r.error) for r in results if r.error is not None and r.config}
    finally:
        disconnect()


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Restores the handler of Ctrl-C, which Ray Tune replaces and leaves replaced; its first Ctrl-C lets `fit` return."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _check_folder(out: Path) -> None:
    """Creates the sweep's folder. Raises UsageError if it cannot be used or holds anything but a sweep."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        strangers = [path.name for path in visible(out.iterdir()) if path.name != LOCK_FILE]
        if strangers and not (out / SWEEP_FILE).exists():
            raise UsageError(f"output {out} is not empty and holds no sweep; choose another --out")
    except OSError as error:
        raise UsageError(f"output {out} cannot be used ({error}); choose another --out") from None


def _claim(out: Path, cells: Sequence[Cell]) -> bool:
    """Writes the sweep into its folder; returns whether it was begun before. Raises UsageError if another one was.

    A sweep of which nothing ran may be changed, such as one whose cells fit no node; resources may be changed at any time.
    """
    path = out / SWEEP_FILE
    plan = plain({"cells": [[cell.name, list(cell.argv), _occupied(cell.resources)] for cell in cells]})
    begun = (out / "cells").exists()
    try:
        if begun and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if [cell[:2] for cell in stored["cells"]] != [cell[:2] for cell in plan["cells"]]:
                raise UsageError(f"{out} holds another sweep; choose another --out, or restore its sweep file")
        write_text_atomically(path, json.dumps(plan, indent=1) + "\n")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"output {out} cannot be used ({error}); choose another --out") from None
    return begun


def _announcing(tune: Any, out: Path, say: Callable[[str], None]) -> Any:
    """Ray Tune's callback that says when a cell starts and when it is done."""

    class Announcing(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: object) -> None:
            say(f"cell {trial.config['cell']['name']}: started")

        def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: object) -> None:
            name = trial.config["cell"]["name"]
            path = out / "cells" / name / CELL_FILE
            if path.exists():  # Ray Tune calls this for a cell that it stops, too
                say(f"cell {name}: {str(json.loads(path.read_text(encoding='utf-8'))['verdict']).replace('_', ' ')}")

        def on_trial_recover(self, iteration: int, trials: Sequence[Any], trial: Any, **info: object) -> None:
            say(f"cell {trial.config['cell']['name']}: lost its process or infrastructure; starting it again")

        def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: object) -> None:
            say(f"cell {trial.config['cell']['name']}: failed")

    return Announcing()


def _trainable(tune: Any, runner: str, out: Path, environment: Mapping[str, str] | None = None) -> Any:
    """One study as a Ray Tune trial: a class, so that the study runs in the main thread, where signals are handled."""

    class Study(tune.Trainable):
        def setup(self, config: Mapping[str, object]) -> None:
            """Hides all GPUs from a cell without one: Ray does not. A process is only given cells with equal resources."""
            os.environ.update(environment or {})
            if not self.config["cell"]["resources"].get("GPU"):
                os.environ["CUDA_VISIBLE_DEVICES"] = ""

        def step(self) -> dict[str, object]:
            cell = self.config["cell"]
            run_dir = out / "cells" / cell["name"]
            if not (run_dir / CELL_FILE).exists():
                started = time.time()
                try:
                    row = pkgutil.resolve_name(runner)(cell["argv"], run_dir)
                except Exception as error:
                    row = {"verdict": "failed", "reason": first_line(error)}
                if row.get("exit_code") == InfrastructureError.exit_code:
                    # There is no file that says it is done: Ray Tune tries again, and the same command resumes it.
                    raise RuntimeError(row.get("reason"))
                row["hours"] = round((time.time() - started) / 3600, 4)
                run_dir.mkdir(parents=True, exist_ok=True)
                write_text_atomically(run_dir / CELL_FILE, json.dumps(plain(row)) + "\n")
                free_memory()
            return {"done": True}

        def reset_config(self, new_config: Mapping[str, object]) -> bool:
            """Runs another cell in the same process, since starting one costs more than a small study."""
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing to save: a study continues from its run directory."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing to load."""

    return tune.with_resources(
        Study, lambda config: tune.PlacementGroupFactory([dict(config["cell"]["resources"])], strategy="PACK")
    )


def _row(cell: Cell, out: Path, died: str | None) -> dict[str, object]:
    """A cell's axes and its outcome."""
    run_dir = out / "cells" / cell.name
    row: dict[str, object] = {"cell": cell.name, **cell.axes}
    path = run_dir / CELL_FILE
    if path.exists():
        row |= json.loads(path.read_text(encoding="utf-8"))
    elif died is not None:
        # A process that died or lost its infrastructure leaves a cell without its file; a rerun tries it again.
        lines = [line.strip() for line in died.splitlines() if line.strip()]
        row |= {"verdict": "failed", "reason": (lines[-1] if lines else "its process died")[:300]}
        row |= {"exit_code": InfrastructureError.exit_code}
    else:
        # Ray Tune returns before every trial has ended only at Ctrl-C.
        ran = (run_dir / EVIDENCE_FILE).exists()
        reason = "while it ran; what it measured is kept" if ran else "before it started"
        row |= {"exit_code": STOPPED, "reason": reason}
    if row.get("exit_code") == STOPPED:
        row["verdict"] = "stopped"
    for name, file in (("profile", "profile.yaml"), ("report", "report.html")):
        if (run_dir / file).exists():
            row[name] = f"cells/{cell.name}/{file}"
    return row
