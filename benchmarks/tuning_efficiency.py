"""What tuning costs: the prefix tree on a fixed list of schedules, whole searches against a plain Optuna loop, and growth.

    python -m benchmarks.tuning_efficiency replay --schedules 60 --prompts 64 --output replay.json
    python -m benchmarks.tuning_efficiency search --seeds 3 --trials 40 --output search.json --figure search.png
    python -m benchmarks.tuning_efficiency growth --output growth.json
    python -m benchmarks.tuning_efficiency effort

`replay` evaluates one list both ways on the same micro-batches, decoding and metrics included, and compares every value bit
for bit. `search` runs each variant in turn, every run from nothing (its own proposing process, table of step costs and kept
prefixes), and judges what a run held for its front at any moment by figures that no run saw: held-out prompts and timings of
its own; seconds and images drawn (in scales run over a full schedule's) are both noted. `growth` times one walk over ever more
schedules, and models large models by counted FLOPs. `effort` models what a study of a large model draws at each --effort.

The quality is the SSIM with the full schedule's image, and only published settings are enqueued: nano's own presets came
out of searches like these and already hold its front, so nothing would be left to gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment, write_json
from stagevar.errors import StagevarError
from stagevar.models.registry import find, load_model, published
from stagevar.schedule import Steps, preset
from stagevar.schedule.grids import infinity_grids
from tuner.config.limits import Budget
from tuner.config.prompts import load_prompts
from tuner.config.quality import composite_specs, quality_limits
from tuner.config.space import draws, steps_key
from tuner.config.space_file import load_space
from tuner.evaluation.executor import QualityTask
from tuner.evaluation.local import LocalExecutor
from tuner.evaluation.model_evaluator import ModelEvaluator
from tuner.evaluation.prefix_tree import walk
from tuner.evaluation.step_costs import StepCosts
from tuner.metrics.quality_spec import QualitySpec
from tuner.proposals.sensitivity import Sensitivities, alone, changes_to_measure
from tuner.proposals.trial_sampler import Proposal
from tuner.results import pareto
from tuner.results.candidate import Failed, Measured, Unmeasured
from tuner.statistics.bounds import ratio_interval
from tuner.statistics.pruning import prune_reason, rungs, shrink_to_prior
from tuner.study.finalist_times import BASELINE, latency_stats
from tuner.study.latency_source import SEARCH_ROUNDS, TABLE_ROUNDS, TABLE_SCHEDULES
from tuner.study.ledger import Ledger
from tuner.study.options import FULL_TRIALS, QUICK_TRIALS, SearchShortcuts
from tuner.study.predicted_front import CHANGE_DRAWS, TABLE_PROMPTS
from tuner.study.progress import Progress
from tuner.study.search import Search
from tuner.study.study import BASELINE_ROUNDS

PUBLISHED = ("stagevar-paper", "stagevar-released", "fastvar", "skip-1")
MAX_DROP, BUDGET = 0.35, Budget("95%", fraction=0.95)
#: Seconds of one image on one H200: the arithmetic and weight reads of all scales (benchmarks/RESULTS.md, floor).
ARITHMETIC_S = {"infinity-2b": 0.19, "infinity-8b": 0.63}
#: What each scale costs on top when launched eagerly: Infinity-2B takes 0.892 s where others measured it.
LAUNCH_S = (0.892 - ARITHMETIC_S["infinity-2b"]) / 13
#: Schedules that are verified in the arithmetic of `efforts`, and timed rounds of each.
FINALISTS, VERIFY_ROUNDS = 3, 60
#: Held-out prompts on which that arithmetic lets finalists be decided, as most of nano's are, besides all there are.
DECIDED_ON = 512
PLAIN = SearchShortcuts(batch=1, tree=False, table=False, rungs=False, overlap=False)
#: Name -> (sampler, shortcuts).
VARIANTS: dict[str, tuple[str, SearchShortcuts]] = {
    "plain, Gaussian process": ("gp", PLAIN),
    "plain, TPE": ("tpe", PLAIN),
    "plain, random": ("random", PLAIN),
    "tree alone": ("tpe", dataclasses.replace(PLAIN, batch=5, tree=True)),
    "table alone": ("tpe", dataclasses.replace(PLAIN, table=True)),
    "rungs alone": ("tpe", dataclasses.replace(PLAIN, rungs=True)),
    "overlap alone": ("gp", dataclasses.replace(PLAIN, overlap=True)),
    "all": ("auto", SearchShortcuts()),
    "sensitivity alone": ("tpe", dataclasses.replace(PLAIN, batch=5, tree=True, table=True, sensitivity=True)),
    "all, sensitivity": ("auto", SearchShortcuts(sensitivity=True)),
    "all, sensitivity, few": ("auto", SearchShortcuts(sensitivity=True, few=True)),
    "all, sensitivity known": ("auto", SearchShortcuts(sensitivity=True, few=True)),
    "all, 2 at a time": ("auto", SearchShortcuts(batch=2)),
    "all, 10 at a time": ("auto", SearchShortcuts(batch=10)),
}
#: Variants that start with the table of an earlier study, as `--from` gives it.
WARM = ("all, sensitivity known",)
#: Compared at equal wall time, with more seeds.
PLOTTED = ("all", "plain, TPE", "plain, random")
#: What the figure calls the variants that it shows.
DRAWN = {
    "all, sensitivity known": "with an earlier study's table (--from)",
    "all, sensitivity, few": "table first (--effort quick)",
    "all": "all savings, no table",
    "plain, Gaussian process": "plain loop, Gaussian process",
    "plain, TPE": "plain loop, TPE",
    "plain, random": "plain loop, random",
}


class Bench:
    """One loaded model; every run gets an evaluator of its own that remembers nothing."""

    def __init__(self, model: str, prompts: int, heldout: int, micro_batch: int, quality: Mapping[str, QualitySpec]):
        self.model = load_model(model)
        space = load_space(model)
        source = dataclasses.replace(space.prompts, search=prompts, heldout=heldout, micro_batch=micro_batch)
        self.space = dataclasses.replace(space, prompts=source, quality=quality, enqueue=PUBLISHED, proposals=())
        self.limits, self.metric = quality_limits(quality, MAX_DROP), next(iter(quality))
        self.prompts = load_prompts(source, 0)
        self.facts = self.evaluator().facts
        self.space.fit(self.facts.grids)

    def evaluator(self, keep_bytes: int | None = None, seed: int = 0) -> ModelEvaluator:
        quality = composite_specs(self.space.quality, self.limits)
        prompts = load_prompts(self.space.prompts, seed) if seed else self.prompts
        return ModelEvaluator(self.model, prompts, quality, keep_bytes=keep_bytes)

    def earlier_table(self) -> Sensitivities:
        """The sensitivities that a study with another seed measures, on prompts of its own."""
        evaluator = self.evaluator(seed=1)
        grids, chunks = self.facts.grids, self.facts.chunks
        changes = changes_to_measure(draws(self.space, grids, chunks, 1, CHANGE_DRAWS))
        schedules = (evaluator.full, *(alone(change, evaluator.full) for change in changes))
        full, *rows = evaluator.quality(schedules, "search", 0)
        differences = {c: [row[self.metric] - full[self.metric]] for c, row in zip(changes, rows, strict=True)}
        return Sensitivities((self.metric,), differences)

    def drawn(self, count: int, seed: int = 0, first: int = 0) -> list[Steps]:
        """Distinct schedules: the presets, then uniform draws from the space; all accelerated from scale `first` on only."""
        grids, chunks = self.facts.grids, self.facts.chunks
        full = preset("exact", grids).expand(grids, chunks)
        presets = [preset(n, grids, published(self.facts.model)).expand(grids, chunks) for n in self.space.enqueue]
        found = {steps_key(s): s for s in presets if s[:first] == full[:first]}
        for steps in draws(self.space, grids, chunks, seed):
            if len(found) >= count:
                break
            if steps[:first] == full[:first]:
                found.setdefault(steps_key(steps), steps)
        return list(found.values())[:count]


# ---------------------------------------------------------------------------------------------------- replay


def replay(bench: Bench, schedules: Sequence[Steps], repeats: int) -> dict[str, Any]:
    """Both ways in turn, micro-batch by micro-batch; seconds, values, and the ceiling that step costs predict."""
    alone, tree = bench.evaluator(keep_bytes=0), bench.evaluator()
    batches = bench.prompts["search"].batches
    for evaluator in (alone, tree):  # references, text features and kept prefixes are there before the clock starts
        for batch in range(batches):
            evaluator.quality([evaluator.full], "search", batch)
    seconds: dict[str, list[float]] = {"alone": [], "tree": []}
    values: dict[str, list[Any]] = {"alone": [], "tree": []}
    for repeat in range(repeats):
        for how in ("alone", "tree") if repeat % 2 == 0 else ("tree", "alone"):
            start, found = time.perf_counter(), []
            for batch in range(batches):
                if how == "tree":
                    found.append(tree.quality(schedules, "search", batch))
                else:
                    found.append([alone.quality([steps], "search", batch)[0] for steps in schedules])
            seconds[how].append(time.perf_counter() - start)
            values[how] = found
    equal = all(
        np.array_equal(one[metric], other[metric])
        for ones, others in zip(values["alone"], values["tree"], strict=True)
        for one, other in zip(ones, others, strict=True)
        for metric in one
    )
    saved = float(np.median(np.array(seconds["alone"]) / np.array(seconds["tree"])))
    costs = batch_costs(bench, schedules)
    ceiling = costs["alone_s"] / costs["tree_s"]
    quality = np.stack([[np.concatenate([b[i][bench.metric] for b in values["tree"]])] for i in range(len(schedules))])[
        :, 0
    ]
    return {
        "schedules": len(schedules),
        "prompts": len(bench.prompts["search"]),
        "bit_identical": equal,
        "seconds": seconds,
        "saved": saved,
        "ceiling": ceiling,
        "share_of_ceiling": saved / ceiling,
        "distinct_prefixes": costs["prefixes"],
        "scales_alone": costs["scales_alone"],
        "rungs": rung_bias(bench, schedules, quality),
    }


def batch_costs(bench: Bench, schedules: Sequence[Steps], rounds: int = 3) -> dict[str, Any]:
    """What the list costs per micro-batch from timed steps: every prefix once, or every schedule alone.

    The full schedule's scales are kept and cost the tree nothing; decoding and metrics are paid per distinct schedule both
    ways. This is the ceiling: a tree that costs nothing of its own.
    """
    evaluator = bench.evaluator(keep_bytes=0)
    sampler, full = evaluator.sampler, evaluator.full
    times: dict[Steps, list[float]] = {}

    def advance(generation: Any, step: Any) -> None:
        start = time.perf_counter()
        sampler.advance(generation, step)
        times.setdefault((*generation.steps,), []).append(time.perf_counter() - start)

    texts, _ = bench.prompts["search"].batch(0)
    leaf, begin = [], []
    reference = evaluator.images(full, "search", 0)
    for _ in range(rounds):
        start = time.perf_counter()
        generation = evaluator._begin(sampler, "search", 0, slice(0, len(texts)), schedules)
        begin.append(time.perf_counter() - start)
        walk(sampler, generation, list(schedules), None, advance)
        start = time.perf_counter()
        evaluator.composite.score_parts(sampler.decode(generation), texts, reference)
        leaf.append(time.perf_counter() - start)
    cost = {prefix: float(np.median(values)) for prefix, values in times.items() if not prefix[-1].skipped}
    ends, start_s = float(np.median(leaf)), float(np.median(begin))
    prefixes = [[s[: d + 1] for d in range(len(s)) if not s[d].skipped] for s in schedules]
    alone = sum(cost[p] for chain in prefixes for p in chain) + (ends + start_s) * len(schedules)
    kept = {full[: d + 1] for d in range(len(full) - 1)}
    distinct = {p for chain in prefixes for p in chain} - kept
    return {
        "alone_s": alone,
        "tree_s": sum(cost[p] for p in distinct) + ends * len(schedules) + start_s,
        "prefixes": len(distinct),
        "scales_alone": sum(map(len, prefixes)),
    }


def rung_bias(bench: Bench, schedules: Sequence[Steps], quality_KN: np.ndarray) -> dict[str, Any]:
    """Replays rungs over values that are all known: who is stopped, how often wrongly, and what the sampler is told.

    Latency is the share of token rows, the same for both sides. A stop is wrong when the schedule is on the front of the
    whole list or within the standard error of it.
    """

    def values(own_N: np.ndarray) -> dict[str, np.ndarray]:
        return {bench.metric: own_N, "quality": own_N / MAX_DROP}

    full = values(np.ones(quality_KN.shape[1]))
    rows = [sum(step.processed_tokens(bench.facts.chunks) for step in steps) for steps in schedules]
    full_rows = 2 * sum(h * w for h, w in bench.facts.grids)
    ratios = [r / full_rows for r in rows]
    means = quality_KN.mean(1) - 1
    front = set(pareto.front([(r, m) for r, m in zip(ratios, means, strict=True)]))
    known: dict[str, tuple[float, np.ndarray]] = {}
    shown: list[float] = []
    told, plain, prompts_run, wrong, stopped = [], [], 0, 0, 0
    size = bench.prompts["search"].micro_batch
    for index, own in enumerate(quality_KN):
        for look in rungs(bench.prompts["search"].batches):
            count = min(look * size, own.size)
            why = None
            if count < own.size:
                why = prune_reason(values(own[:count]), ratios[index], full, bench.limits, known)
            if why is not None:
                differences = own[:count] - 1
                told.append(shrink_to_prior(differences, shown) - means[index])
                plain.append(float(differences.mean()) - means[index])
                stopped += 1
                wrong += index in front
                break
        else:
            known[str(index)] = (ratios[index], own / MAX_DROP)
        prompts_run += count
        shown.append(float(own[:count].mean()) - 1)
    return {
        "stopped": stopped,
        "wrongly": wrong,
        "prompts_run": prompts_run,
        "prompts_all": quality_KN.size,
        "bias_told": float(np.mean(told)) if told else None,
        "rms_told": float(np.sqrt(np.mean(np.square(told)))) if told else None,
        "rms_plain_mean": float(np.sqrt(np.mean(np.square(plain)))) if plain else None,
    }


# ---------------------------------------------------------------------------------------------------- search


class Watched(Ledger):
    """A ledger that notes what the study holds for its front whenever that changes.

    Attributes: line: (seconds, keys). drawn: images by then, in full schedules.
    """

    def watch(self, images_drawn: Callable[[], float]) -> None:
        self.began, self.line = time.perf_counter(), []
        self.drawn, self.images_drawn = [], images_drawn

    def keep(self, candidate: Measured | Failed | Unmeasured) -> None:
        super().keep(candidate)
        whole = [c for c in self.candidates.values() if c.feasible]
        points = [(c.latency.ratio.mean, c.differences["quality"].mean) for c in whole]
        keys = sorted(whole[i].key for i in pareto.front(points))
        if not self.line or self.line[-1][1] != keys:
            self.line.append((time.perf_counter() - self.began, keys))
            self.drawn.append(self.images_drawn())


def searched(
    bench: Bench,
    baseline: Measured,
    sampler: str,
    shortcuts: SearchShortcuts,
    seed: int,
    trials: int,
    limit_s: float,
    earlier: Sensitivities | None = None,
) -> tuple[Watched, dict[str, Any]]:
    """One search from nothing but the full schedule and `earlier`: its figures are given, its images and what is kept of it
    are made before the clock starts, as a study measures it before it searches."""
    evaluator = bench.evaluator(None if shortcuts.tree else 0)
    for batch in range(bench.prompts["search"].batches):
        evaluator.quality([evaluator.full], "search", batch)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Watched(Path(folder), bench.space, bench.facts, BUDGET, bench.limits)
        ledger.baseline = baseline
        began = float("inf")
        search = Search(
            Path(folder),
            ledger,
            evaluator,
            LocalExecutor(evaluator),
            bench.prompts["search"],
            Progress(quiet=True),
            trials=trials,
            seed=seed,
            sampler=sampler,
            shortcuts=shortcuts,
            earlier=earlier,
            out_of_time=lambda: "time" if time.perf_counter() - began > limit_s else "",
        )
        search.trial_sampler.completed()  # started before the clock, as a study starts it while the full schedule is measured
        began = time.perf_counter()
        before, unit = evaluator.scales_run, bench.space.prompts.micro_batch / len(bench.facts.grids)
        ledger.watch(lambda: unit * (evaluator.scales_run - before))
        try:
            search.run([])
            seconds = time.perf_counter() - began
        finally:
            search.close()
    facts = search.facts()
    asks = facts.pop("ask_seconds")
    return ledger, {
        **facts,
        "seconds": seconds,
        "evaluated": ledger.evaluated,
        "images_drawn": ledger.images_drawn(),
        "drawn": ledger.drawn,
        "ask_median_s": float(np.median(asks)),
        "asks": len(asks),
    }


def measured_baseline(bench: Bench) -> Measured:
    evaluator = bench.evaluator(0)
    search = bench.prompts["search"]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder), bench.space, bench.facts, BUDGET, bench.limits)
        blank = ledger.blank(ledger.full_key, Proposal(-1, {}))
    timing = evaluator.latency({BASELINE: evaluator.full}, 15)[BASELINE]
    parts = [evaluator.quality([evaluator.full], "search", b)[0] for b in range(search.batches)]
    values = {m: tuple(float(v) for part in parts for v in part[m]) for m in parts[0]}
    return blank.becomes(Measured, latency=latency_stats(timing.samples_ms, None, None), values=values)


def truth(bench: Bench, schedules: Mapping[str, Steps], rounds: int = 9) -> dict[str, tuple[float, float]]:
    """(latency ratio, quality difference) by key, from held-out prompts and timings that no search saw."""
    evaluator, heldout = bench.evaluator(), bench.prompts["heldout"]
    keys = list(schedules)
    rows: dict[str, list[float]] = {key: [] for key in keys}
    executor = LocalExecutor(evaluator)
    tasks = [QualityTask((evaluator.full, *schedules.values()), "heldout", b) for b in range(heldout.batches)]
    for _, (full, *others) in executor.run(tasks):
        for key, own in zip(keys, others, strict=True):
            rows[key] += list(own[bench.metric] - full[bench.metric])
    found = {}
    for first in range(0, len(keys), 12):
        part = keys[first : first + 12]
        timings = evaluator.latency({BASELINE: evaluator.full, **{k: schedules[k] for k in part}}, rounds, 4)
        for key in part:
            ratio = ratio_interval(timings[key].samples_ms, timings[BASELINE].samples_ms)
            found[key] = (ratio.mean, float(np.mean(rows[key])))
    return found


def volume(keys: Sequence[str], figures: Mapping[str, tuple[float, float]]) -> float:
    """Hypervolume of schedules by their true figures, within the limits."""
    return pareto.hypervolume([figures[k] for k in keys], (BUDGET.fraction, -MAX_DROP))


def reached(line: Sequence[tuple[float, float]], target: float) -> float | None:
    """When a run's hypervolume came to the target and stayed at or above it."""
    last = None
    for seconds, value in line:
        if value < target:
            last = None
        elif last is None:
            last = seconds
    return last


