"""How a study scales with GPUs: a discrete-event model of the Ray executor, fed with task times measured here.

    python -m benchmarks.cluster_scaling --output scaling.json

First measures, each on one thread in processor seconds (so that other processes do not count): scales of the walk by tokens,
decoding and judging a batch, loading a worker, a round trip to a worker, asking the sampler, recording a round. Then
simulates studies event by event: asking and recording occupy the driver, timing occupies as many GPUs as the plan says,
micro-batches go to any free GPU, and trees are cut if there are fewer micro-batches than GPUs (as RayExecutor does), which
repeats shared scales. Efficiency is the speed-up over one GPU, divided by the number of GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment, write_json
from stagevar.models.request import ModelRequest
from stagevar.schedule import ScaleStep, Steps, exact
from tuner.cluster.dispatcher import cut
from tuner.cluster.executor import RayExecutor
from tuner.cluster.worker import Recipe
from tuner.config.prompts import load_prompts
from tuner.config.space import SearchSpace
from tuner.config.space_file import load_space
from tuner.proposals.trial_sampler import TrialOutcome, TrialSampler
from tuner.study.latency_source import CHECK_EVERY, SEARCH_ROUNDS, TABLE_ROUNDS, TABLE_SCHEDULES
from tuner.study.options import ROUND

GPUS = (1, 8, 64, 256)
#: Warm-up runs before a timing settles.
WARM_UP = 4
FINALISTS = 6
#: Schedules of the tree that checks the times.
TREE = 5


@dataclass(frozen=True)
class Times:
    """Seconds. A scale of a batch costs scale_s + batch x processed tokens x token_s.

    Attributes:
        leaf_s: decoding and judging one image.
        gp_s: (trials told, seconds of one ask of the Gaussian process) pairs.
        tpe_s: the same for TPE.
        book_s: evidence and tell of one schedule.
    """

    scale_s: float
    token_s: float
    leaf_s: float
    load_s: float
    round_trip_s: float
    gp_s: tuple[tuple[int, float], ...]
    tpe_s: tuple[tuple[int, float], ...]
    book_s: float

    def step(self, step: ScaleStep, batch: int, chunks: int) -> float:
        return 0.0 if step.skipped else self.scale_s + batch * step.processed_tokens(chunks) * self.token_s

    def tree(self, schedules: Sequence[Steps], batch: int, chunks: int) -> float:
        """One walk: every distinct prefix once, every distinct schedule decoded and judged."""
        prefixes = {steps[: depth + 1] for steps in schedules for depth in range(len(steps))}
        scales = sum(self.step(prefix[-1], batch, chunks) for prefix in prefixes)
        return scales + len(set(schedules)) * batch * self.leaf_s

    def ask(self, told: int, sampler: str) -> float:
        counts, seconds = zip(*(self.tpe_s if sampler == "tpe" else self.gp_s), strict=True)
        return float(np.interp(told, counts, seconds))


@dataclass(frozen=True)
class Plan:
    """What a study does.

    Attributes:
        table: step costs are timed once, in walks over the first round and TABLE_SCHEDULES others, and predict the latency
            of later rounds, except for one schedule in every CHECK_EVERY; otherwise every schedule is timed as a whole.
        spread: timing is distributed over all GPUs, each with the full schedule as its sentinel.
        overlap: the next round is asked for while one is evaluated.
        studies: how many run at once, each on its share of the GPUs.
    """

    name: str
    prompts: int = 64
    micro_batch: int = 16
    heldout: int = 512
    trials: int = 200
    round: int = ROUND
    table: bool = True
    spread: bool = True
    overlap: bool = True
    sampler: str = "gp"
    studies: int = 1


# ---------------------------------------------------------------------------------------------------- measuring


def cpu_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The fastest of several runs, in processor seconds of this process."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def measure(model_name: str, space: SearchSpace, schedules: Sequence[Steps]) -> tuple[Times, dict[str, float]]:
    """Task times of a model with random weights, and how well they predict the walk over a tree of schedules."""
    import torch

    from stagevar.models.registry import load_model
    from stagevar.sampling.sampler import Sampler
    from tuner.evaluation.prefix_tree import walk
    from tuner.metrics.registry import create

    torch.set_num_threads(1)
    model = load_model(model_name, weights="random", device="cpu")
    sampler = Sampler(model)
    items = load_prompts(space.prompts)["search"].items[:16]
    rows = []
    for batch in (4, 16):
        prompts = [item["prompt"] if isinstance(item, dict) else item for item in items[:batch]]
        generation = sampler.begin(prompts, list(range(batch)))
        for step in exact(len(model.grids)).expand(model.grids, sampler.chunks):
            sampler.advance(generation, step)  # warm

            def again(generation: Any = generation, step: ScaleStep = step) -> None:
                sampler.rewind(generation, step.scale)
                sampler.advance(generation, step)

            rows.append((1.0, batch * step.processed_tokens(sampler.chunks), cpu_seconds(again)))
    table = np.array(rows)
    # Relative errors: early scales are short and many.
    (scale_s, token_s), *_ = np.linalg.lstsq(table[:, :2] / table[:, 2:], np.ones(len(table)), rcond=None)
    images = sampler.decode(generation)
    judge = create("geneval_nano")
    leaf_s = (cpu_seconds(lambda: sampler.decode(generation)) + cpu_seconds(lambda: judge.score(images, items))) / 16
    times = Times(max(0.0, float(scale_s)), float(token_s), leaf_s, 0.0, 0.0, ((0, 0.0),), ((0, 0.0),), 0.0)

    def walk_all() -> None:
        sampler.rewind(generation, 0)
        walk(sampler, generation, schedules, lambda _, images: judge.score(images, items))

    walked_s = cpu_seconds(walk_all, repeats=2)
    return times, {"tree_measured_s": walked_s, "tree_predicted_s": times.tree(schedules, 16, sampler.chunks)}


def measure_asking(space: SearchSpace, sampler: str, counts: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """Seconds of one ask of a sampler ("gp", "tpe") after each of these numbers of told trials."""
    found = []
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        trial_sampler = TrialSampler(Path(folder), space, 0, ("latency", "drop"), "random")
        told = 0
        for count in counts:
            trial_sampler.kind = "random"
            while told < count:
                trial = trial_sampler.ask().trial
                quality = -rng.random()
                trial_sampler.tell(
                    trial,
                    TrialOutcome(1 + rng.random(), quality, {"latency": rng.random() - 0.5, "drop": -quality - 0.3}),
                )
                told += 1
            trial_sampler.kind = sampler
            found.append((count, cpu_seconds(lambda: trial_sampler.fail(trial_sampler.ask().trial), repeats=2)))
    return tuple(found)


def measure_booking() -> float:
    """Seconds of evidence, judging and telling per schedule: a study on the tests' fake, without asking."""
    from tests.fakes import studies as fakes

    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        result = fakes.study(Path(folder), trials=30).run()
        return (time.process_time() - start) / len(result.candidates)


