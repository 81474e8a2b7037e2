"""`stagevar-tune sweep SWEEP.yaml`: one study per model, budget, seed ... on a Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar import console
from stagevar.cli.arguments import Parser, name_value, path_value
from stagevar.errors import InfrastructureError, UsageError
from tuner.cli import tune
from tuner.cli.options import PROG
from tuner.cli.plan import Plan, plan
from tuner.config import checks
from tuner.report.sweep_page import REPORT_FILE, TABLE_FILE, summary
from tuner.results.result import StudyResult
from tuner.results.run_dir import STUDY_FILE, driver_lock

if TYPE_CHECKING:
    from tuner.cluster.sweep import Cell

#: How a worker of the sweep runs a cell.
RUNNER = "tuner.cli.sweep:run_cell"
#: Seconds that a cell waits for the process of a killed sweep to end.
ENDING_S = 60.0


def add_options(parser: Parser) -> None:
    """The sweep file, where its studies go, and the cluster."""
    parser.add_argument(
        "sweep", type=path_value, metavar="SWEEP.yaml", help="models, budgets, seeds and more (docs/cluster.md)"
    )
    parser.add_argument(
        "--out", type=path_value, metavar="DIR", help="folder that all nodes share (default: outputs/SWEEP)"
    )
    parser.add_argument(
        "--ray-address",
        type=name_value,
        metavar="ADDRESS",
        help="cluster to join, such as auto (default: start one here)",
    )


def check(argv: Sequence[str]) -> Plan:
    """A tuning command line checked without running it. Raises UsageError."""
    return plan(tune.build_parser().parse(argv), argv, here=False)


def with_absolute_paths(cell: Cell) -> Cell:
    """The cell with a command line that is valid in any working directory: Ray Tune gives each trial one of its own."""
    return dataclasses.replace(cell, argv=tuple(checks.with_absolute_paths(cell.argv, [Path.cwd()])))


def run(args: argparse.Namespace) -> int:
    """Runs or continues a sweep; exit code 130 at Ctrl-C, 6 if a cell lost its infrastructure, 4 if every one failed."""
    from tuner.cluster import sweep

    cells = [with_absolute_paths(cell) for cell in sweep.load_sweep(args.sweep).cells()]
    if args.ray_address is not None:
        checks.check_ray_address(args.ray_address)
    sweep.check_cells(cells, check)
    out = args.out or Path("outputs") / args.sweep.stem
    say = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    store = os.environ.get("STAGEVAR_STORE")
    environment = {"STAGEVAR_STORE": os.path.abspath(store)} if store else {}
    rows = sweep.run_sweep(cells, out, RUNNER, args.ray_address, say, environment)
    failed = [row for row in rows if row["verdict"] == "failed"]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            gain = f", {row['speedup']:.2f}x" if row.get("speedup") else ""
            print(f"{row['cell']:<32} {str(row['verdict']).replace('_', ' ')}{gain}")
        for row in failed:
            print(f"failed           {row['cell']}: {row.get('reason')}")
        for name in (TABLE_FILE, REPORT_FILE):
            print(f"file             {out / name}")
    if any(row["verdict"] == "stopped" for row in rows):
        console.say(f"{PROG} sweep: interrupted; the same command continues the sweep")
        return console.STOPPED
    if any(row.get("exit_code") == InfrastructureError.exit_code for row in failed):
        return InfrastructureError.exit_code
    return 4 if len(failed) == len(rows) else 0


def _wait_for_earlier_driver(run_dir: Path) -> None:
    """Waits up to ENDING_S for a cell's process of a sweep that was killed: Ray ends it, but not at once."""
    until = time.monotonic() + ENDING_S
    while run_dir.is_dir():
        try:
            with driver_lock(run_dir):
                return
        except UsageError:
            if time.monotonic() >= until:
                return  # the study itself says who holds it
        time.sleep(0.5)


def run_cell(argv: Sequence[str], run_dir: Path) -> dict[str, object]:
    """Runs one study as the command line does; its output goes to `<run_dir>.log`."""
    from tuner.cli.command import main

    words = [*argv, f"--out={run_dir}", "--quiet"]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    _wait_for_earlier_driver(run_dir)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    run_dir.with_suffix(".log").write_text(f"$ {shlex.join([PROG, *words])}\n{said.getvalue()}", encoding="utf-8")
    if not (run_dir / STUDY_FILE).exists():
        lines = said.getvalue().strip().splitlines()
        return {"verdict": "failed", "exit_code": code, "reason": lines[-1] if lines else f"exit code {code}"}
    return summary(StudyResult.load(run_dir))
