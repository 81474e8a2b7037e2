"""How well a table of lasting changes predicts whole schedules: rank correlation relative to what noise allows, and coverage.

    python -m benchmarks.sensitivity --schedules 100 --table 16 --prompts 64 --store outputs/store --output sensitivity.json

The table holds every lasting change that some drawn schedule makes (kept shares at two levels, one kind per accelerator), on
its own prompts. Then whole schedules, drawn uniformly from the space, are evaluated on other prompts. It prints per metric:
Spearman's rank correlation of predicted and measured mean difference, its ceiling (what a perfect prediction would reach, from
halves of the prompts), the same among the better half of the schedules, how often the difference of the two is within 1.96 of
its standard errors, the bias, and what both cost in scales run. Other rules of combination are compared on the same
evaluations: kinds of change summed, only the first share counted. --store keeps raw evaluations, so that a rule can be tried
without drawing again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.environment import environment, write_json
from benchmarks.tuning_efficiency import Bench
from stagevar.errors import StagevarError, UsageError
from stagevar.schedule import Steps
from tuner.evaluation.executor import Executor, Failed, QualityTask
from tuner.evaluation.local import LocalExecutor
from tuner.evaluation.store import Store, StoredExecutor
from tuner.metrics.quality_spec import read_quality
from tuner.proposals.sensitivity import (
    Change,
    FewerTokens,
    GuidanceEnds,
    LeftOut,
    Sensitivities,
    agreement,
    alone,
    changes_of,
    changes_to_measure,
    noise_ceiling,
    predicted,
)

QUALITY = read_quality({"geneval_nano": 1.0, "clip_score": {"weight": 0.0005, "model": "nano"}, "ssim": 0.0001})


def measure(
    bench: Bench, schedules: Sequence[Steps], batches: Sequence[int], store: Path | None
) -> tuple[dict[str, np.ndarray], float, int]:
    """Paired differences per metric (schedules, prompts), seconds, and scales run; one tree per micro-batch."""
    evaluator = bench.evaluator()
    executor: Executor = LocalExecutor(evaluator)
    if store is not None:
        executor = StoredExecutor(executor, Store(store), bench.facts, bench.space, bench.prompts, bench.limits)
    rows: dict[str, dict[int, np.ndarray]] = {}
    start = time.perf_counter()
    tasks = [QualityTask((evaluator.full, *schedules), "search", batch) for batch in batches]
    for task, (full, *others) in executor.run(tasks):
        failed = [outcome.error for outcome in (full, *others) if isinstance(outcome, Failed)]
        if failed:
            raise UsageError(f"a schedule failed: {failed[0]}")
        for metric in full:
            rows.setdefault(metric, {})[task.batch] = np.stack([values[metric] - full[metric] for values in others])
    seconds = time.perf_counter() - start
    found = {metric: np.concatenate([parts[b] for b in batches], axis=1) for metric, parts in rows.items()}
    return found, seconds, evaluator.scales_run


def named(change: Change) -> str:
    """A change's name in a row of the table."""
    if isinstance(change, GuidanceEnds):
        fused = f", fused at layer {change.fuse_layer}" if change.fuse_layer else ""
        return f"{change.branch} from {change.scale}{fused}"
    if isinstance(change, LeftOut):
        return f"without {', '.join(map(str, change.scales))}"
    if isinstance(change, FewerTokens):
        return f"{change.share:.0%} of the tokens from {change.scale}, {type(change.kind).__name__}"
    return f"{change.precision} from {change.scale}"


def summed(model: Sensitivities, steps: Steps) -> np.ndarray:
    """The rule that adds kinds of change, instead of taking the worst per prompt."""
    total_MN = np.zeros((len(model.metrics), model.prompts))
    changes = changes_of(steps)
    tokens = [change for change in changes if isinstance(change, FewerTokens)]
    for change in changes:
        if not isinstance(change, FewerTokens):
            total_MN = total_MN + model.change_row(change)
    if tokens:
        total_MN = total_MN + model.telescoped(tokens, [step.scale for step in steps if not step.skipped])
    return total_MN


def first_share(model: Sensitivities, steps: Steps) -> np.ndarray:
    """The rule that takes the worst kind per prompt, and the first kept share as if it lasted."""
    changes = changes_of(steps)
    tokens = [change for change in changes if isinstance(change, FewerTokens)]
    kinds = [change for change in changes if not isinstance(change, FewerTokens)] + tokens[:1]
    zero = np.zeros((len(model.metrics), model.prompts))
    return np.min([zero] if not kinds else [model.change_row(change) for change in kinds], axis=0)