def measure_ray(model_name: str, space: SearchSpace) -> dict[str, float]:
    """Wall seconds: starting Ray and a loaded worker here, and a round trip to it."""
    model = ModelRequest(model_name, weights="random", device="cpu")
    parts = {"model": model, "prompts": load_prompts(space.prompts), "quality": {}, "floors": {}}
    started = time.perf_counter()
    executor = RayExecutor(Recipe("tuner.evaluation.model_evaluator:load_evaluator", parts))
    ready = time.perf_counter()
    trips = []
    for _ in range(50):
        start = time.perf_counter()
        executor.call("_place", suspect="round trip")
        trips.append(time.perf_counter() - start)
    executor.close()
    return {"start_s": ready - started, "round_trip_s": float(np.median(trips))}


def measured(model_name: str, space: SearchSpace, schedules: Sequence[Steps]) -> tuple[Times, dict[str, float]]:
    """All task times, and how well they predict the walk."""
    times, check = measure(model_name, space, schedules[:TREE])
    ray = measure_ray(model_name, space)
    asking = {f"{name}_s": measure_asking(space, name, (10, 50, 100, 200)) for name in ("gp", "tpe")}
    rest = {"load_s": ray["start_s"], "round_trip_s": ray["round_trip_s"], "book_s": measure_booking()}
    return dataclasses.replace(times, **asking, **rest), check


def read_times(path: Path) -> tuple[Times, dict[str, float]]:
    """What `measured` returned when it wrote this file."""
    data = json.loads(path.read_text())
    asking = {name: tuple((int(n), float(s)) for n, s in data["times"][name]) for name in ("gp_s", "tpe_s")}
    return Times(**{**data["times"], **asking}), data["tree"]


# ---------------------------------------------------------------------------------------------------- playing out


def judge_s(jobs: Sequence[float], gpus: int, round_trip_s: float) -> float:
    """Seconds until all jobs are done: the driver hands them out one after another, each to the first free GPU."""
    free = [0.0] * gpus
    heapq.heapify(free)
    driver = end = 0.0
    for job in jobs:
        driver = max(driver, heapq.heappop(free)) + round_trip_s
        heapq.heappush(free, driver + job)
        end = max(end, driver + job)
    return end


