"""Where the time of one image goes: per scale against the roofline, eager against graph, the decoder apart.

    python -m benchmarks.engine --model infinity-2b --weights random --schedules exact,stagevar-paper --output engine.json

Needs `stagevar` only (no optuna, ray, pandas or open_clip). End-to-end figures come from one interleaved run, so their
ratios hold on a noisy machine. FLOPs are counted by torch's FlopCounterMode while a scale runs; bytes are the block
weights, once per scale, and the cache that its attention reads. The roofline uses the peaks measured here unless given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import environment, write_json
from stagevar.errors import StagevarError, UsageError
from stagevar.latency import measure, paired_ratio, pinned, time_once
from stagevar.models.registry import load_model
from stagevar.sampler import Sampler
from stagevar.schedule import BOTH, Steps, preset

PROMPT = "a photo of a red circle left of a blue star, on a wooden table in the evening light"


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured matrix FLOP/s and copy bytes/s (read plus written) of the device, best of five."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(run: Any) -> float:
        run()
        return min(time_once(run, device)[0] for _ in range(5)) / 1e3

    return 2 * side**3 / best(lambda: torch.mm(a, b)), 2 * source.numel() / best(lambda: target.copy_(source))


def block_bytes(sampler: Sampler) -> int:
    """Bytes of the weights that every scale reads."""
    named = sampler.model.transformer.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in named if name.startswith(("block_chunks.", "blocks.")))


@torch.inference_mode()
def per_scale(sampler: Sampler, steps: Steps, rounds: int, batch: int) -> list[dict[str, Any]]:
    """One row per scale: median milliseconds of its own, FLOPs, bytes read, tokens, branches, cache length after it."""
    device = sampler.model.device
    prompts, seeds = [PROMPT] * batch, list(range(batch))
    samples: list[list[float]] = [[] for _ in steps]
    counted: list[tuple[int, int, int]] = []
    weights = block_bytes(sampler)
    for round_ in range(-1, rounds):
        generation = sampler.begin(prompts, seeds, steps=steps)
        for index, step in enumerate(steps):
            if round_ == -1:
                with FlopCounterMode(display=False) as counter:
                    sampler.advance(generation, step)
                lengths = generation.cache.lengths
                entries = sum(sum(lengths[BOTH.index(branch)]) for branch in step.branches)
                transformer = sampler.model.transformer
                size = torch.empty((), dtype=sampler.model.dtype).element_size()
                cache = 2 * entries * batch * transformer.heads * transformer.head_dim * size
                counted.append(
                    (counter.get_total_flops(), 0 if step.skipped else weights + cache, max(map(max, lengths)))
                )
            else:
                samples[index].append(time_once(lambda s=step, g=generation: sampler.advance(g, s), device)[0])
    return [
        {
            "scale": step.scale,
            "grid": list(step.grid),
            "tokens": step.processed_tokens(sampler.chunks) / max(len(step.branches), 1),
            "branches": len(step.branches),
            "cache_length": length,
            "ms": float(np.median(times)),
            "tflop": flops / 1e12,
            "gib": size / 2**30,
        }
        for step, times, (flops, size, length) in zip(steps, samples, counted, strict=True)
    ]


def add_roofline(rows: list[dict[str, Any]], flops_per_s: float, bytes_per_s: float) -> None:
    """Adds the shortest possible time of each row and the share of its time that this is."""
    for row in rows:
        row["floor_ms"] = 1e3 * max(row["tflop"] * 1e12 / flops_per_s, row["gib"] * 2**30 / bytes_per_s)
        row["of_roofline"] = row["floor_ms"] / row["ms"] if row["ms"] and row["tflop"] else None


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(
        f"{'scale':>5} {'grid':>9} {'tokens':>8} {'br':>3} {'cache':>6} {'ms':>9} {'TFLOP':>8} {'GiB':>7} {'of roof':>8}"
    )
    for row in rows:
        share = "-" if row["of_roofline"] is None else f"{row['of_roofline']:.0%}"
        grid = "x".join(map(str, row["grid"]))
        print(
            f"{row['scale']:>5} {grid:>9} {row['tokens']:>8.0f} {row['branches']:>3} {row['cache_length']:>6} "
            f"{row['ms']:>9.2f} {row['tflop']:>8.3f} {row['gib']:>7.3f} {share:>8}"
        )
    total, floor = sum(r["ms"] for r in rows), sum(r["floor_ms"] for r in rows)
    print(f"  sum {total:.1f} ms, floor {floor:.1f} ms ({floor / total:.0%} of the time)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain data."""
    model = load_model(args.model, weights=args.weights, device=args.device, resolution=args.resolution)
    device = model.device
    engines = [name.strip() for name in args.engines.split(",")]
    samplers = {name: Sampler(model, engine=name) for name in engines}
    expanded = {
        name.strip(): preset(name.strip(), model.grids).expand(model.grids, samplers[engines[0]].chunks)
        for name in args.schedules.split(",")
    }
    figures: dict[str, Any] = {"environment": environment(device), "model": model.name, "pixels": list(model.pixels)}
    measured = peaks(device, model.dtype)
    flops_per_s = args.peak_tflops * 1e12 if args.peak_tflops else measured[0]
    bytes_per_s = args.peak_gbs * 1e9 if args.peak_gbs else measured[1]
    figures["peaks"] = {"tflops": flops_per_s / 1e12, "gbs": bytes_per_s / 1e9, "measured": [m / 1e9 for m in measured]}
    print(f"{model.name} {model.pixels} on {figures['environment']['device']}: {flops_per_s / 1e12:.2f} TFLOP/s, "
          f"{bytes_per_s / 1e9:.0f} GB/s")  # fmt: skip

    figures["per_scale"] = {}
    for name, steps in expanded.items():
        rows = per_scale(Sampler(model), steps, args.rounds, args.batch)
        add_roofline(rows, flops_per_s, bytes_per_s)
        print_rows(f"{name}, eager, batch {args.batch}", rows)
        figures["per_scale"][name] = rows

    # Text features are made beforehand: the figures are of the transformer and the decoder.
    encoded = model.text.encode([PROMPT] * args.batch)
    prompts, seeds = [PROMPT] * args.batch, list(range(args.batch))

    def image(sampler: Sampler, steps: Steps) -> Any:
        return lambda: sampler.generate(prompts, seeds, steps, encoded=encoded)

    runs = {f"{s} {e}": image(samplers[e], steps) for s, steps in expanded.items() for e in engines}
    code_sum = model.tokenizer.residual.zeros(args.batch, device)
    runs["decoder eager"] = torch.inference_mode()(lambda: model.tokenizer.decode(code_sum))
    figures["recording"] = {}
    for name, sampler in samplers.items():
        if name == "graph":
            for schedule, steps in expanded.items():
                seconds = time_once(image(sampler, steps), device)[0] / 1e3
                engine: Any = sampler.engine
                figures["recording"][schedule] = {"s": seconds, "mib": engine.recorder.memory_bytes() / 2**20}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timings = measure(runs, args.rounds, device)
    baseline = timings[next(iter(runs))]
    figures["end_to_end"] = {}
    print(f"\nend to end, batch {args.batch}, {args.rounds} interleaved rounds, ratio to {next(iter(runs))}")
    for name, timing in timings.items():
        ratio, low, high = paired_ratio(baseline, timing)
        figures["end_to_end"][name] = {
            "median_ms": timing.median_ms,
            "p90_ms": timing.p90_ms,
            "samples_ms": list(timing.samples_ms),
            "device_ms": list(timing.device_ms),
            "speed_up": [ratio, low, high],
            "images_per_s": 1e3 * args.batch / timing.median_ms,
            "warmed": timing.warmed,
        }
        print(
            f"  {name:<28} {timing.median_ms:>9.1f} ms  p90 {timing.p90_ms:>9.1f}  {ratio:5.2f}x [{low:.2f}, {high:.2f}]"
        )
    if device.type == "cuda":
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"  peak memory {figures['peak_memory_gib']:.1f} GiB")
    return figures


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--weights", help="'random' for real sizes without weights")
    parser.add_argument("--resolution")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--schedules", default="exact,stagevar-paper", help="comma list of presets")
    parser.add_argument("--engines", default="eager", help="comma list: eager, graph")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, pinned")
    parser.add_argument("--peak-tflops", type=float, help="instead of the measured peak")
    parser.add_argument("--peak-gbs", type=float, help="instead of the measured bandwidth")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/engine.json"))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.rounds < 1 or args.batch < 1:
            raise UsageError(f"rounds {args.rounds} and batch {args.batch} must be at least 1")
        with pinned(args.threads):
            figures = run(args)
    except StagevarError as error:
        print(f"benchmarks.engine: {error}", file=sys.stderr)
        return error.exit_code
    write_json(args.output, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
