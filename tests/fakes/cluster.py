"""Make-believe evaluators for workers in other processes, which misbehave where a file tells them to.

Files in `directory`: `die-N` ends the process at micro-batch N, once (the first to see it removes it); `hang-N` waits
for ever there, once; `hold-NODE` waits for ever on that node as long as it exists, `doom-NODE` ends every process there;
`slow-NODE` holds how many times longer everything takes there, by its own clock. `calls/` gets one file per evaluated
micro-batch.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import uuid
from pathlib import Path

import numpy as np

from stagevar.errors import UsageError
from tests.fakes.studies import SPACE, FakeEvaluator
from tuner.cluster.worker import Recipe
from tuner.config.prompts import load_prompts
from tuner.config.space_file import parse_space

#: 8 micro-batches of 4 search prompts.
PROMPTS = {"source": "nano", "search": 32, "heldout": 64, "micro_batch": 4}


class Troublemaker(FakeEvaluator):
    """Dies of poisoned schedules, always; of batches where files say so, once."""

    def __init__(self, prompts, directory: Path, poison=lambda steps: False, **options):
        super().__init__(prompts, **options)
        self.directory, self.poison = directory, poison
        (directory / "calls").mkdir(exist_ok=True)

    def quality(self, schedules, split, batch):
        self.misbehave(str(batch))
        if any(self.poison(steps) for steps in schedules):
            os.kill(os.getpid(), signal.SIGKILL)
        values = super().quality(schedules, split, batch)
        record = {"split": split, "batch": batch, "schedules": len(schedules), "process": os.getpid()}
        (self.directory / "calls" / uuid.uuid4().hex).write_text(json.dumps(record))
        return values

    def latency(self, schedules, rounds, warm_up_at_most=12):
        self.misbehave("latency")
        timings = super().latency(schedules, rounds, warm_up_at_most)
        for path in self.directory.glob("slow-*"):
            if path.name == f"slow-{this_node()}":
                for timing in timings.values():
                    timing.samples_ms = tuple(ms * float(path.read_text()) for ms in timing.samples_ms)
        return timings

    def misbehave(self, where: str) -> None:
        if taken(self.directory / f"die-{where}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if taken(self.directory / f"driver-{where}"):
            os.kill(int((self.directory / "driver").read_text()), signal.SIGKILL)
        if taken(self.directory / f"hang-{where}"):
            threading.Event().wait()
        if any(path.name == f"hold-{this_node()}" for path in self.directory.glob("hold-*")):
            threading.Event().wait()
        if any(path.name == f"doom-{this_node()}" for path in self.directory.glob("doom-*")):
            os.kill(os.getpid(), signal.SIGKILL)


def this_node() -> str:
    """Ray's id of the node that this worker is on."""
    import ray

    return ray.get_runtime_context().get_node_id()


def taken(path: Path) -> bool:
    """Whether this process was the one to remove the file."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def skips(steps) -> bool:
    return any(step.skipped for step in steps)


def build(
    directory: str,
    seed: int = 0,
    broken_skips: bool = False,
    broken_all: bool = False,
    poison_skips: bool = False,
    noise: float = 0.0,
):
    """What workers build: the fake of tests.fakes.studies on the prompts above."""
    space = parse_space({**SPACE, "prompts": PROMPTS})
    return Troublemaker(
        load_prompts(space.prompts, seed),
        Path(directory),
        poison=lambda steps: poison_skips and skips(steps),
        broken=lambda steps: broken_all or (broken_skips and skips(steps)),
        seed=seed,
        noise=noise,
    )


def refuse(reason: str):
    """What cannot be built because of what the user asked for."""
    raise UsageError(reason)


def collapse():
    """What ends its process while it is built."""
    os.kill(os.getpid(), signal.SIGKILL)


class TinyModel(FakeEvaluator):
    """A real model, small enough for a test: quality is the mean brightness of the images it draws."""

    def __init__(self, prompts):
        import torch

        from stagevar.sampling.sampler import Sampler
        from stagevar.testing.tiny import GRIDS, tiny_infinity

        super().__init__(prompts)
        torch.set_num_threads(1)
        self.sampler = Sampler(tiny_infinity(GRIDS))

    def quality(self, schedules, split, batch):
        from tuner.evaluation.prefix_tree import walk

        texts, seeds = self.prompts[split].batch(batch)
        generation = self.sampler.begin([str(text) for text in texts], list(seeds))
        found = {}

        def score(indices, images):
            values = {"quality": images.astype(np.float64).mean(axis=(1, 2, 3))}
            found.update(dict.fromkeys(indices, values))

        walk(self.sampler, generation, schedules, score)
        return [found[index] for index in range(len(schedules))]


def tiny_model() -> TinyModel:
    return TinyModel(load_prompts(parse_space({**SPACE, "prompts": PROMPTS}).prompts))


def recipe(directory: Path, **arguments) -> Recipe:
    return Recipe("tests.fakes.cluster:build", {"directory": str(directory), **arguments})


def calls(directory: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in (directory / "calls").iterdir()]


def run_cell(argv, run_dir):
    """A sweep's cell on the fake: a whole study in its run directory; `driver-CELL` kills the driver once, half-way."""
    from tests.fakes import studies as fakes
    from tuner.report.export import export
    from tuner.report.page import write_report
    from tuner.report.sweep_page import summary

    options = dict(word.removeprefix("--").split("=") for word in argv)
    folder = run_dir.parents[2]
    with open(folder / "started", "a") as log:
        log.write(f"{run_dir.name}\n")
    if options["model"] == "broken":
        raise RuntimeError("no such weights")
    made = fakes.study(
        run_dir, {"drop": lambda steps: 0.0}, trials=6, budget=options["budget"], seed=int(options["seed"])
    )
    if (folder / f"driver-{run_dir.name}").exists():
        made.executor = Treacherous(made.executor, folder, f"driver-{run_dir.name}")
    result = made.run()
    export(result, run_dir)
    write_report(result, run_dir)
    return summary(result)


class Treacherous:
    """An executor that kills the driver at its third call, and then waits for the end."""

    def __init__(self, inner, folder, name):
        self.inner, self.folder, self.name, self.calls = inner, folder, name, 0

    def run(self, tasks):
        self.calls += 1
        if self.calls == 3 and taken(self.folder / self.name):
            os.kill(int((self.folder / "driver").read_text()), signal.SIGKILL)
            threading.Event().wait()
        return self.inner.run(tasks)

    def close(self):
        self.inner.close()
