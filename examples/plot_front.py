"""A figure of a finished run: the Pareto front of its schedules, and what three of them draw.

python examples/plot_front.py outputs/demo front.png
"""

import sys

from matplotlib.figure import Figure
from PIL import Image

from tuner import open_run

PROMPTS = [
    "a photo of a striped blue ring",
    "a photo of two yellow stars",
    "a photo of a red circle left of a cyan cross",
]
INK, PICK, OTHER = "#22252b", "#d4480b", "#2f6bd8"


def draw(run_dir: str, path: str) -> None:
    """Writes the figure."""
    result = open_run(run_dir)
    trials, study = result.trials, result.study
    trials = trials[trials["latency_ratio"].notna() & trials["quality"].notna()]
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes = left.subplots()
    metric = f"metric.{study.limits[0].metric}"
    speedup = 1 / trials["latency_ratio"]
    axes.scatter(speedup, trials[metric], s=28, color=OTHER, alpha=0.45, label=f"{len(trials)} schedules tried")
    front = trials[trials["on_front"]].sort_values("latency_ratio")
    axes.plot(1 / front["latency_ratio"], front[metric], color=OTHER, lw=1.2, label="Pareto front")
    axes.scatter([1], [0], s=60, marker="s", color=INK, label="full schedule", zorder=3)
    if study.pick is not None:
        ratio = study.pick.final_latency.against_full
        change = study.pick.final_differences[study.limits[0].metric]
        axes.errorbar(
            1 / ratio.mean,
            change.mean,
            xerr=[[1 / ratio.mean - 1 / ratio.high], [1 / ratio.low - 1 / ratio.mean]],
            yerr=[[change.mean - change.low], [change.high - change.mean]],
            fmt="D",
            color=PICK,
            capsize=3,
            label=f"pick, {change.n} held-out prompts",
            zorder=4,
        )
    axes.axhline(-study.limits[0].max_drop, color=PICK, lw=1, ls=":", label="allowed drop")
    axes.set_xlabel("speed-up")
    axes.set_ylabel(f"change of {study.limits[0].metric} ({study.limits[0].unit})")
    axes.set_title(f"{study.model}, budget {study.budget}: {study.verdict}", loc="left", fontsize=10)
    axes.legend(fontsize=7.5, frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    _images(right, result)
    figure.savefig(path)


def _images(figure, result) -> None:
    """The same prompts and seeds with the full schedule and with the pick."""
    from stagevar import Sampler, load_model
    from stagevar.schedule import exact

    model = load_model(result.study.model, device="cpu")
    sampler = Sampler(model)
    full = exact(len(model.grids)).expand(model.grids, sampler.chunks)
    rows = {"full schedule": full}
    if result.profile is not None:
        rows["pick"] = result.profile.expand(model)
    panels = figure.subplots(len(rows), len(PROMPTS), squeeze=False)
    for line, (name, steps) in zip(panels, rows.items(), strict=True):
        for panel, prompt, pixels in zip(line, PROMPTS, sampler.generate(PROMPTS, [1, 2, 3], steps), strict=True):
            panel.imshow(Image.fromarray(pixels), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if name == "full schedule":
                panel.set_title(prompt.removeprefix("a photo of ").replace(" left", "\nleft"), fontsize=8)
        line[0].set_ylabel(name, fontsize=9)


if __name__ == "__main__":
    draw(*sys.argv[1:3])
