"""The pictures of an analysis. matplotlib is imported where it draws, without its global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from stagevar.analysis.result import Analysis

_STAGES = {"semantic": "#7a5cd0", "structure": "#1789a6", "fidelity": "#dd8a1d"}
_LINES = ("#2f6bd8", "#d4480b", "#1a7f4b", "#8a4fbf", "#a06a00", "#c22f3d")


def draw(analysis: Analysis, directory: Path) -> list[Path]:
    """All pictures of an analysis, drawn into a folder that exists."""
    paths = [plot_curves(analysis, directory / "analysis.png")]
    if analysis.partials is not None:
        paths.append(plot_partials(analysis, directory / "partials.png"))
    return paths


def plot_curves(analysis: Analysis, path: Path) -> Path:
    """Similarity, change per band, guidance, ranks and ablation against the scale, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3)
    title = f"{analysis.model}: {len(analysis.prompts)} prompts"
    if analysis.weights == "random":
        title += ", random weights (of no use for quality)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    sides = [str(h) if h == w else f"{h}x{w}" for h, w in analysis.grids]
    scales = np.arange(len(sides))

    panel = panels[0, 0]
    for i, (name, curve) in enumerate((n, c) for n, c in analysis.similarity.items() if n != "psnr_db"):
        dashed = "--" if analysis.stage_of[name] == "none" else "-"
        _band(panel, scales, curve, _LINES[i % len(_LINES)], name.replace("_", " "), dashed)
    _finish(panel, analysis, sides, "Partial image against the final one", "similarity")

    panel = panels[0, 1]
    for i, (band, curve) in enumerate(analysis.frequency.items()):
        _band(panel, scales, curve, _LINES[i], f"{band} frequencies")
    panel.set_yscale("log")
    _finish(panel, analysis, sides, "Change that a scale makes", "energy over the final image's")

    panel = panels[0, 2]
    for i, (branch, curves) in enumerate(analysis.guidance.items()):
        _band(panel, scales, curves["image"], _LINES[i], f"image, {branch} alone")
        panel.plot(scales, curves["flips"].mean, color=_LINES[i], linestyle=":", linewidth=1.4, label=f"bits, {branch}")
    _finish(
        panel, analysis, sides, "What dropping guidance at one scale changes", "1 - SSIM (line), share of draws (dots)"
    )

    panel = panels[1, 0]
    for i, (branch, curves) in enumerate(analysis.guidance.items()):
        _band(panel, scales, curves["divergence"], _LINES[i], f"guided from {branch}")
    panel.set_yscale("log")
    _finish(panel, analysis, sides, "Guidance in the logits", "KL divergence, nats per draw")

    panel = panels[1, 1]
    for i, energy in enumerate(e for e in ("0.99", "0.96", "0.90") if e in analysis.rank_ratio):
        rows = np.array(list(analysis.rank_ratio[energy].values()))
        panel.plot(scales, rows.mean(axis=1), color=_LINES[i], marker="o", markersize=3.5, label=f"energy {energy}")
        panel.fill_between(scales, rows.min(axis=1), rows.max(axis=1), color=_LINES[i], alpha=0.15, linewidth=0)
    panel.set_ylim(0, 1.03)
    _finish(panel, analysis, sides, "Tokens that hold the energy (band: chunks)", "share of tokens")

    panel = panels[1, 2]
    if analysis.ablation:
        starts = [row["first_accelerated_scale"] for row in analysis.ablation]
        names = [n for n in analysis.ablation[0] if n.startswith("change:")] or ["ssim"]
        for i, name in enumerate(names):
            values = [row[name] for row in analysis.ablation]
            means = np.array([v["mean"] for v in values])
            spread = np.array([[m - v["low"], v["high"] - m] for m, v in zip(means, values, strict=True)]).T
            label = name.removeprefix("change:").replace("_", " ")
            panel.errorbar(
                starts, means, yerr=spread, color=_LINES[i], marker="o", markersize=4, capsize=3, label=label
            )
        if names != ["ssim"]:
            panel.axhline(0, color="#9aa0a8", linewidth=0.8)
        what = "quality change" if names != ["ssim"] else "SSIM with the full schedule"
        _finish(panel, analysis, sides, "Ablation: accelerated from this scale on", what)
    else:
        panel.set_axis_off()
    figure.savefig(path)
    return path


def _band(panel: Any, scales: np.ndarray, curve: Any, color: str, label: str, style: str = "-") -> None:
    panel.plot(scales, curve.mean, style, color=color, marker="o", markersize=3.5, linewidth=1.7, label=label)
    panel.fill_between(scales, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)


def _finish(panel: Any, analysis: Analysis, sides: list[str], title: str, y_label: str) -> None:
    """Stages as tinted bands, scales by side, no frame but the two axes."""
    plan, last = analysis.proposal, len(sides)
    edges = {"semantic": (0, plan.semantic_end), "structure": (plan.semantic_end, plan.structure_end)}
    edges["fidelity"] = (plan.structure_end, last)
    for stage, (start, stop) in edges.items():
        if stop > start:
            panel.axvspan(start - 0.5, stop - 0.5, color=_STAGES[stage], alpha=0.07, linewidth=0)
    if plan.cfg_cutoff is not None and plan.cfg_cutoff < last:
        panel.axvline(plan.cfg_cutoff - 0.5, color="#16191f", linewidth=0.9, linestyle="--")
    panel.set_xlim(-0.5, last - 0.5)
    panel.set_xticks(range(last), sides, fontsize=8)
    panel.tick_params(axis="y", labelsize=8)
    panel.set_xlabel("scale (side in tokens)", fontsize=9)
    panel.set_ylabel(y_label, fontsize=9)
    panel.set_title(title, loc="left", fontsize=10.5)
    panel.legend(fontsize=7.5, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def plot_partials(analysis: Analysis, path: Path) -> Path:
    """One row of partial images per shown prompt, coarse to fine, each at least 96 pixels high."""
    assert analysis.partials is not None
    images_NKHW3 = analysis.partials
    height = images_NKHW3.shape[2]
    times = max(1, -(-96 // height))
    step = max(1, height // 256)
    images_NKHW3 = images_NKHW3[:, :, ::step, ::step].repeat(times, axis=2).repeat(times, axis=3)
    count, scales, high, wide, _ = images_NKHW3.shape
    gap = 4
    sheet = np.full((count * (high + gap) - gap, scales * (wide + gap) - gap, 3), 255, dtype=np.uint8)
    for row in range(count):
        for scale in range(scales):
            y, x = row * (high + gap), scale * (wide + gap)
            sheet[y : y + high, x : x + wide] = images_NKHW3[row, scale]
    Image.fromarray(sheet).save(path)
    return path
