"""How well a small stratified set of prompts reproduces a large set's ranking of schedules, on nano.

    python -m benchmarks.prompt_subset --prompts 280 --output prompt_subset.json

Every schedule draws every prompt once (same seeds). The ranking by all prompts is taken as the truth, and 200 stratified
subsets of each size are compared with it (Spearman). One table per metric: GenEval's verdict, the composite of the search
space, and PSNR from the full schedule as a metric that hardly needs prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.environment import environment, write_json
from stagevar.models.request import ModelRequest
from stagevar.schedule import StageSchedule, exact, preset
from tuner.config.prompts import load_prompts
from tuner.config.space import PromptSource
from tuner.evaluation.model_evaluator import load_evaluator
from tuner.metrics.prompt_sets import subset_rank_correlation
from tuner.metrics.quality_spec import read_quality

QUALITY = read_quality({"geneval_nano": 1.0, "clip_score": {"weight": 0.05, "model": "nano"}})
SIZES = (14, 28, 56, 112)


def schedules(grids: tuple[tuple[int, int], ...]) -> dict[str, StageSchedule]:
    """Ten schedules from harmless to harmful."""
    scales = len(grids)
    chosen = {"full": exact(scales)}
    chosen |= {
        name: preset(name, grids) for name in ("stagevar-paper", "stagevar-released", "fastvar", "skip-1", "skip-2")
    }
    for cutoff in (scales - 1, scales - 2, scales - 3):
        chosen[f"one branch from scale {cutoff}"] = StageSchedule(structure_end=cutoff, cfg_delay=0)
    chosen["half the tokens at the last scale"] = StageSchedule(structure_end=scales - 1, rank_ratios=(0.5,))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=280, help="total number of prompts (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    prompts = load_prompts(PromptSource("nano", search=options.prompts, heldout=16, micro_batch=20))
    evaluator = load_evaluator(
        ModelRequest("nano", device="cpu"), prompts, QUALITY, {"psnr": 0.0}, threads=options.threads
    )
    grids = tuple(evaluator.model.grids)
    named = schedules(grids)
    steps = [schedule.expand(grids, evaluator.sampler.chunks) for schedule in named.values()]
    batches = [evaluator.quality(steps, "search", batch) for batch in range(prompts["search"].batches)]
    figures: dict[str, object] = {"environment": environment(), "prompts": options.prompts, "metrics": {}}
    for metric in ("geneval_nano", "quality", "psnr"):
        values_SP = np.stack(
            [np.concatenate([batch[index][metric] for batch in batches]) for index in range(len(named))]
        )
        rows = [
            subset_rank_correlation(values_SP, prompts["search"].items, size)
            for size in SIZES
            if size < options.prompts
        ]
        means = dict(zip(named, values_SP.mean(1).round(4).tolist(), strict=True))
        figures["metrics"][metric] = {"means": means, "subsets": rows}
        print(f"\n{metric}: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()))
        print(f"{'prompts':>8} {'Spearman':>9} {'5th pct':>8} {'best found':>11}")
        for row in rows:
            print(f"{row['count']:8d} {row['spearman_mean']:9.3f} {row['spearman_p5']:8.3f} {row['best_found']:11.0%}")
    if options.output:
        write_json(options.output, figures)


if __name__ == "__main__":
    main()
