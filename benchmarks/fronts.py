"""Pareto fronts of all methods on one model, from one interleaved run: who wins where.

    python -m benchmarks.fronts --model nano --prompts 96 --rounds 20 --output fronts.json --figure fronts.png

Every method is swept over its own settings; all of them make the same images from the same prompts and seeds and are timed
in turn. A point is on its method's front when none of the same method is both faster and more like the full schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation import nano_verdicts, speed
from benchmarks.environment import environment, write_json
from stagevar.accelerators.skipvar import packaged_rules
from stagevar.compare import bench_prompts, compare
from stagevar.errors import UsageError
from stagevar.models.base import LoadedModel
from stagevar.models.registry import load_model
from stagevar.sampler import Sampler
from stagevar.schedule import StageSchedule, skip_only, skipvar


def sweep(model: LoadedModel, lasts: Sequence[int], ratios: Sequence[float]) -> dict[str, StageSchedule]:
    """Schedules by "method | setting". lasts: how many last scales are accelerated. ratios: kept shares of the tokens."""
    scales, depth = len(model.grids), model.transformer.depth
    found: dict[str, StageSchedule] = {}
    for last in lasts:
        start = scales - last
        found[f"skip | last {last}"] = skip_only(model.grids, last)
        for branch in ("uncond", "cond"):
            found[f"one branch | {branch} from {start}"] = StageSchedule(start, cfg_delay=0, branch=branch)
        for kept in ratios:
            ranks: dict[str, Any] = {"rank_ratios": (kept,)}
            rows: dict[str, Any] = {**ranks, "projection": "rows", "rope": "index"}
            pruned: dict[str, Any] = {**ranks, "accelerator": "fastvar", "layers": (0, depth)}
            where = f"{kept:g} from {start}"
            found[f"StageVAR as published | {where}"] = StageSchedule(start, cfg_delay=0, **ranks)
            found[f"StageVAR, rows, conditional | {where}"] = StageSchedule(start, cfg_delay=0, branch="cond", **rows)
            found[f"FastVAR | {where}"] = StageSchedule(start, **pruned)
            found[f"FastVAR, conditional | {where}"] = StageSchedule(start, cfg_delay=0, branch="cond", **pruned)
        if last > 1:
            skipped = tuple(range(start + 1, scales))
            found[f"one branch, then skip | cond at {start}"] = StageSchedule(
                start, cfg_delay=0, branch="cond", skip=skipped
            )
            found[f"FastVAR, conditional, then skip | 0.5 at {start}"] = StageSchedule(
                start,
                cfg_delay=0,
                branch="cond",
                accelerator="fastvar",
                layers=(0, depth),
                rank_ratios=(0.5,),
                skip=skipped,
            )
    for name in packaged_rules().get(model.name, {}):
        found[f"SkipVAR | {name}"] = skipvar(model.grids, name)
    return found


def front(rows: Iterable[Mapping[str, Any]], quality: str) -> list[Mapping[str, Any]]:
    """Rows that no other row beats in both time and quality, fastest first."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (speed(row), -row[quality])):
        if not best or row[quality] > best[-1][quality]:
            best.append(row)
    return best


def method(row: Mapping[str, Any]) -> str:
    """The part of a row's name before the bar."""
    return row["name"].split(" | ")[0]


def draw(rows: Sequence[Mapping[str, Any]], qualities: Mapping[str, str], path: Path) -> None:
    """One panel per quality: points and front of every method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(method(row) for row in rows))
    figure, axes = pyplot.subplots(1, len(qualities), figsize=(6.2 * len(qualities), 4.6), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors
    for axis, (quality, title) in zip(axes, qualities.items(), strict=True):
        for colour, name in zip(colours, methods, strict=False):
            own = [row for row in rows if method(row) == name]
            best = front(own, quality)
            axis.scatter([speed(r) for r in own], [r[quality] for r in own], s=9, color=colour, alpha=0.35)
            axis.plot(
                [speed(r) for r in best], [r[quality] for r in best], "o-", ms=4, lw=1.4, color=colour, label=name
            )
        axis.plot([1], [0 if quality == "geneval" else 1], "k*", ms=10, label="full schedule")
        axis.set_xlabel("time, share of the full schedule")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints every method's front and the common one; writes figures and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fronts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--weights", help="folder of other weights than the shipped ones")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--last", type=int, nargs="+", default=[1, 2, 3], help="last scales that are accelerated")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75], help="kept shares of tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--figure", type=Path, help="PNG file")
    args = parser.parse_args(argv)
    try:
        model = load_model(args.model, weights=args.weights, device=args.device)
        if model.random_weights:
            raise UsageError("a front needs quality, which random weights have none of")
        chunks, prompts = Sampler(model).chunks, bench_prompts(model, args.prompts)
        rows = compare(
            model,
            [],
            extra_steps={
                name: schedule.expand(model.grids, chunks)
                for name, schedule in sweep(model, args.last, args.ratios).items()
            },
            rounds=args.rounds,
            prompts=prompts,
            threads=args.threads,
            warm_up_at_most=3,  # dozens of rows; processor time needs little warmth
            scores=nano_verdicts(prompts) if model.name == "nano" else None,
        )[1:]
    except UsageError as error:
        print(f"fronts: {error}", file=sys.stderr)
        return error.exit_code
    qualities = {"ssim": "SSIM with the full schedule's image"}
    if "geneval" in rows[0]:
        qualities["geneval"] = "share of prompts right, difference to the full schedule"
    for quality in qualities:
        print(f"\n{quality}: front of all methods, then of each")
        for name, part in (
            ("all", rows),
            *((m, [r for r in rows if method(r) == m]) for m in dict.fromkeys(map(method, rows))),
        ):
            print(f" {name}")
            for row in front(part, quality):
                print(f"  {speed(row):.3f}  {row[quality]:+.3f}  {row['name']}")
    if args.output is not None:
        slim = [{key: value for key, value in row.items() if key != "samples_ms"} for row in rows]
        write_json(args.output, {"environment": environment(model.device), "model": model.name, "rows": slim})
    if args.figure is not None:
        draw(rows, qualities, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
