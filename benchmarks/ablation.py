"""What each part of the acceleration methods contributes, one row each, on one model in one interleaved run.

    python -m benchmarks.ablation --model nano --prompts 120 --rounds 40 --output ablation.json

Rows: the null branch alone, projection alone, projection against SVD, restoration against least squares, Gaussian against
row selection, trunk against chunks, and FastVAR at the speed of StageVAR. Every row is compared with the full schedule on
the same prompts and seeds; ratios of latency pair the same prompt in the same round.

Source: StageVAR (arXiv 2512.16483), whose figures on Infinity are in PAPER; SVD and least squares are the alternatives that
the paper argues against, written here from their definitions.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import environment, write_json
from stagevar.accelerators.base import Accelerator, Cached, ScaleContext
from stagevar.accelerators.stagevar import StageVAR, draw_indices, gather_rows, project, restore
from stagevar.errors import UsageError
from stagevar.models.base import Around, LoadedModel, Site, SiteFn
from stagevar.models.registry import load_model
from stagevar.sampling.bench import bench_prompts, compare, format_table
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import LowRank, StageSchedule, Steps, structure_boundary

#: What the paper reports on Infinity-2B (speed-up over the full schedule), for the rows that it has.
PAPER = {"null branch alone": 1.5, "projection alone": 1.8}
#: Kept share of the tokens at the accelerated scales of every reduced row.
RATIO = 0.25
#: Kept shares tried to find FastVAR's setting at a given speed.
FASTVAR_RATIOS = (0.75, 0.5, 0.25, 0.1)


class Alternative(StageVAR):
    """StageVAR with another projection or restoration at the chunks.

    Args:
        projection: "gaussian", "rows" or "svd" (the r leading left singular vectors of the tokens).
        restoration: "rtr" (the method's own) or "least squares" (the token map of smallest norm that projects to the r
            outputs).
    """

    def __init__(self, projection: str, restoration: str):
        self.projection, self.restoration = projection, restoration

    def _reduced(self, context: ScaleContext, reduction: LowRank, site: Site, x: Tensor, run: SiteFn) -> Tensor:
        step, noise, tokens = context.step, context.noise, x.shape[1]
        rank = reduction.ranks[site.index]
        index_Rr = draw_indices(x, rank, noise.site_uniform("index", site, (tokens,)))
        if self.projection == "svd":
            q_RMr = torch.linalg.svd(x.float(), full_matrices=False).U[..., :rank]
            rank = q_RMr.shape[-1]
            index_Rr = index_Rr[:, :rank]
        elif self.projection == "rows":
            q_RMr = torch.nn.functional.one_hot(index_Rr, tokens).to(x.dtype).transpose(1, 2)
        else:
            q_RMr = noise.site_normal("projection", site, (tokens, rank)) / math.sqrt(rank)
        small = gather_rows(x, index_Rr) if self.projection == "rows" else q_RMr.transpose(1, 2) @ x
        y_RrC = run(small, index_Rr if reduction.rope == "index" else torch.arange(rank, device=x.device))
        if self.restoration == "least squares":
            return torch.linalg.pinv(q_RMr.transpose(1, 2).float()) @ y_RrC
        return restore(y_RrC, index_Rr, context.state[site].resized(step.grid, step.branches))


class Growth(StageVAR):
    """StageVAR that also records how much Gaussian projection increases the root-mean-square norm of tokens."""

    def __init__(self) -> None:
        self.factors: list[float] = []
        self.expected: list[float] = []

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        inner, reduction = super().around(context, updates), context.step.reduction

        def around(site: Site, x: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
            if site.kind == "chunk" and isinstance(reduction, LowRank):
                rank = reduction.ranks[site.index]
                small = project(x, context.noise.site_normal("projection", site, (x.shape[1], rank)))
                self.factors.append(float((small.square().sum(-1).mean() / x.square().sum(-1).mean()).sqrt()))
                self.expected.append(math.sqrt(x.shape[1] / rank))
            return inner(site, x, positions, run)

        return around


def rows(model: LoadedModel, ratio: float) -> tuple[dict[str, StageSchedule], dict[str, Accelerator]]:
    """Schedules by row name, and accelerators of the rows that do not use the default one."""
    start = structure_boundary(model.grids)
    depth = model.transformer.depth

    def reduced(**change: Any) -> StageSchedule:
        return StageSchedule(start, **{"rank_ratios": (ratio,), **change})

    schedules = {
        "null branch alone": StageSchedule(start, cfg_delay=0),
        "conditional branch alone": StageSchedule(start, cfg_delay=0, branch="cond"),
        "projection alone": reduced(),
        "projection, null branch": reduced(cfg_delay=0),
        "SVD alone": reduced(),
        "SVD, least squares": reduced(),
        "projection, least squares": reduced(),
        "rows alone": reduced(projection="rows"),
        "rows, own positions": reduced(projection="rows", rope="index"),
        "rows, own positions, conditional": reduced(projection="rows", rope="index", cfg_delay=0, branch="cond"),
        "projection at trunk": reduced(site="trunk"),
        "rows at trunk": reduced(projection="rows", rope="index", site="trunk"),
    }
    for kept in FASTVAR_RATIOS:
        schedules[f"fastvar {kept:g}"] = reduced(accelerator="fastvar", layers=(0, depth), rank_ratios=(kept,))
        schedules[f"fastvar {kept:g}, conditional"] = reduced(
            accelerator="fastvar", layers=(0, depth), rank_ratios=(kept,), cfg_delay=0, branch="cond"
        )
    accelerators: dict[str, Accelerator] = {
        "SVD alone": Alternative("svd", "rtr"),
        "SVD, least squares": Alternative("svd", "least squares"),
        "projection, least squares": Alternative("gaussian", "least squares"),
    }
    return schedules, accelerators


def norm_growth(model: LoadedModel, steps: Steps, prompts: Sequence[str]) -> dict[str, float]:
    """Measured growth of the token norm by Gaussian projection against sqrt(tokens / rank), means over sites."""
    probe = Growth()
    Sampler(model, probe).generate(prompts, list(range(len(prompts))), steps)
    return {"measured": float(np.mean(probe.factors)), "sqrt(M/r)": float(np.mean(probe.expected))}


def speed(row: Mapping[str, Any]) -> float:
    """Cost as a share of the full schedule's: processor time on a CPU, since other processes disturb latency there."""
    return row.get("cpu_ratio", row["ratio"])


