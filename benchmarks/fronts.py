"""Pareto fronts of all methods on one model, from one study in which the method is a search dimension: which wins where.

    stagevar-tune --model nano --budget 99% --max-drop 1 --space benchmarks/fronts_nano.yaml --sampler random \\
        --trials 120 --out RUN
    python -m benchmarks.fronts RUN --output fronts.json --figure fronts.png

Every schedule of the study is assigned to the method that it uses. A point is on its method's front if none of the same
method is both faster and better. Time is the ratio to the full schedule's. A study times a schedule in a few runs, which
other processes disturb; `--retime 15` times all of its schedules again, in turn, in processor time on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, write_json
from stagevar.errors import UsageError
from stagevar.models.registry import load_model
from stagevar.sampling.bench import time_in_turn
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact
from stagevar.statistics import ratio_bounds
from stagevar.timing import pinned
from tuner.report.words import name_of
from tuner.results.candidate import Interval, Measured
from tuner.results.pareto import front
from tuner.results.result import StudyResult

#: Method -> color (Okabe and Ito's, distinguishable when color-blind; the last one is gray) and marker, in the order of
#: the legend.
METHODS = {
    "conditional branch": ("#0072B2", "o"),
    "null branch": ("#56B4E9", "s"),
    "FocusVAR": ("#CC79A7", "D"),
    "SkipVAR": ("#D55E00", "*"),
    "skipping": ("#009E73", "v"),
    "skipping, one branch": ("#E69F00", "^"),
    "FastVAR": ("#000000", "P"),
    "StageVAR, rows": ("#7A5195", "X"),
    "StageVAR, projection": ("#999999", "p"),
}
#: Metric of a panel -> its title.
PANELS = {
    "quality": "quality (nano: share of prompts right), difference",
    "ssim": "SSIM with the full schedule's image",
}


def method(steps: Iterable[Mapping[str, Any]]) -> str:
    """Key of METHODS for expanded steps (`stagevar.profile` spelling): how tokens are reduced, or what is done otherwise."""
    steps = list(steps)
    reductions = [step["reduction"] for step in steps if step.get("reduction")]
    if any("kept" in reduction for reduction in reductions):
        return "FastVAR"
    if reductions:
        rows = any(reduction["projection"] != "gaussian" for reduction in reductions)
        return "StageVAR, rows" if rows else "StageVAR, projection"
    if any(step.get("decision") for step in steps):
        return "SkipVAR"
    alone = {step["branches"][0] for step in steps if len(step.get("branches", ())) == 1}
    fused = any(step.get("fuse_layer") for step in steps)
    if any(step.get("skipped") for step in steps):
        return "skipping, one branch" if alone or fused else "skipping"
    if fused:
        return "FocusVAR"
    return "null branch" if "uncond" in alone else "conditional branch"


def setting(steps: Iterable[Mapping[str, Any]]) -> str:
    """What a schedule does, in a few words; scales by their index."""
    steps, words = list(steps), []
    alone = [step for step in steps if len(step.get("branches", ())) == 1]
    fused = next((step for step in steps if step.get("fuse_layer")), None)
    if fused:
        words.append(f"fused at {fused['scale']}, layer {fused['fuse_layer']}")
    elif alone:
        words.append(f"{alone[0]['branches'][0]} from {alone[0]['scale']}")
    for step in steps:
        reduction = step.get("reduction")
        if reduction:
            ranks = reduction.get("ranks", [reduction.get("kept")])
            share = sum(ranks) / len(ranks) / (step["grid"][0] * step["grid"][1])
            trunk = " (trunk)" if reduction.get("site") == "trunk" else ""
            words.append(f"{min(share, 1):.0%} at {step['scale']}{trunk}")
    skipped = [str(step["scale"]) for step in steps if step.get("skipped")]
    if skipped:
        words.append(f"without {' and '.join(skipped)}")
    rules = [step["decision"]["rule"] for step in steps if step.get("decision")]
    return "; ".join(words + rules)


def rows(result: StudyResult) -> list[dict[str, Any]]:
    """Plain data, fastest first: name, method, setting, and time and every panel's metric with intervals.

    Quality is the paired difference from the full schedule; a metric that compares with its image is the mean itself.
    Raises UsageError for a study without measured quality.
    """
    found = []
    for candidate in result.measured:
        latency = candidate.latency
        if not candidate.fully_evaluated or latency.ratio is None or not candidate.differences:
            continue
        row: dict[str, Any] = {
            "key": candidate.key,
            "name": name_of(result, candidate),
            "method": method(candidate.steps),
            "setting": setting(candidate.steps),
            "time": _plain(latency.ratio),
            "quality": _plain(candidate.differences[result.limits[0].metric]),
        }
        if "ssim" in candidate.differences:
            row["ssim"] = _plain(_mean(candidate, result, "ssim"))
        found.append(row)
    if not found:
        raise UsageError("this study measured no quality: there is no front to show")
    return sorted(found, key=lambda row: row["time"]["mean"])


def retime(result: StudyResult, found: Sequence[dict[str, Any]], rounds: int) -> None:
    """Gives every row the time of `rounds` new runs of all schedules in turn, as a ratio to the full schedule's.

    Raises UsageError if the study's model has different weights from the one that loads here.
    """
    model = load_model(result.model)
    if model.provenance.get("weights") != result.provenance.get("weights"):
        raise UsageError(f"the study used other weights of {result.model} than those that load here")
    chunks = Sampler(model).chunks
    plans = {"exact": exact(len(model.grids)).expand(model.grids, chunks)}
    for row in found:
        schedule = StageSchedule.from_dict(result.candidate(row["key"]).schedule)
        plans[row["key"]] = schedule.expand(model.grids, chunks)
    batches = [([text], [seed]) for text, seed in zip(result.search_prompts, result.search_seeds, strict=True)]
    with pinned(1):
        samplers = {name: Sampler(model) for name in plans}
        timings = time_in_turn(samplers, plans, batches, rounds, warm_up_at_most=2)
    cpu = model.device.type == "cpu"
    samples_ms = {name: timing.processor_ms if cpu else timing.samples_ms for name, timing in timings.items()}
    for row in found:
        ratio, low, high = ratio_bounds(samples_ms[row["key"]], samples_ms["exact"])
        row["time"] = {"mean": ratio, "low": low, "high": high, "n": rounds}


def _mean(candidate: Measured, result: StudyResult, metric: str) -> Interval:
    """The paired difference of a metric, shifted by the full schedule's own mean (the same for every prompt, since its image
    equals itself)."""
    difference = candidate.differences[metric]
    values = result.baseline.values[metric][: difference.n]
    own = sum(values) / len(values)
    return Interval(difference.mean + own, difference.low + own, difference.high + own, difference.n, difference.level)


def _plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}


def best(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The non-dominated rows, fastest first."""
    return [rows[i] for i in front([(row["time"]["mean"], row[metric]["mean"]) for row in rows])]