def compare(
    bench: Bench, names: Sequence[str], seeds: int, plot_seeds: int, trials: int, limit_s: float
) -> dict[str, Any]:
    """All variants, seed by seed in turn; those of the plot with seeds of their own."""
    baseline = measured_baseline(bench)
    table = bench.earlier_table() if set(names) & set(WARM) else None
    runs: list[dict[str, Any]] = []
    schedules: dict[str, Steps] = {}
    grids, chunks = bench.facts.grids, bench.facts.chunks
    presets = {
        steps_key(s): s
        for s in (preset(n, grids, published(bench.facts.model)).expand(grids, chunks) for n in bench.space.enqueue)
    }
    for seed in range(max(seeds, plot_seeds)):
        due = [name for name in names if seed < (plot_seeds if name in PLOTTED else seeds)]
        for name in due if seed % 2 == 0 else reversed(due):
            sampler, shortcuts = VARIANTS[name]
            count = trials if shortcuts.batch == 1 else 4 * trials
            earlier = table if name in WARM else None
            ledger, facts = searched(bench, baseline, sampler, shortcuts, seed, count, limit_s, earlier)
            schedules |= {key: ledger.steps[key] for _, keys in ledger.line for key in keys}
            runs.append({"variant": name, "seed": seed, "line": ledger.line, **facts})
            print(
                f"{name}, seed {seed}: {facts['evaluated']} schedules in {facts['seconds']:.1f} s, "
                f"own hypervolume {facts['hypervolume']:.4f}, proposing at the end: {facts['proposing_at_the_end']}",
                flush=True,
            )
    figures = truth(bench, schedules | presets)
    floor = volume(list(presets), figures)
    for run in runs:
        volumes = [volume(keys, figures) for _, keys in run["line"]]
        run["volume"] = [(seconds, found) for (seconds, _), found in zip(run["line"], volumes, strict=True)]
        run["volume_by_images"] = list(zip(run["drawn"], volumes, strict=True))
        del run["line"], run["drawn"]
    return {"presets": floor, "runs": runs, "figures": figures, "summary": summarize(runs, floor)}