def play(
    plan: Plan, gpus: int, times: Times, rounds: Sequence[Sequence[Steps]], full: Steps, chunks: int
) -> dict[str, float]:
    """Seconds of a whole study on this many GPUs, by what they were spent on."""
    spent = dict.fromkeys(("load", "asking", "timing", "judging", "booking", "verification"), 0.0)
    image_s = lambda steps: sum(times.step(s, 1, chunks) for s in steps) + times.leaf_s  # noqa: E731

    def jobs(schedules: Sequence[Steps], prompts: int, workers: int) -> list[float]:
        batches = -(-prompts // plan.micro_batch)
        parts = cut(schedules, max(1, workers // batches))
        return [times.tree([schedules[i] for i in part], plan.micro_batch, chunks) for part in parts] * batches

    def fill_table() -> float:
        walked = [steps for schedules in rounds for steps in schedules][: len(rounds[0]) + TABLE_SCHEDULES]
        parts = cut(walked, gpus if plan.spread else 1)
        walks = [times.tree([full, *(walked[i] for i in part)], 1, chunks) for part in parts]
        return (TABLE_ROUNDS + 1) * max(walks)

    def timing(schedules: Sequence[Steps], runs: int) -> float:
        share = min(gpus, len(schedules)) if plan.spread else 1
        groups = [schedules[i::share] for i in range(share)]
        return max(runs * (image_s(full) + sum(map(image_s, group))) for group in groups)

    spent["load"] = times.load_s
    spent["timing"] += (15 + WARM_UP) * image_s(full)
    spent["judging"] += judge_s(jobs([full], plan.prompts, gpus), gpus, times.round_trip_s)
    told = 0
    if plan.table:
        spent["timing"] += fill_table()
    for number, schedules in enumerate(rounds):
        whole = schedules if number == 0 or not plan.table else schedules[: number % CHECK_EVERY == 0]
        timing_s = timing(whole, SEARCH_ROUNDS + WARM_UP) if whole else 0.0
        judging_s = judge_s(jobs(schedules, plan.prompts, gpus), gpus, times.round_trip_s)
        asking_s = sum(times.ask(told + i, plan.sampler) for i in range(len(schedules)))
        spent["timing"] += timing_s
        spent["judging"] += judging_s
        spent["asking"] += max(0.0, asking_s - timing_s - judging_s) if plan.overlap else asking_s
        spent["booking"] += times.book_s * len(schedules)
        told += len(schedules)
    finalists = list(rounds[-1][:FINALISTS])
    spent["verification"] = timing(finalists, 30 + WARM_UP)
    spent["verification"] += judge_s(jobs([full, *finalists], plan.heldout, gpus), gpus, times.round_trip_s)
    return {**spent, "total": sum(spent.values())}


def schedules_of(space: SearchSpace, count: int, grids: Any, chunks: int) -> list[Steps]:
    """Distinct random schedules of the space, so that their trees are realistic."""
    found: dict[Steps, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        trial_sampler = TrialSampler(Path(folder), space, 0, ("latency",), "random")
        while len(found) < count:
            found.setdefault(space.schedule(trial_sampler.ask().values, grids).expand(grids, chunks))
    return list(found)


ALONE = {"table": False, "spread": False, "overlap": False}
PLANS = (
    Plan("whole schedules timed on one GPU", **ALONE),
    Plan("timed on all GPUs", **{**ALONE, "spread": True}),
    Plan("step costs, asking beside judging"),
    Plan("+ micro-batches of 4", micro_batch=4),
    Plan("+ TPE", micro_batch=4, sampler="tpe"),
    Plan("512 prompts", prompts=512),
    Plan("512 prompts, TPE", prompts=512, sampler="tpe"),
    Plan("512 prompts, micro-batches of 4, TPE", prompts=512, micro_batch=4, sampler="tpe"),
    Plan("8 studies at once", studies=8),
    Plan("64 studies at once", studies=64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--times", type=Path, help="JSON of an earlier run, to reuse its measured times")
    parser.add_argument(
        "--slower", type=float, default=1, help="simulate walks that take this many times longer (a large model)"
    )
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    args = parser.parse_args()
    from stagevar.models.registry import load_model

    space = load_space(args.model)
    model = load_model(args.model, weights="random", device="cpu")
    grids, chunks = model.grids, model.transformer.config.chunks
    full = exact(len(grids)).expand(grids, chunks)
    schedules = schedules_of(space, max(plan.trials for plan in PLANS), grids, chunks)
    times, check = measured(args.model, space, schedules) if args.times is None else read_times(args.times)
    print(f"measured: {times}\ntree of {TREE}: {check}\n")
    walk_s = {name: getattr(times, name) * args.slower for name in ("scale_s", "token_s", "leaf_s")}
    found, times = times, dataclasses.replace(times, **walk_s)
    results = []
    print(f"{'plan':<46} {'GPUs':>5} {'seconds':>8} {'x':>6} {'eff.':>5}  shares")
    for plan in PLANS:
        rounds = [schedules[i : i + plan.round] for i in range(0, plan.trials, plan.round)]
        alone = play(plan, 1, times, rounds, full, chunks)["total"]
        for gpus in GPUS:
            together = min(plan.studies, gpus)
            spent = play(plan, gpus // together, times, rounds, full, chunks)
            gain = together * alone / spent["total"]
            shares = {name: seconds / spent["total"] for name, seconds in spent.items() if name != "total"}
            results.append({"plan": dataclasses.asdict(plan), "gpus": gpus, "seconds": spent, "speedup": gain})
            top = ", ".join(f"{n} {s:.0%}" for n, s in sorted(shares.items(), key=lambda p: -p[1])[:3])
            print(f"{plan.name:<46} {gpus:>5} {spent['total']:>8.0f} {gain:>6.1f} {gain / gpus:>5.0%}  {top}")
    if args.output:
        figures = {"environment": environment(), "model": args.model, "times": dataclasses.asdict(found)}
        write_json(args.output, {**figures, "slower": args.slower, "tree": check, "results": results})


if __name__ == "__main__":
    main()