RULES: dict[str, Callable[[Sensitivities, Steps], Any]] = {
    "worst kind, shares telescoped": lambda model, steps: model.differences(steps),
    "kinds summed, shares telescoped": summed,
    "worst kind, first share lasts": first_share,
}


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's correlation; None if one of them does not vary."""
    return float(stats.spearmanr(one, other).statistic) if np.ptp(one) and np.ptp(other) else None


def compare(bench: Bench, count: int, table_batches: int, every_kind: bool, store: Path | None) -> dict[str, Any]:
    """The table, the schedules, and how they agree."""
    schedules = bench.drawn(count)
    changes = changes_to_measure(schedules, every_kind=every_kind)
    full = bench.evaluator().full
    batches = range(table_batches)
    table, table_s, table_scales = measure(bench, [alone(change, full) for change in changes], batches, store)
    others = range(table_batches, bench.prompts["search"].batches)
    measured, whole_s, whole_scales = measure(bench, schedules, others, store)
    metrics = [metric for metric in table if metric != "quality"]
    model = Sensitivities(metrics, {c: [table[m][i] for m in metrics] for i, c in enumerate(changes)})
    rules = {rule: np.stack([combine(model, s) for s in schedules], axis=1) for rule, combine in RULES.items()}
    size = bench.space.prompts.micro_batch
    figures: dict[str, Any] = {
        "schedules": len(schedules),
        "changes": len(changes),
        "table": {"prompts": table_batches * size, "s": table_s, "scales_run": table_scales},
        "whole": {"prompts": len(others) * size, "s": whole_s, "scales_run": whole_scales},
        "metrics": {},
    }
    for index, metric in enumerate(metrics):
        means = measured[metric].mean(axis=1)
        better = means >= np.median(means)
        figures["metrics"][metric] = {
            "ceiling": noise_ceiling(measured[metric]),
            "ceiling_better_half": noise_ceiling(measured[metric][better]),
            "measured_sd": float(means.std()),
            "rules": {rule: _agreement(rows_MSN[index], measured[metric], better) for rule, rows_MSN in rules.items()},
            "table": {named(change): float(model.rows[change][index].mean()) for change in changes},
        }
    return figures


def _agreement(expected_SN: np.ndarray, measured_SN: np.ndarray, better: np.ndarray) -> dict[str, float | None]:
    found = agreement([predicted(row_N) for row_N in expected_SN], list(measured_SN))
    guesses, means = expected_SN.mean(axis=1), measured_SN.mean(axis=1)
    return {
        "rank_correlation": found.rank_correlation,
        "better_half": rank_correlation(guesses[better], means[better]),
        "coverage": found.coverage,
        "bias": found.bias,
        "residual_sd": float((means - guesses).std()),
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{figures['changes']} lasting changes on {figures['table']['prompts']} prompts "
        f"({figures['table']['scales_run']:,} scales run), {figures['schedules']} schedules on "
        f"{figures['whole']['prompts']} others ({figures['whole']['scales_run']:,})",
        "",
        "| metric | rule | rank correlation (ceiling) | better half (ceiling) | coverage | bias | sd measured | sd of error |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for metric, row in figures["metrics"].items():
        lines += [
            f"| {metric} | {rule} | {number(one['rank_correlation'])} ({number(row['ceiling'])}) | "
            f"{number(one['better_half'])} ({number(row['ceiling_better_half'])}) | {one['coverage']:.0%} | "
            f"{one['bias']:+.4f} | {row['measured_sd']:.4f} | {one['residual_sd']:.4f} |"
            for rule, one in row["rules"].items()
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.sensitivity", description=__doc__.splitlines()[0])
    p.add_argument("--schedules", type=int, default=100, help="whole schedules drawn from nano's space")
    p.add_argument("--table", type=int, default=16, help="prompts of the table, a multiple of the micro-batch of 16")
    p.add_argument("--prompts", type=int, default=64, help="other prompts, for the whole schedules")
    p.add_argument("--every-kind", action="store_true", help="measure every kind of reduction, not one per accelerator")
    p.add_argument("--store", type=Path, help="folder that keeps raw evaluations")
    p.add_argument("--output", type=Path, help="file for the figures, as JSON")
    args = p.parse_args(argv)
    try:
        for name in ("table", "prompts"):
            if getattr(args, name) < 16 or getattr(args, name) % 16:
                raise UsageError(f"--{name} {getattr(args, name)} must be a multiple of 16, the micro-batch")
        if args.schedules < 2:
            raise UsageError(f"--schedules {args.schedules} must be at least 2")
        torch.set_num_threads(1)
        bench = Bench("nano", args.table + args.prompts, 16, 16, QUALITY)
        figures = compare(bench, args.schedules, args.table // 16, args.every_kind, args.store)
    except StagevarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(figures))
    if args.output:
        write_json(args.output, {"environment": environment(torch.device("cpu")), **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