def summarize(runs: Sequence[Mapping[str, Any]], floor: float, share: float = 0.98) -> dict[str, Any]:
    """Per variant: median final gain over the presets, and time to `share` of the better plain loop's median gain."""
    plain = [n for n in ("plain, Gaussian process", "plain, TPE") if any(r["variant"] == n for r in runs)]

    def own(name: str) -> list[Mapping[str, Any]]:
        return [r for r in runs if r["variant"] == name]

    def gain(run: Mapping[str, Any]) -> float:
        return run["volume"][-1][1] - floor if run["volume"] else 0.0

    found: dict[str, Any] = {}
    targets = {n: floor + share * float(np.median([gain(r) for r in own(n)])) for n in plain}
    for name in dict.fromkeys(r["variant"] for r in runs):
        row: dict[str, Any] = {
            "runs": len(own(name)),
            "gain": float(np.median([gain(r) for r in own(name)])),
            "schedules": float(np.median([r["evaluated"] for r in own(name)])),
            "seconds": float(np.median([r["seconds"] for r in own(name)])),
            "images": float(np.median([r["images_drawn"] for r in own(name)])),
            "seconds_per_schedule": float(np.median([r["seconds"] / r["evaluated"] for r in own(name)])),
            "ask_median_s": float(np.median([r["ask_median_s"] for r in own(name)])),
        }
        for other, target in targets.items():
            times = [reached(r["volume"], target) for r in own(name)]
            missed = sum(t is None for t in times)
            drawn = [reached(r["volume_by_images"], target) for r in own(name)]
            row[f"to the gain of {other}"] = {
                "seconds": float(np.median([np.inf if t is None else t for t in times])),
                "images": float(np.median([np.inf if t is None else t for t in drawn])),
                "missed": missed,
            }
        found[name] = row
    return found