def equal_speed(table: Sequence[Mapping[str, Any]], name: str, family: str) -> Mapping[str, Any]:
    """The row of a family (a name prefix) whose speed is nearest to that of a row."""
    target = next(speed(row) for row in table if row["name"] == name)
    candidates = [row for row in table if row["name"].startswith(family)]
    return min(candidates, key=lambda row: abs(math.log(speed(row) / target)))


def nano_verdicts(prompts: Sequence[str]) -> dict[str, Any]:
    """The pixel checker's verdict (share of images right) as a paired score, for nano's own prompts."""
    from stagevar.models.nano.checker import check_batch
    from stagevar.models.nano.scenes import prompts as scenes

    metadata = scenes("heldout", len(prompts))

    def right(images_BHW3: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        return check_batch(images_BHW3.transpose(0, 3, 1, 2) / 255.0, metadata[: len(texts)]).astype(float)

    return {"geneval": right}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--weights", help="folder, or 'random' (no quality columns)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--ratio", type=float, default=RATIO, help="kept share of the tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    try:
        model = load_model(args.model, weights=args.weights, device=args.device)
        schedules, accelerators = rows(model, args.ratio)
        chunks = Sampler(model).chunks
        prompts = bench_prompts(model, args.prompts)
        table = compare(
            model,
            ["skip-1", "skip-2", "stagevar-paper", "stagevar-released", "fastvar"],
            extra_steps={name: schedule.expand(model.grids, chunks) for name, schedule in schedules.items()},
            samplers={name: partial(Sampler, accelerator=own) for name, own in accelerators.items()},
            rounds=args.rounds,
            prompts=prompts,
            threads=args.threads,
            warm_up_at_most=3,  # dozens of rows; processor time needs little warm-up
            scores=nano_verdicts(prompts) if model.name == "nano" and not model.random_weights else None,
        )
        growth = norm_growth(model, schedules["projection alone"].expand(model.grids, chunks), prompts[:4])
    except UsageError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return error.exit_code
    print(format_table(table))
    for name, paper in PAPER.items():
        ratio = next(speed(row) for row in table if row["name"] == name)
        print(f"{name}: {1 / ratio:.2f}x here, about {paper}x in the paper")
    print(f"token norm after projection: x{growth['measured']:.2f}, sqrt(M/r) = {growth['sqrt(M/r)']:.2f}")
    matches = {}
    for name in ("projection alone", "rows, own positions", "projection, null branch", "projection at trunk"):
        matches[name] = equal_speed(table, name, "fastvar ")["name"]
        print(f"nearest in speed to {name}: {matches[name]}")
    if args.output is not None:
        measured = {"rows": table, "norm_growth": growth, "equal_speed": matches}
        write_json(args.output, {"environment": environment(model.device), "model": model.name, **measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
