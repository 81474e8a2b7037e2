"""A make-believe model for the tuner's logic: latency and quality are formulas of the steps, noise is seeded.

Nothing is slept or measured: timings are numbers. `python -m tests.fakes.studies RUN_DIR TRIALS DIES_AT` drives a study on it
whose proposals come from another process, and is killed after so many trials.
"""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from stagevar.schedule import Steps
from stagevar.schedule.grids import square
from tuner.config.prompts import PromptSet
from tuner.evaluation.evaluator import EvaluationInfo, Evaluator, Values
from tuner.testing.formulas import Samples

GRIDS = square((1, 2, 3, 4, 6, 8))
CHUNKS = 3
FULL_TOKENS = 2 * sum(h * w for h, w in GRIDS)

SPACE = {
    "model": "fake",
    "objectives": {"latency": "ms", "quality": {"geneval_nano": 1.0}},
    "parameters": {
        "structure_end": {"low": 2, "high": 5},
        "cfg_delay": [0, 1, 2, "never"],
        "branch": ["uncond", "cond"],
        "rank_ratio": [0.05, 0.2, 0.5, 1],
        "projection": ["gaussian", "rows"],
        "skip_last": {"low": 0, "high": 1},
    },
    "enqueue": ["stagevar-paper", "skip-1"],
    "proposals": {},
    "prompts": {"source": "nano", "search": 16, "heldout": 64, "micro_batch": 8},
}


def tokens(steps: Steps) -> float:
    """Token rows through the trunk."""
    return sum(step.processed_tokens(CHUNKS) for step in steps)


class FakeEvaluator(Evaluator):
    """Quality and latency by formula.

    Args:
        drop: mean drop of a schedule (share of prompts that the full schedule gets right and it does not); the default
            grows with what is left out. ratio: latency over the full schedule's. noise: relative spread of timings.
        discordance: share of prompts on which schedules differ from the full one at random, both ways alike.
        points: mean loss of a schedule in CLIP points; then there is a second metric, clip_score.
        broken: schedules for which quality raises.
    """

    def __init__(
        self,
        prompts: Mapping[str, PromptSet],
        drop: Callable[[Steps], float] | None = None,
        ratio: Callable[[Steps], float] | None = None,
        noise: float = 0.01,
        seed: int = 0,
        discordance: float = 0.0,
        points: Callable[[Steps], float] | None = None,
        broken: Callable[[Steps], bool] = lambda steps: False,
        random_weights: bool = False,
        full_ms: float = 100.0,
    ):
        self.prompts, self.noise, self.seed, self.discordance, self.broken = prompts, noise, seed, discordance, broken
        self.drop = drop or (lambda steps: 0.1 * (1 - tokens(steps) / FULL_TOKENS))
        self.ratio = ratio or (lambda steps: 0.2 + 0.8 * tokens(steps) / FULL_TOKENS)
        self.full_ms, self.points = full_ms, points
        self.clock = np.random.default_rng([seed, 7])
        self.quality_calls = 0
        self.facts = EvaluationInfo(
            "fake", GRIDS, CHUNKS, (48, 48), {"name": "fake", "kind": "cpu", "threads": 1, "dtype": "float32"},
            random_weights=random_weights, higher_is_better={"geneval_nano": True, "clip_score": True},
            provenance={"weights": {"w": "00"}},
        )  # fmt: skip

    def quality(self, schedules: Sequence[Steps], split: str, batch: int) -> list[Values]:
        self.quality_calls += 1
        found = []
        for steps in schedules:
            if self.broken(steps):
                raise RuntimeError("this schedule is broken")
            accelerated = tokens(steps) < FULL_TOKENS or self.drop(steps) > 0
            rows, scores = [], []
            for prompt, seed in zip(*self.prompts[split].batch(batch), strict=True):
                base = np.random.default_rng([self.seed, seed, zlib.crc32(repr(prompt).encode())])
                right = base.random() < 0.7
                own = np.random.default_rng([self.seed, seed, zlib.crc32(repr(steps).encode())])
                lost, flip = own.random() < self.drop(steps) / 0.7, own.random() < self.discordance
                if accelerated:
                    right = (right and not lost) ^ flip
                rows.append(float(right))
                if self.points is not None:
                    loss = self.points(steps)
                    scores.append(25 + base.normal(0, 3) - (own.normal(loss, 1) if loss else 0.0))
            values = {"geneval_nano": np.array(rows), "quality": np.array(rows)}
            if self.points is not None:
                values["clip_score"] = np.array(scores)
                values["quality"] = values["quality"] / 0.05 + values["clip_score"] / 0.3
            found.append(values)
        return found

    def latency(self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int = 12) -> Mapping[str, Samples]:
        drift = 1 + 0.05 * np.abs(self.clock.standard_normal(rounds))
        return {
            name: Samples(
                self.full_ms * self.ratio(steps) * drift * (1 + self.noise * np.abs(self.clock.standard_normal(rounds)))
            )
            for name, steps in schedules.items()
        }

    def step_ms(self, schedules: Sequence[Steps], rounds: int) -> dict[Steps, tuple[float, ...]]:
        prefixes = {steps[: depth + 1] for steps in schedules for depth in range(len(steps))}
        cost = {(): 0.2, **{p: 0.8 * p[-1].processed_tokens(CHUNKS) / FULL_TOKENS for p in prefixes}}
        return {
            p: tuple(self.full_ms * share * (1 + self.noise * np.abs(self.clock.standard_normal(rounds))))
            for p, share in cost.items()
        }

    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        count = len(self.prompts[split].batch(batch)[0])
        shade = zlib.crc32(repr(steps).encode()) % 200
        return np.full((count, 8, 8, 3), shade, dtype=np.uint8)


def study(run_dir: Path, evaluator_options: Mapping = {}, space: Mapping = {}, **options):
    """A Study on a fake in `run_dir`."""
    from tuner.config.limits import parse_budget
    from tuner.config.prompts import load_prompts
    from tuner.config.space_file import parse_space
    from tuner.study.options import SearchShortcuts
    from tuner.study.study import Options, Study

    run_dir.mkdir(parents=True, exist_ok=True)
    checked = parse_space({**SPACE, **space})
    prompts = load_prompts(checked.prompts, options.get("seed", 0))
    budget = parse_budget(options.pop("budget", "60%"))
    stop = options.pop("stop", lambda: False)
    evaluator = FakeEvaluator(prompts, **evaluator_options)
    quick = {"sampler": "random", "shortcuts": SearchShortcuts(overlap=False)}
    return Study(run_dir, checked, Options(budget, **{**quick, **options}), evaluator, prompts, stop=stop)


def drive(run_dir: str | Path, trials: int = 30, overlap: bool = False, dies_at: int | None = None) -> None:
    """What a driver process does: lock, repair, run. dies_at: trials after which it is killed as it evaluates the next."""
    from tuner.results.run_dir import EvidenceLog, driver_lock, repair
    from tuner.study.options import SearchShortcuts

    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with driver_lock(run_dir):
        repair(run_dir)
        made = study(run_dir, trials=trials, shortcuts=SearchShortcuts(overlap=overlap))
        whole = made.evaluator.quality

        def quality(*arguments):
            if sum(record["kind"] == "trial" for record in EvidenceLog(run_dir).read()) >= dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments)

        if dies_at is not None:
            made.evaluator.quality = quality
        made.run()


if __name__ == "__main__":
    drive(sys.argv[1], int(sys.argv[2]), overlap=True, dies_at=int(sys.argv[3]))
