"""A driver process on the tests' cluster: `python -m tests.fakes.cluster_driver DIRECTORY ADDRESS`."""

import os
import sys
from pathlib import Path


def drive(directory: Path, address: str) -> None:
    from tests.fakes import cluster as cluster_fakes
    from tests.tuner.cluster.test_ray import study
    from tuner.cluster.executor import RayExecutor
    from tuner.results.run_dir import driver_lock, repair

    (directory / "driver").write_text(str(os.getpid()))
    run_dir = directory / "run"
    run_dir.mkdir(exist_ok=True)
    with driver_lock(run_dir):
        repair(run_dir)
        executor = RayExecutor(cluster_fakes.recipe(directory, noise=0.0), address, run_dir=run_dir)
        study(run_dir, executor).run()
        executor.close()


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2])
