"""How well sums of single changes predict whole schedules: rank correlation, coverage and the pairs of changes that do not add.

    python -m benchmarks.sensitivity --schedules 100 --table 32 --prompts 64 --output sensitivity.json

The table holds every single change that some drawn schedule makes (tokens at two amounts per kind), on its own prompts. Then
whole schedules, drawn uniformly from the space, are evaluated on other prompts. Printed per metric: Spearman's rank
correlation of predicted and measured mean difference, how often the difference of the two lies within 1.96 of its standard
errors, the bias, and what both cost in scales run. Pairs: the mean of measured minus predicted over the schedules that make
both changes, minus the same over all others; the largest come first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment, write_json
from benchmarks.tuning_efficiency import Bench
from stagevar.errors import StagevarError, UsageError
from stagevar.schedule import Steps
from tuner.proposals.sensitivity import (
    Change,
    FewerTokens,
    GuidanceEnds,
    LeftOut,
    SumModel,
    agreement,
    alone,
    changes_of,
    changes_to_measure,
)

QUALITY = {"geneval_nano": 1.0, "clip_score": {"weight": 0.0005, "model": "nano"}, "ssim": {"weight": 0.0001}}
#: Schedules that make both changes, below which a pair says nothing.
LEAST_PAIRS = 5


def measure(
    bench: Bench, schedules: Sequence[Steps], batches: Sequence[int]
) -> tuple[dict[str, np.ndarray], float, int]:
    """Paired differences per metric (schedules, prompts), seconds, and scales run; one tree per micro-batch."""
    evaluator = bench.evaluator()
    rows: dict[str, list[np.ndarray]] = {}
    start = time.perf_counter()
    for batch in batches:
        full, *others = evaluator.quality([evaluator.full, *schedules], "search", batch)
        for metric in full:
            rows.setdefault(metric, []).append(np.stack([values[metric] - full[metric] for values in others]))
    seconds = time.perf_counter() - start
    return {metric: np.concatenate(parts, axis=1) for metric, parts in rows.items()}, seconds, evaluator.scales_run


def named(change: Change) -> str:
    """A change as a row of the table calls it, without its amount."""
    if isinstance(change, GuidanceEnds):
        return f"{change.branch} from {change.scale}"
    if isinstance(change, LeftOut):
        return f"without {change.scale}"
    if isinstance(change, FewerTokens):
        return f"fewer tokens at {change.scale}"
    return f"{change.precision} at {change.scale}"


def pairs(schedules: Sequence[Steps], residuals: np.ndarray) -> list[dict[str, Any]]:
    """What schedules with both changes lose beyond the sum, against the rest, largest first."""
    names = [{named(change) for change in changes_of(steps)} for steps in schedules]
    found = []
    for pair in itertools.combinations(sorted(set().union(*names)), 2):
        both = np.array([set(pair) <= own for own in names])
        if LEAST_PAIRS <= both.sum() <= len(both) - LEAST_PAIRS:
            beyond = float(residuals[both].mean() - residuals[~both].mean())
            found.append({"pair": " + ".join(pair), "schedules": int(both.sum()), "beyond_sum": beyond})
    return sorted(found, key=lambda row: -abs(row["beyond_sum"]))


def compare(bench: Bench, count: int, table_batches: int) -> dict[str, Any]:
    """The table, the schedules, and how they agree."""
    schedules = bench.drawn(count)
    changes = changes_to_measure(schedules)
    full = bench.evaluator().full
    table, table_s, table_scales = measure(bench, [alone(change, full) for change in changes], range(table_batches))
    others = range(table_batches, bench.prompts["search"].batches)
    measured, whole_s, whole_scales = measure(bench, schedules, others)
    figures: dict[str, Any] = {
        "schedules": len(schedules),
        "changes": len(changes),
        "table": {"prompts": table_batches * bench.space.prompts.micro_batch, "s": table_s, "scales_run": table_scales},
        "whole": {"prompts": len(others) * bench.space.prompts.micro_batch, "s": whole_s, "scales_run": whole_scales},
        "metrics": {},
    }
    for metric, rows in table.items():
        model = SumModel(dict(zip(changes, rows, strict=True)))
        predicted = [model.predict(steps) for steps in schedules]
        assert all(p is not None for p in predicted), "every change that occurs was measured"
        found = agreement(predicted, list(measured[metric]))
        residuals = measured[metric].mean(axis=1) - np.array([p.mean for p in predicted])
        figures["metrics"][metric] = {
            "rank_correlation": found.rank_correlation,
            "coverage": found.coverage,
            "bias": found.bias,
            "measured_sd": float(measured[metric].mean(axis=1).std()),
            "residual_sd": float(residuals.std()),
            "pairs": pairs(schedules, residuals)[:8],
            "singles": {
                f"{named(change)}{f' ({change.share:.0%})' if isinstance(change, FewerTokens) else ''}": float(
                    row.mean()
                )
                for change, row in zip(changes, rows, strict=True)
            },
        }
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{figures['changes']} single changes on {figures['table']['prompts']} prompts ({figures['table']['scales_run']:,} "
        f"scales run), {figures['schedules']} schedules on {figures['whole']['prompts']} others "
        f"({figures['whole']['scales_run']:,})",
        "",
        "| metric | rank correlation | coverage | bias | sd measured | sd of measured - predicted |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for metric, row in figures["metrics"].items():
        correlation = "-" if row["rank_correlation"] is None else f"{row['rank_correlation']:.3f}"
        lines.append(
            f"| {metric} | {correlation} | {row['coverage']:.0%} | {row['bias']:+.4f} | {row['measured_sd']:.4f} | "
            f"{row['residual_sd']:.4f} |"
        )
    for metric, row in figures["metrics"].items():
        lines += ["", f"{metric}, pairs that do not add:"]
        lines += [f"* {p['pair']} ({p['schedules']} schedules): {p['beyond_sum']:+.4f}" for p in row["pairs"][:4]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.sensitivity", description=__doc__.splitlines()[0])
    p.add_argument("--schedules", type=int, default=100, help="whole schedules drawn from nano's space")
    p.add_argument("--table", type=int, default=32, help="prompts of the table, a multiple of the micro-batch of 16")
    p.add_argument("--prompts", type=int, default=64, help="other prompts, for the whole schedules")
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
        figures = compare(bench, args.schedules, args.table // 16)
    except StagevarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(figures))
    if args.output:
        write_json(args.output, {"environment": environment(torch.device("cpu")), **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