def draw_volumes(results: Mapping[str, Any], path: Path) -> None:
    """Hypervolume gain over wall time: medians of every variant, at the right the range over seeds at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.6, 4.4), layout="constrained")
    shown = [name for name in DRAWN if name in results["summary"]]
    end = max(r["seconds"] for r in results["runs"])
    grid = np.linspace(0, end, 400)
    colors = ("#0072B2", "#56B4E9", "#009E73", "#777777", "#D55E00", "#CC79A7")
    for place, (color, name) in enumerate(zip(colors, shown, strict=False), 1):
        lines = []
        for run in (r for r in results["runs"] if r["variant"] == name):
            seconds = [0.0, *(s for s, _ in run["volume"])]
            gains = [0.0, *(max(0.0, v - results["presets"]) for _, v in run["volume"])]
            lines.append([gains[np.searchsorted(seconds, t, side="right") - 1] for t in grid])
        axis.plot(grid, np.median(lines, axis=0), color=color, lw=1.8, label=f"{DRAWN[name]} ({len(lines)} seeds)")
        last = [line[-1] for line in lines]
        axis.vlines(end * (1 + 0.012 * place), min(last), max(last), color=color, lw=3)
    axis.set_xlabel("wall time of the search, s (bars: range over seeds at the end)")
    axis.set_ylabel("hypervolume gained over the presets\n(held-out prompts, own timings)")
    axis.set_xlim(0, end * (1 + 0.012 * (len(shown) + 1)))
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right", frameon=False)
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")


# ---------------------------------------------------------------------------------------------------- growth


def growth(bench: Bench, counts: Sequence[int]) -> dict[str, Any]:
    """Seconds of one micro-batch for ever more schedules of one list, and what the last ones added."""
    evaluator = bench.evaluator()
    schedules = bench.drawn(max(counts))
    alone = bench.evaluator(0)
    for batch in range(bench.prompts["search"].batches):  # references and kept scales, which no schedule pays for
        evaluator.quality([evaluator.full], "search", batch)
    alone.quality([evaluator.full], "search", 0)
    start = time.perf_counter()
    for _ in range(3):
        alone.quality([evaluator.full], "search", 0)
    full_s = (time.perf_counter() - start) / 3
    rows, before = [], (0, 0.0)
    for count in counts:
        start = time.perf_counter()
        evaluator.quality(schedules[:count], "search", 0)
        seconds = time.perf_counter() - start
        marginal = (seconds - before[1]) / (count - before[0])
        rows.append({"schedules": count, "seconds": seconds, "marginal_of_full": marginal / full_s})
        before = (count, seconds)
    prompts = []
    for batches in (n for n in (1, 2, 4, 8, 16) if n <= bench.prompts["search"].batches):
        start = time.perf_counter()
        for batch in range(batches):
            evaluator.quality(schedules[:30], "search", batch)
        prompts.append(
            {"prompts": batches * bench.prompts["search"].micro_batch, "seconds": time.perf_counter() - start}
        )
    return {"full_s": full_s, "by_schedules": rows, "by_prompts_30_schedules": prompts}


class Modelled:
    """Cost of walks of a large model, from arithmetic, in full generations.

    A scale costs its share of the model's arithmetic (linear layers by token rows, attention by rows times cache): alone, as
    with recorded graphs, and with the launches of an eager engine on top. Nothing here was measured on a large model.
    """

    def __init__(self, name: str):
        settings, self.name, self.space = find(name).settings["transformer"], name, load_space(name)
        self.grids, self.chunks, self.width = infinity_grids()[0], settings["chunks"], settings["width"]
        self.full = preset("exact", self.grids).expand(self.grids, self.chunks)
        self.table = StepCosts(self.full, self.chunks)
        self.total = sum(self._work(self.full[: d + 1]) for d in range(len(self.full)))
        launches = LAUNCH_S / ARITHMETIC_S[name]
        self.overheads = {"graphs": 0.0, "eager": launches}
        self.image_s = {how: ARITHMETIC_S[name] * (1 + o * len(self.full)) for how, o in self.overheads.items()}

    def drawn(self, count: int) -> list[Steps]:
        """The first so many distinct schedules drawn from the space."""
        found: dict[str, Steps] = {}
        for steps in draws(self.space, self.grids, self.chunks, 0):
            if len(found) >= count:
                break
            found.setdefault(steps_key(steps), steps)
        return list(found.values())

    def cost(self, schedules: Sequence[Steps], how: str) -> tuple[float, float]:
        """Full generations per prompt: as one tree, and each schedule alone."""
        prefixes = [[s[: d + 1] for d in range(len(s)) if not s[d].skipped] for s in schedules]
        overhead = self.overheads[how]
        unit = 1 + overhead * len(self.full)
        distinct = {p for chain in prefixes for p in chain}
        tree = sum(self._work(p) / self.total + overhead for p in distinct) / unit
        alone = sum(self._work(p) / self.total + overhead for chain in prefixes for p in chain) / unit
        return tree, alone

    def _work(self, prefix: Steps) -> float:
        step, cached = prefix[-1], self.table._cached(prefix, len(prefix) - 1)
        rows = step.processed_tokens(self.chunks)
        kept = rows / len(step.branches)
        return rows * (12 * self.width + 2 * (cached + kept))


def modelled(name: str, counts: Sequence[int]) -> dict[str, Any]:
    """Cost of the tree of ever more schedules of a large model."""
    model = Modelled(name)
    schedules = model.drawn(max(counts))
    rows = []
    for count in counts:
        row: dict[str, Any] = {"schedules": count}
        for how in model.overheads:
            tree, single = model.cost(schedules[:count], how)
            row[how] = {"full_generations": tree, "saved": single / tree}
        rows.append(row)
    return {"model": name, "rows": rows}


def efforts(name: str) -> dict[str, Any]:
    """What a study of a large model draws and times at each effort, in full generations, and the hours of one GPU.

    Schedules of the search are judged on all search prompts (rungs save some of that); FINALISTS of the cost of a drawn
    schedule, one of them if quick, are verified beside the full schedule, one image at a time, on DECIDED_ON held-out prompts
    or, "at most", on all of them. Metrics are not counted.
    """
    model = Modelled(name)
    source = model.space.prompts
    changes = changes_to_measure(model.drawn(CHANGE_DRAWS))
    lasting = [alone(change, model.full) for change in changes]
    found: dict[str, Any] = {"model": name, "changes": len(changes), "search": source.search, "heldout": source.heldout}
    for how in model.overheads:

        def tree(count: int, how: str = how) -> float:
            return model.cost(model.drawn(count), how)[0]

        finalist = model.cost(model.drawn(100), how)[1] / 100
        timing = BASELINE_ROUNDS + (TABLE_ROUNDS + 1) * tree(TABLE_SCHEDULES) + SEARCH_ROUNDS * (1 + 3 * finalist)
        rounds = VERIFY_ROUNDS * (1 + FINALISTS * finalist)
        table = TABLE_PROMPTS * model.cost(lasting, how)[0]
        rows = {"instant": {"timing": timing}}
        for effort, count, judged in (("quick", QUICK_TRIALS, 1), ("full", FULL_TRIALS, FINALISTS)):
            search = source.search * (1 + tree(count))
            for prompts, most in ((DECIDED_ON, ""), (source.heldout, ", at most")):
                verifying = prompts * (1 + judged * finalist) + rounds
                parts = {"timing": timing, "table": table, "search": search, "verification": verifying}
                rows[f"{effort}{most}"] = parts
        found[how] = {
            effort: {
                **{part: round(value) for part, value in parts.items()},
                "full_generations": round(sum(parts.values())),
                "hours": round(sum(parts.values()) * model.image_s[how] / 3600, 2),
            }
            for effort, parts in rows.items()
        }
    return found


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("replay", "search", "growth", "effort"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--heldout", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--schedules", type=int, default=60)
    parser.add_argument(
        "--from-run", type=Path, help="replay: the schedules of a study's run directory instead of draws"
    )
    parser.add_argument("--first", type=int, default=0, help="replay: draws that are accelerated from this scale on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot-seeds", type=int, default=5, help="of the variants compared at equal wall time")
    parser.add_argument(
        "--trials", type=int, default=40, help="of a plain loop; batched ones may use four times as many"
    )
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per search")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args(argv)
    if args.what == "effort":
        for name in ("infinity-2b", "infinity-8b"):
            print(efforts(name))
        return 0
    try:
        torch.set_num_threads(1)
        bench = Bench(args.model, args.prompts, args.heldout, args.micro_batch, {"ssim": QualitySpec()})
        figures: dict[str, Any] = {"environment": environment()}
        if args.what == "replay":
            schedules = (
                from_run(args.from_run, args.schedules)
                if args.from_run
                else bench.drawn(args.schedules, first=args.first)
            )
            figures |= replay(bench, schedules, args.repeats)
            print({k: v for k, v in figures.items() if k != "environment"})
        elif args.what == "search":
            figures |= compare(bench, args.variants, args.seeds, args.plot_seeds, args.trials, args.limit)
            for name, row in figures["summary"].items():
                print(name, row)
        else:
            figures |= {"nano": growth(bench, args.counts)}
            figures["modelled"] = [modelled(name, args.counts) for name in ("infinity-2b", "infinity-8b")]
            print({k: v for k, v in figures.items() if k != "environment"})
    except StagevarError as error:
        print(f"tuning_efficiency: {error}", file=sys.stderr)
        return error.exit_code
    if args.output:
        write_json(args.output, figures)
    if args.figure and args.what == "search":
        draw_volumes(figures, args.figure)
    return 0


def from_run(run_dir: Path, count: int) -> list[Steps]:
    """The first schedules that a study evaluated."""
    from stagevar.schedule import StageSchedule
    from tuner.results.result import StudyResult

    result = StudyResult.load(run_dir)
    found = {}
    for candidate in result.candidates:
        steps = StageSchedule.from_dict(candidate.schedule).expand(result.grids, result.chunks)
        found.setdefault(candidate.key, steps)
    return list(found.values())[:count]


if __name__ == "__main__":
    sys.exit(main())
