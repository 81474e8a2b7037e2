"""A sweep's driver process on the tests' cluster: `python -m tests.fakes.cluster_sweep DIRECTORY ADDRESS`."""

import os
import sys
from pathlib import Path


def drive(directory: Path, address: str) -> None:
    from tuner.cluster.sweep import Sweep, run_sweep

    (directory / "driver").write_text(str(os.getpid()))
    axes = {"models": ("fake-a", "fake-b"), "budgets": ("60%", "80%"), "seeds": (0,)}
    cells = Sweep(axes, cpus=4).cells() + Sweep({"models": ("broken",), "budgets": ("60%",), "seeds": (0,)}).cells()
    run_sweep(cells, directory / "out", "tests.fakes.cluster:run_cell", address)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2])
