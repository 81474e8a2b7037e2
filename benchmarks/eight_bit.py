"""What 8 bits cost in quality on nano: products in the fidelity stage, products throughout, keys and values.

    python -m benchmarks.eight_bit --prompts 480

Paired with the full schedule in the model's precision on the same prompts and seeds: PSNR, and the pixel checker's share of
right images with a bootstrap interval of the difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.ablation import nano_verdicts
from benchmarks.environment import environment, write_json
from stagevar.images import psnr_db
from stagevar.models.base import LoadedModel
from stagevar.models.registry import load_model
from stagevar.sampling.bench import bench_prompts
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, structure_boundary
from stagevar.statistics import mean_bounds
from stagevar.timing import pinned

BATCH = 16


def draw(model: LoadedModel, schedule: StageSchedule, prompts: Sequence[str]) -> np.ndarray:
    """Images (N, H, W, 3) uint8, with seeds from 0 on."""
    sampler = Sampler(model)
    steps = schedule.expand(model.grids, sampler.chunks)
    starts = range(0, len(prompts), BATCH)
    parts = [prompts[start : start + BATCH] for start in starts]
    return np.concatenate(
        [sampler.generate(p, range(start, start + len(p)), steps) for start, p in zip(starts, parts, strict=True)]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eight_bit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=480)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/eight_bit.json"))
    args = parser.parse_args(argv)
    model = load_model("nano", device="cpu")
    small = dataclasses.replace(model, kv_cache="int8")
    prompts = bench_prompts(model, args.prompts)
    right = nano_verdicts(prompts)["geneval"]
    fidelity, full = structure_boundary(model.grids), len(model.grids)
    rows = {f"{precision} from scale {start}": (model, StageSchedule(start, precision=precision))
            for start in (fidelity, 0) for precision in ("int8", "fp8")}  # fmt: skip
    rows["int8 keys and values"] = (small, StageSchedule(full))
    rows["int8 keys and values, int8 throughout"] = (small, StageSchedule(0, precision="int8"))
    found = {}
    with pinned(args.threads):
        reference = draw(model, StageSchedule(full), prompts)
        truth = right(reference, prompts)
        print(f"full schedule: {truth.mean():.3f} right of {len(prompts)}")
        for name, (of, schedule) in rows.items():
            images = draw(of, schedule, prompts)
            difference = right(images, prompts) - truth
            low, high = mean_bounds(difference)
            equal = float((images == reference).all((1, 2, 3)).mean())
            values = {
                "psnr": float(psnr_db(images, reference).mean()),
                "equal": equal,
                "right": [float(difference.mean()), low, high],
            }
            found[name] = values
            print(
                f"{name:<40} PSNR {values['psnr']:6.1f} dB, {equal:4.0%} equal, "
                f"right {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    write_json(args.output, {"environment": environment("cpu"), "prompts": len(prompts), "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