def table(rows: Sequence[Mapping[str, Any]], panels: Sequence[str]) -> str:
    """Markdown: every method's front by each panel's metric, and which points are on the common front."""
    common = {panel: best(rows, panel) for panel in panels}
    shown = []
    for name in METHODS:
        own = [row for row in rows if row["method"] == name]
        shown += [row for row in own if any(row in best(own, panel) for panel in panels)]
    head = ["method", "setting", "time", *panels, "on the common front by"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (1 + len(panels)) + "---|"]
    for row in sorted(shown, key=lambda row: row["time"]["mean"]):
        cells = [row["method"], row["setting"], _cell(row["time"])]
        cells += [_cell(row[panel], "+" if panel == "quality" else "") for panel in panels]
        cells.append(", ".join(panel for panel in panels if row in common[panel]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def draw(rows: Sequence[Mapping[str, Any]], panels: Sequence[str], path: Path) -> None:
    """One panel per metric: all points faint, every method's front with both intervals, one legend below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.6 * len(panels), 6.2), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for order, (name, (color, marker)) in enumerate(METHODS.items()):
            own = [row for row in rows if row["method"] == name]
            if not own:
                continue
            line = best(own, panel)
            axis.scatter(
                [row["time"]["mean"] for row in own],
                [row[panel]["mean"] for row in own],
                s=16, color=color, marker=marker, alpha=0.25, linewidths=0, zorder=2,
            )  # fmt: skip
            axis.errorbar(
                [row["time"]["mean"] for row in line],
                [row[panel]["mean"] for row in line],
                xerr=_arms(line, "time"), yerr=_arms(line, panel),
                color=color, marker=marker, ms=9 if marker == "*" else 6, mec="white", mew=0.6, lw=1.5,
                elinewidth=0.8, capsize=1.5, label=name, zorder=20 - order,
            )  # fmt: skip
        full = 0 if panel == "quality" else 1
        axis.plot([1], [full], "o", ms=11, mfc="none", mec="black", mew=1.6, label="full schedule", zorder=30)
        axis.set_xlabel("time, share of the full schedule")
        axis.set_title(PANELS[panel], fontsize=11)
        axis.grid(alpha=0.25)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"written: {path}")


def _arms(rows: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    values = [row[key] for row in rows]
    return [
        [max(0.0, v["mean"] - v["low"]) for v in values],
        [max(0.0, v["high"] - v["mean"]) for v in values],
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of all fronts; writes figures and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fronts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="directory of a study")
    parser.add_argument("--retime", type=int, default=0, metavar="ROUNDS", help="time all schedules again, in turn")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--figure", type=Path, help="PNG file")
    args = parser.parse_args(argv)
    try:
        result = StudyResult.load(args.run)
        found = rows(result)
        if args.retime:
            retime(result, found, args.retime)
            found.sort(key=lambda row: row["time"]["mean"])
    except UsageError as error:
        print(f"fronts: {error}", file=sys.stderr)
        return error.exit_code
    panels = [panel for panel in PANELS if all(panel in row for row in found)]
    count = len(result.search_prompts)
    print(f"{result.model}: {len(found)} schedules on {count} prompts; {result.command}\n")
    print(table(found, panels))
    if args.output is not None:
        study = {"command": result.command, "device": result.device, "prompts": count, "hashes": result.hashes}
        study["retimed_rounds"] = args.retime
        write_json(args.output, {"environment": environment(), "model": result.model, "study": study, "rows": found})
    if args.figure is not None:
        draw(found, panels, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
