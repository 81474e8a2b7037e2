"""What the ablation of a proposal says: a row per first accelerated scale, and the verdict in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stagevar.analysis.result import Curve
from stagevar.analysis.rules import Rules, begun_at, is_idle, scale_name
from stagevar.models.base import LoadedModel
from stagevar.schedule import StageSchedule, exact

#: score(images uint8 (B, H, W, 3), prompts) -> (B,), higher is better
Quality = Callable[[np.ndarray, Sequence[str]], np.ndarray]


def ablation_rows(
    scores: Mapping[str, np.ndarray],
    model: LoadedModel,
    proposal: StageSchedule,
    rules: Rules,
) -> list[dict[str, Any]]:
    """Per first accelerated scale: its grid, the share of token rows, and the mean of every score with its interval."""
    chunks = len(model.transformer.chunk_layers)
    curves = {name: Curve.of(values, rules.confidence) for name, values in scores.items()}
    full = sum(s.processed_tokens(chunks) for s in exact(len(model.grids)).expand(model.grids, chunks))
    rows = []
    for index in range(len(model.grids) - 1):
        start = index + 1
        steps = begun_at(proposal, start, model).expand(model.grids, chunks)
        row: dict[str, Any] = {
            "first_accelerated_scale": start,
            "grid": list(model.grids[start]),
            "token_rows": round(sum(s.processed_tokens(chunks) for s in steps) / full, 6),
        }
        for name, curve in curves.items():
            row[name] = {"mean": curve.mean[index], "low": curve.low[index], "high": curve.high[index]}
        rows.append(row)
    return rows


def ablation_verdict(
    rows: Sequence[Mapping[str, Any]],
    model: LoadedModel,
    proposal: StageSchedule,
    quality: Mapping[str, Quality],
    rules: Rules,
) -> str:
    """Whether starting at the proposal costs nothing measurable, and starting at the first possible scale does."""
    late, early = rows[proposal.structure_end - 1], rows[0]
    if quality:
        name = f"change:{next(iter(quality))}"
        what = f"{name.removeprefix('change:')} changes by {{mean:+.4f}} ({{low:+.4f}} to {{high:+.4f}})"
        harmless, telling = late[name]["high"] >= 0, early[name]["high"] < 0
    else:
        name, what = "ssim", "SSIM with the full schedule's image is {mean:.3f} ({low:.3f} to {high:.3f})"
        harmless = telling = early[name]["high"] < late[name]["low"]
    if is_idle(proposal):
        return (
            f"no acceleration is proposed; with the {proposal.branch} branch alone from {scale_name(model, 1)} on, "
            + what.format(**early[name])
        )
    finding = (
        "not confirmed" if not harmless else "confirmed" if telling else "harmless, but so is starting earlier here"
    )
    return (
        f"{finding}: accelerated from {scale_name(model, proposal.structure_end)} on, "
        f"{what.format(**late[name])}; from {scale_name(model, 1)} on, {what.format(**early[name])} "
        f"({rules.confidence:.0%} intervals)"
    )
