"""An evaluator for tests of executors: quality and latency are formulas of the steps, and no model runs.

Values depend on schedule, prompt and seed alone, so every process that evaluates a task must get the same ones. Timings are
made up, not measured: they drift from round to round, equally for all schedules, differently in each process.

An executor whose workers are other processes has them call `build` there, by the name "tuner.testing.formulas:build".
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from stagevar.card_state import CardState
from stagevar.schedule import Steps, exact, preset
from stagevar.schedule.grids import square
from tuner.config.prompts import PromptSet
from tuner.evaluation.evaluator import EvaluationInfo, Evaluator, Values

GRIDS = square((1, 2, 3, 4, 6, 8))
CHUNKS = 3
#: The full schedule, one that prunes, and one that skips a scale.
FULL = exact(len(GRIDS)).expand(GRIDS, CHUNKS)
PAPER, SKIP = (preset(name, GRIDS).expand(GRIDS, CHUNKS) for name in ("stagevar-paper", "skip-1"))
TREE = (FULL, PAPER, SKIP)
#: Micro-batches of search prompts.
BATCHES = 8
_MICRO_BATCH = 4


class Samples:
    """The part of stagevar.timing.Timing that executors and studies read; needs no torch."""

    def __init__(self, samples_ms: Iterable[float]):
        self.samples_ms, self.warm_up_runs, self.warmed = tuple(samples_ms), 3, True
        self.card: tuple[CardState, ...] = ()
        self.disturbed: tuple[str, ...] = ()


class FormulaEvaluator(Evaluator):
    """An Evaluator by formula, on 32 search and 64 held-out prompts in micro-batches of 4.

    Args:
        broken_skips: whether quality raises RuntimeError for schedules that skip a scale.
    """

    def __init__(self, broken_skips: bool = False):
        self.broken_skips = broken_skips
        self.prompts = {"search": _prompts("search", 4 * BATCHES), "heldout": _prompts("held-out", 64)}
        self.facts = EvaluationInfo(
            "formula", GRIDS, CHUNKS, (48, 48), {"name": "formula", "kind": "cpu", "threads": 1, "dtype": "float32"},
            higher_is_better={"shade": True}, provenance={"weights": {"formula": "00"}},
        )  # fmt: skip
        self._clock = np.random.default_rng(os.getpid())

    def quality(self, schedules: Sequence[Steps], split: str, batch: int) -> list[Values]:
        values = []
        for steps in schedules:
            if self.broken_skips and any(step.skipped for step in steps):
                raise RuntimeError("this schedule is broken")
            shade_B = self._shades(steps, split, batch)
            values.append({"shade": shade_B, "quality": shade_B / 2})
        return values

    def latency(  # type: ignore[override]  # Samples have what readers of a Timing use
        self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int = 12
    ) -> Mapping[str, Samples]:
        drift = 1 + 0.05 * np.abs(self._clock.standard_normal(rounds))
        return {name: Samples(100.0 * self.ratio(steps) * drift) for name, steps in schedules.items()}

    def ratio(self, steps: Steps) -> float:
        """Latency of a schedule over the full one's."""
        rows, all_rows = (sum(step.processed_tokens(CHUNKS) for step in one) for one in (steps, FULL))
        return 0.2 + 0.8 * rows / all_rows

    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        """Images (B, 8, 8, 3) uint8, each a single gray."""
        levels_B = (255 * self._shades(steps, split, batch)).astype(np.uint8)
        return np.broadcast_to(levels_B[:, None, None, None], (len(levels_B), 8, 8, 3)).copy()

    def _shades(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        """A number from 0 to 1 per prompt (B,)."""
        keys = [repr((steps, prompt, seed)) for prompt, seed in zip(*self.prompts[split].batch(batch), strict=True)]
        return np.array([zlib.crc32(key.encode()) / 2**32 for key in keys])


def build(broken_skips: bool = False) -> FormulaEvaluator:
    """The evaluator; a worker calls this in its own process."""
    return FormulaEvaluator(broken_skips)


def _prompts(kind: str, count: int) -> PromptSet:
    return PromptSet(tuple(f"{kind} prompt {index}" for index in range(count)), tuple(range(count)), _MICRO_BATCH)
