"""StageVAR's claim, row by row, on nano: how much of a scene survives when late scales get less of everything.

    python -m benchmarks.phenomenon --prompts 1000 --output phenomenon.json

Every row draws the same held-out prompts with the same seeds as the full schedule. It prints per row: the paired change of
the share of right images with its 95 % interval, PSNR and SSIM to the full schedule's image, and processor time as a share
of the full schedule's, at batch 16 and at batch 1. Rows take turns on every batch, so whatever slows the machine slows all
of them; processor time excludes other processes.

Source: the rows are what StageVAR (arXiv 2512.16483) argues for, FastVAR's reduction, and skipped scales.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment, write_json
from stagevar.errors import StagevarError, UsageError
from stagevar.images import psnr_db, ssim
from stagevar.models.nano import scenes
from stagevar.models.nano.checker import detect
from stagevar.models.registry import load_model
from stagevar.prompts.geneval import judge
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, preset, skip_only, structure_boundary
from stagevar.schedule.grids import Grid
from stagevar.timing import pinned
from tuner.statistics.bounds import mean_interval

BATCH = 16
FULL = "full schedule"
#: Prompts that are drawn one at a time for the batch-1 column.
SINGLES = 32


def rows(grids: Sequence[Grid]) -> dict[str, StageSchedule]:
    """Schedules by name, the full one first. The fidelity stage starts where `structure_boundary` says."""
    scales = len(grids)
    last, first = scales - 1, structure_boundary(grids)
    before = first - 1
    sides = {scale: grids[scale][0] for scale in (before - 1, before, first, last)}

    def conditional(start: int, **changes: Any) -> StageSchedule:
        return StageSchedule(start, cfg_delay=0, branch="cond", **changes)

    def kept_rows(start: int, *ratios: float, projection: str, **changes: Any) -> StageSchedule:
        return conditional(start, rank_ratios=ratios, projection=projection, rope="index", site="trunk", **changes)

    only_last = {"rank_delay": last - first}
    without = {"skip": tuple(range(first, last))}
    found = {
        FULL: exact(scales),
        f"null branch from side {sides[last]}": StageSchedule(last, cfg_delay=0),
        f"null branch from side {sides[first]}": StageSchedule(first, cfg_delay=0),
        f"one branch from side {sides[last]}": conditional(last),
        f"one branch from side {sides[first]}": conditional(first),
        f"one branch from side {sides[before]}": conditional(before),
    }
    shares = {"half": 0.5, "a quarter": 0.25, "an eighth": 0.125}
    kinds = (("", "rows"), (", the largest", "top"))
    for which, projection in kinds:
        for share, ratio in shares.items():
            found[f"one branch, {share} of side {sides[last]}'s rows{which}"] = kept_rows(
                first, ratio, projection=projection, **only_last
            )
        found[f"one branch, a quarter of the rows from side {sides[first]}{which}"] = kept_rows(
            first, 0.25, projection=projection
        )
    for ratios in ((0.7, 0.5), (0.5, 0.35)):
        both = " and ".join(map(str, ratios))
        found[f"one branch from {sides[before]}, {both} of the rows from side {sides[first]}, the largest"] = kept_rows(
            before, *ratios, projection="top", rank_delay=first - before
        )
    found[f"one branch, Gaussian quarter of side {sides[last]}"] = kept_rows(
        first, 0.25, projection="gaussian", **only_last
    )
    for share, ratio in (("half", 0.5), ("a quarter", 0.25)):
        found[f"one branch, FastVAR {share} from side {sides[first]}"] = conditional(
            first, rank_ratios=(ratio,), accelerator="fastvar"
        )
    name = f"without side {sides[first]}"
    found[f"{name}, one branch at {sides[last]}"] = conditional(last, **without)
    found[f"{name}, one branch from {sides[before]}"] = conditional(before, **without)
    found[f"{name}, one branch from {sides[before - 1]}"] = conditional(before - 1, **without)
    for which, projection in kinds:
        for share in ("half", "a quarter"):
            found[f"{name}, {share} of {sides[last]}'s rows{which}"] = kept_rows(
                last, shares[share], projection=projection, **without
            )
    for start in (before, before - 1):
        found[f"{name}, one branch from {sides[start]}, half of {sides[last]}'s rows, the largest"] = kept_rows(
            start, 0.5, projection="top", rank_delay=last - start, **without
        )
    found["StageVAR's preset from the paper"] = preset("stagevar-paper", grids)
    found[f"without side {sides[last]}"] = skip_only(grids)
    found[f"without sides {sides[first]} and {sides[last]}"] = skip_only(grids, last - first + 1)
    return found


def measure(
    weights: str | None, count: int, chosen: re.Pattern[str], threads: int = 1, first_seed: int = 0
) -> list[dict[str, Any]]:
    """One dict per row, the full schedule first. Prompt i is drawn with seed first_seed + i."""
    model = load_model("nano", weights=weights, device="cpu")
    sampler = Sampler(model)
    schedules = {n: s for n, s in rows(model.grids).items() if n == FULL or chosen.search(n)}
    steps = {name: schedule.expand(model.grids, sampler.chunks) for name, schedule in schedules.items()}
    prompts = scenes.prompts("heldout", count)
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)  # by row and images at once
    right: dict[str, list[bool]] = {n: [] for n in steps}
    psnr: dict[str, list[float]] = {n: [] for n in steps}
    likeness: dict[str, list[float]] = {n: [] for n in steps}

    def draw(name: str, batch: Sequence[dict[str, Any]]) -> np.ndarray:
        start = time.process_time()
        seeds = [first_seed + m["index"] for m in batch]
        images = sampler.generate([m["prompt"] for m in batch], seeds, steps[name])
        seconds[name, len(batch)].append(time.process_time() - start)
        return images

    with pinned(threads):
        for name in steps:  # the first images of a process are slower
            draw(name, prompts[:1]), draw(name, prompts[:BATCH])
        seconds.clear()
        for start in range(0, count, BATCH):
            batch = prompts[start : start + BATCH]
            full: np.ndarray | None = None
            for name in steps:
                images = draw(name, batch)
                full = images if full is None else full
                pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
                right[name] += [judge(m, detect(x)).correct for m, x in zip(batch, pixels, strict=True)]
                psnr[name] += psnr_db(images, full).tolist()
                likeness[name] += ssim(images, full).tolist()
        for meta in prompts[:SINGLES]:
            for name in steps:
                draw(name, [meta])
    return [
        {
            "row": name,
            "right": float(np.mean(right[name])),
            "change": _interval(np.array(right[name], float) - np.array(right[FULL], float)),
            "psnr_db": float(np.mean(psnr[name])),
            "ssim": float(np.mean(likeness[name])),
            "time_batch_16": _share(seconds[name, BATCH], seconds[FULL, BATCH]),
            "time_batch_1": _share(seconds[name, 1], seconds[FULL, 1]),
            "prompts": count,
        }
        for name in steps
    ]


def _interval(difference_N: np.ndarray) -> list[float]:
    """Mean and its 95 % bootstrap interval over prompts."""
    interval = mean_interval(difference_N)
    return [interval.mean, interval.low, interval.high]


def _share(own: Sequence[float], full: Sequence[float]) -> float:
    """The time as a share of the full schedule's in the same round, median over rounds."""
    return float(np.median(np.array(own) / np.array(full))) if full else float("nan")


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| schedule | right | change | time, batch 16 | time, batch 1 | PSNR dB | SSIM |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        mean, low, high = row["change"]
        change = "" if row["row"] == FULL else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        alike = "| | |" if row["row"] == FULL else f"| {row['psnr_db']:.1f} | {row['ssim']:.3f} |"
        times = " | ".join(f"{row[key]:.2f} ({1 / row[key]:.1f}x)" for key in ("time_batch_16", "time_batch_1"))
        lines.append(f"| {row['row']} | {row['right']:.3f} | {change} | {times} {alike}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.phenomenon", description=__doc__.splitlines()[0])
    p.add_argument("--weights", help="folder of nano's weights (default: the shipped ones)")
    p.add_argument("--prompts", type=int, default=1000, help="held-out prompts")
    p.add_argument("--first-seed", type=int, default=0, help="seed of the first prompt's image; later ones count up")
    p.add_argument(
        "--rows", default="", metavar="REGEX", help="rows to draw in addition to the full schedule (default: all)"
    )
    p.add_argument("--output", type=Path, help="file for the figures, as JSON")
    args = p.parse_args(argv)
    try:
        if args.prompts < BATCH:
            raise UsageError(f"--prompts {args.prompts} must be at least {BATCH}, one batch")
        if args.first_seed < 0:
            raise UsageError(f"--first-seed {args.first_seed} must be 0 or more")
        try:
            chosen = re.compile(args.rows)
        except re.error as error:
            raise UsageError(f"--rows {args.rows!r} is not a regular expression: {error}") from None
        found = measure(args.weights, args.prompts, chosen, first_seed=args.first_seed)
    except StagevarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(found))
    if args.output:
        write_json(args.output, {"environment": environment(torch.device("cpu")), "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
