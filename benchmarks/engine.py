"""Where the time of one image goes: per scale against the roofline, engines side by side, the decoder separately.

    python -m benchmarks.engine --model infinity-2b --weights random --engines eager,graph --output engine.json

Needs only `stagevar` (no optuna, ray, pandas or open_clip). Everything that is compared runs in turn in one interleaved
run, so ratios hold even on a noisy machine. FLOPs are counted by torch's FlopCounterMode while a scale runs; bytes are the
block weights, once per scale, and the cache that its attention reads. The roofline uses peaks measured here unless given.

A schedule is a preset, or preset+int8 or preset+fp8 for products in 8 bits from its structure_end on. Engines are those of
stagevar.engine, and "growing", the eager one over a cache that grows by concatenation.

`--reference FILE` times other code in the same rounds: a Python file, kept outside the repository, with
`build(model: str, pixels: tuple[int, int], device: str, dtype: str) -> Callable[[], None]`. Each call of what it returns draws
one image from precomputed text features, including decoding.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import environment, write_json
from benchmarks.growing_cache import GrowingSampler
from benchmarks.relaunch import RelaunchRecorder
from stagevar.device_faults import free_unused
from stagevar.engine import ENGINES, GraphEngine, build_engine, decoder_kernels, kernels
from stagevar.errors import StagevarError, UsageError
from stagevar.models.base import LoadedModel
from stagevar.models.memory import available_bytes, estimate_model
from stagevar.models.memory_plan import USABLE, timed_bytes
from stagevar.models.precision import is_quantizable
from stagevar.models.registry import SPECS, load_model, published
from stagevar.models.request import ModelRequest
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, ScaleStep, StageSchedule, Steps, preset
from stagevar.statistics import ratio_bounds
from stagevar.tensors import attention
from stagevar.timing import Run, Timing, measure, pinned, time_once
from tuner.evaluation.timed_groups import merged

PROMPT = "a photo of a red circle left of a blue star, on a wooden table in the evening light"
#: As much of it as nano knows.
NANO_PROMPT = "a photo of a red circle left of a blue star"


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


def block_bytes(transformer: nn.Module, eight_bit: bool) -> int:
    """Bytes of weights that a scale reads."""
    products = {f"{name}.weight" for name, module in transformer.named_modules() if is_quantizable(name, module)}
    return sum(
        p.numel() * (1 if eight_bit and name in products else p.element_size())
        for name, p in transformer.named_parameters()
        if name.startswith(("block_chunks.", "blocks."))
    )


def parse_schedule(text: str, model: LoadedModel) -> StageSchedule:
    """A preset's schedule, with a precision if one is appended. Raises ScheduleError for unknown names."""
    name, _, precision = text.partition("+")
    return dataclasses.replace(preset(name, model.grids, published(model.name)), precision=precision or "model")


def prompts_for(model: LoadedModel, batch: int) -> list[str]:
    return [NANO_PROMPT if model.name == "nano" else PROMPT] * batch


def sampler_on(model: LoadedModel, engine: str) -> Sampler:
    return GrowingSampler(model) if engine == "growing" else Sampler(model, engine=engine)


def let_go(sampler: Sampler) -> None:
    """Frees what a sampler holds before another one is created."""
    sampler.release()
    free_unused(sampler.model.device)


def cost(sampler: Sampler, step: ScaleStep, generation: Any) -> dict[str, Any]:
    """Runs the next scale: its FLOPs, bytes read, tokens, branches, and the cache's length after it."""
    with FlopCounterMode(display=False) as counter:
        # 8-bit products have the same FLOPs, but the counter does not know all of their kernels.
        sampler.advance(generation, dataclasses.replace(step, precision="model"))
    model, lengths = sampler.model, generation.cache.lengths
    transformer, batch = model.transformer, generation.batch
    entries = sum(sum(lengths[BOTH.index(branch)]) for branch in step.branches)
    entry = transformer.head_dim * model.dtype.itemsize
    if model.kv_cache == "int8":
        entry = transformer.head_dim + 4
    read = 2 * entries * batch * transformer.heads * entry + block_bytes(transformer, step.precision != "model")
    return {
        "scale": step.scale,
        "grid": list(step.grid),
        "tokens": step.processed_tokens(sampler.chunks) / max(len(step.branches), 1),
        "branches": len(step.branches),
        "cache_length": max(map(max, lengths)),
        "tflop": counter.get_total_flops() / 1e12,
        "gib": 0 if step.skipped else read / 2**30,
    }


@torch.inference_mode()
def per_scale(model: LoadedModel, engines: list[str], steps: Steps, rounds: int, batch: int) -> list[dict[str, Any]]:
    """One row per scale: its cost, and its median milliseconds per engine ("ms"). One sampler is alive at a time."""
    device = model.device
    prompts, seeds = prompts_for(model, batch), list(range(batch))
    plain = Sampler(model)
    generation = plain.begin(prompts, seeds, steps=steps)
    rows = [cost(plain, step, generation) for step in steps]
    plain.release()
    samples: dict[str, list[list[float]]] = {name: [[] for _ in steps] for name in engines}
    for name in engines:
        sampler = sampler_on(model, name)
        for round_ in range(-2, rounds):
            generation = sampler.begin(prompts, seeds, steps=steps)
            for index, step in enumerate(steps):
                elapsed_ms = time_once(lambda s=step, g=generation, of=sampler: of.advance(g, s), device)[0]
                if round_ >= 0:
                    samples[name][index].append(elapsed_ms)
        let_go(sampler)
    for index, row in enumerate(rows):
        row["ms"] = {name: float(np.median(times[index])) for name, times in samples.items()}
    return rows


def add_roofline(rows: list[dict[str, Any]], flops_per_s: float, bytes_per_s: float) -> None:
    """Adds each row's shortest possible time, and what share of each engine's time that is."""
    for row in rows:
        row["floor_ms"] = 1e3 * max(row["tflop"] * 1e12 / flops_per_s, row["gib"] * 2**30 / bytes_per_s)
        row["of_roofline"] = {name: row["floor_ms"] / ms if row["tflop"] else None for name, ms in row["ms"].items()}


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    engines = list(rows[0]["ms"])
    print(f"\n{title}")
    columns = "".join(f"{f'{name} ms':>18} {'roof':>5}" for name in engines)
    print(
        f"{'scale':>5} {'grid':>9} {'tokens':>8} {'br':>3} {'cache':>6} {'TFLOP':>8} {'GiB':>7} {'floor':>8}{columns}"
    )
    for row in rows:
        shares = {name: "-" if share is None else f"{share:.0%}" for name, share in row["of_roofline"].items()}
        columns = "".join(f"{row['ms'][name]:>18.2f} {shares[name]:>5}" for name in engines)
        grid = "x".join(map(str, row["grid"]))
        print(
            f"{row['scale']:>5} {grid:>9} {row['tokens']:>8.0f} {row['branches']:>3} {row['cache_length']:>6} "
            f"{row['tflop']:>8.3g} {row['gib']:>7.3f} {row['floor_ms']:>8.2f}{columns}"
        )
    floor = sum(row["floor_ms"] for row in rows)
    totals = {name: sum(row["ms"][name] for row in rows) for name in engines}
    sums = ", ".join(f"{name} {total:.1f} ms (floor is {floor / total:.0%})" for name, total in totals.items())
    print(f"  sum: floor {floor:.1f} ms, {sums}")


def decoders(model: LoadedModel, code_sum_BdHW: Tensor) -> dict[str, Run]:
    """The decoder as loaded and, for Infinity's tokenizer, in other precisions and memory layouts."""
    runs: dict[str, Run] = {"decoder": lambda: model.tokenizer.decode(code_sum_BdHW)}
    if hasattr(model.tokenizer, "decoding_as"):
        others = [torch.float32] if model.dtype == torch.float32 else [model.dtype, torch.float32]
        for dtype in others:
            for channels_last in (True, False):
                layout = "channels-last" if channels_last else "contiguous"
                variant = model.tokenizer.decoding_as(dtype, channels_last)
                name = f"decoder {str(dtype).removeprefix('torch.')} {layout}"
                runs[name] = lambda variant=variant: variant.decode(code_sum_BdHW)
    if (
        code_sum_BdHW.device.type == "cuda"
        and kernels.available() is None
        and hasattr(model.tokenizer, "decoding_with")
    ):
        with_kernels = model.tokenizer.decoding_with(decoder_kernels.swished_norm())
        runs["decoder graph-kernels"] = lambda: with_kernels.decode(code_sum_BdHW)
    return {name: torch.inference_mode()(run) for name, run in runs.items()}


def reference_run(path: Path, model: LoadedModel) -> Run:
    """The function that draws an image, from a file outside the repository. Raises UsageError if it has no `build`."""
    if not path.is_file():
        raise UsageError(f"--reference {path} is not a file")
    found = runpy.run_path(str(path))
    if not callable(found.get("build")):
        raise UsageError(f"--reference {path} defines no build(model, pixels, device, dtype)")
    return found["build"](model.name, model.pixels, str(model.device), str(model.dtype).removeprefix("torch."))


@torch.inference_mode()
def check(model: LoadedModel, expanded: Mapping[str, Steps], engines: list[str]) -> dict[str, bool]:
    """Whether graphs equal the same kernels launched one by one: code sums and pixels, three batches."""
    found = {}
    for engine in (name for name in engines if name.startswith("graph")):
        replayed = Sampler(model, engine=engine)
        launched = Sampler(model, engine=build_engine(engine, model.device, RelaunchRecorder()))
        for name, steps in expanded.items():
            equal = True
            for prompts, seeds in ((["a red circle"], [1]), (prompts_for(model, 1), [2]), (["a red circle"], [3])):
                sums, images = [], []
                for sampler in (replayed, launched):
                    generation = sampler.begin(prompts, seeds)
                    images.append(sampler.finish(generation, steps))
                    sums.append(generation.code_sum_BdHW.clone())
                equal &= torch.equal(*sums) and np.array_equal(*images)
            found[f"{name} {engine}"] = equal
            print(f"  {name} on {engine}: {'equal' if equal else 'NOT EQUAL'} to the same kernels launched one by one")
        if replayed.engine.fallback_reason:  # type: ignore[attr-defined]
            found[f"recorded {engine}"] = False
            print(f"  {engine} fell back to eager: {replayed.engine.fallback_reason}")  # type: ignore[attr-defined]
        replayed.release()
        launched.release()
    return found


def end_to_end(timings: Mapping[str, Timing], images: Mapping[str, int]) -> dict[str, Any]:
    """Prints and returns medians, ratios to the first row, and images per second for runs that draw images."""
    baseline, found = next(iter(timings.values())), {}
    for name, timing in timings.items():
        ratio, low, high = ratio_bounds(baseline.samples_ms, timing.samples_ms)
        found[name] = {
            "median_ms": timing.median_ms,
            "p90_ms": timing.p90_ms,
            "samples_ms": list(timing.samples_ms),
            "device_ms": list(timing.device_ms),
            "speed_up": [ratio, low, high],
            "images_per_s": 1e3 * images[name] / timing.median_ms if name in images else None,
            "warmed": timing.warmed,
            "card": [state.to_dict() for state in timing.card],
            "disturbed": list(timing.disturbed),
        }
        rate = f"{found[name]['images_per_s']:>9.2f} images/s" if name in images else ""
        print(
            f"  {name:<36} {timing.median_ms:>9.1f} ms  p90 {timing.p90_ms:>9.1f} {ratio:6.2f}x [{low:.2f}, {high:.2f}]"
            f"{rate}"
        )
    return found


def report_memory(
    args: argparse.Namespace, model: LoadedModel, schedules: Mapping[str, StageSchedule]
) -> dict[str, Any]:
    """Prints and returns, per schedule, its cache, the estimate and (CUDA) the peak of its first engine, measured alone."""
    found: dict[str, Any] = {}
    batch = args.batches[0]
    prompts, seeds = prompts_for(model, batch), list(range(batch))
    for name, schedule in schedules.items():
        sampler = sampler_on(model, args.engines[0])
        steps = schedule.expand(model.grids, sampler.chunks)
        generation = sampler.begin(prompts, seeds, steps=steps)
        row: dict[str, float] = {"cache_gib": generation.cache.memory_bytes / 2**30}
        del generation
        let_go(sampler)
        if SPECS[args.model].parts:
            request = ModelRequest(
                args.model,
                weights=args.weights,
                resolution=args.resolution,
                device=model.device,
                dtype=model.dtype,
                batch=batch,
                kv_cache=model.kv_cache,
                schedule=schedule,
            )
            needed = estimate_model(request)
            row["reckoned_gib"] = needed.sampling / 2**30
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
            sampler.generate(prompts, seeds, steps)
            row["peak_gib"] = torch.cuda.max_memory_allocated(model.device) / 2**30
            let_go(sampler)
        print(f"  {name:<36} " + ", ".join(f"{key.removesuffix('_gib')} {value:.2f} GiB" for key, value in row.items()))
        found[name] = row
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain data."""
    model = load_model(
        args.model, weights=args.weights, device=args.device, resolution=args.resolution, kv_cache=args.kv_cache
    )
    device = model.device
    if device.type == "cuda":  # a pinned launching thread would share its processor with the driver's
        return _measured(args, model)
    with pinned(args.threads):
        return _measured(args, model)


def _measured(args: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    device = model.device
    attention.prefer_attention(args.attention)
    for name in args.engines:
        if name != "growing":
            build_engine(name, device)
    chunks = len(model.transformer.chunk_layers)
    schedules = {text: parse_schedule(text, model) for text in args.schedules}
    expanded = {text: schedule.expand(model.grids, chunks) for text, schedule in schedules.items()}
    figures: dict[str, Any] = {"environment": environment(device), "model": model.name, "pixels": list(model.pixels)}
    figures["options"] = {"kv_cache": model.kv_cache, "attention": args.attention, "dtype": str(model.dtype)}
    if args.check:
        figures["check"] = check(model, expanded, args.engines)
    measured = peaks(device, model.dtype)
    flops_per_s = args.peak_tflops * 1e12 if args.peak_tflops else measured[0]
    bytes_per_s = args.peak_gbs * 1e9 if args.peak_gbs else measured[1]
    figures["peaks"] = {"tflops": flops_per_s / 1e12, "gbs": bytes_per_s / 1e9, "measured": [m / 1e9 for m in measured]}
    print(f"{model.name} {model.pixels} on {figures['environment']['device']}: {flops_per_s / 1e12:.2f} TFLOP/s, "
          f"{bytes_per_s / 1e9:.0f} GB/s")  # fmt: skip

    figures["per_scale"] = {}
    for name, steps in expanded.items():
        rows = per_scale(model, args.engines, steps, args.rounds, args.batches[0])
        add_roofline(rows, flops_per_s, bytes_per_s)
        print_rows(f"{name}, batch {args.batches[0]}", rows)
        figures["per_scale"][name] = rows
        save(args, figures)

    figures["end_to_end"], images = _end_to_end(args, model, expanded, figures)
    decoder_ms = figures["end_to_end"]["decoder"]["median_ms"]
    for key in (key for key in images if images[key] == args.batches[0] and key != "reference"):
        share = decoder_ms / figures["end_to_end"][key]["median_ms"]
        figures["end_to_end"][key]["decoder_share"] = share
        print(f"  {key:<36} {share:.0%} of it is decoding")
    print("\nmemory, text encoder unloaded")
    save(args, figures)
    figures["memory"] = report_memory(args, model, schedules)
    return {**figures, "complete": True}


def save(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes what there is so far, so that it survives if time runs out."""
    write_json(args.output, {**figures, "complete": False})


def _end_to_end(
    args: argparse.Namespace, model: LoadedModel, expanded: Mapping[str, Steps], figures: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Times whole images, each schedule and engine in turn with the first one, so that two samplers are alive at a time.

    Samples are scaled by the first one's time beside each (tuner.evaluation.timed_groups). If the memory plan has no room for
    two, one is alive at a time and the row says "alone": its ratio is not paired. Returns the table and images per run.
    """
    device = model.device
    wanted = [(batch, name, engine) for batch in args.batches for name in expanded for engine in args.engines]
    images = {_key(args, *one): one[0] for one in wanted}
    first = next(iter(images))

    def made(batch: int, name: str, engine: str) -> tuple[Sampler, Run]:
        # Text features are computed beforehand: the figures cover the transformer and the decoder.
        prompts, seeds, sampler = prompts_for(model, batch), list(range(batch)), sampler_on(model, engine)
        encoded, steps = model.text.encode(prompts), expanded[name]
        return sampler, lambda: sampler.generate(prompts, seeds, steps, encoded=encoded)

    def note_recording(key: str, sampler: Sampler, run: Run) -> None:
        if not isinstance(sampler.engine, GraphEngine):
            return
        row = {
            "first_image_s": time_once(run, device)[0] / 1e3,
            "recording_s": sampler.engine.recording_s,
            "mib": sampler.engine.recorder.memory_bytes() / 2**20,
            "eager_because": sampler.engine.fallback_reason,
        }
        figures.setdefault("recording", {})[key] = row
        eager = f", EAGER: {row['eager_because']}" if row["eager_because"] else ""
        print(f"  {key}: recorded in {row['recording_s']:.2f} s, pools of {row['mib']:.0f} MiB{eager}")

    baseline, baseline_run = made(*wanted[0])
    note_recording(first, baseline, baseline_run)
    others: dict[str, Run] = decoders(model, model.tokenizer.residual.zeros(args.batches[0], device))
    if args.reference is not None:
        others = {"reference": reference_run(args.reference, model), **others}
        images["reference"] = 1
    timed = [measure({first: baseline_run, **others}, args.rounds, device)]
    let_go(baseline)
    alone: dict[str, Timing] = {}
    for one in wanted[1:]:
        key = _key(args, *one)
        together = fits_beside(model, expanded, wanted[0], one)
        sampler, run = made(*one)
        note_recording(key, sampler, run)
        if together:
            timed.append(measure({first: baseline_run, key: run}, args.rounds, device))
            baseline.release()
        else:
            print(f"  {key}: timed alone, no room for {first} beside it")
            alone |= measure({key: run}, args.rounds, device)
        let_go(sampler)
    let_go(baseline)
    found = merged(timed, first) | alone
    figures["alone"] = sorted(alone)
    order = [*images, *(key for key in found if key not in images)]
    print(f"\nend to end, {args.rounds} interleaved rounds, ratio to {first}")
    return end_to_end({key: found[key] for key in order}, images), images


def fits_beside(model: LoadedModel, expanded: Mapping[str, Steps], *runs: tuple[int, str, str]) -> bool:
    """Whether the memory plan has room for the samplers of two runs, each (batch, schedule, engine), at once."""
    free = available_bytes(model.device)
    if free is None:
        return True
    kept, working = 0, 0
    for batch, name, engine in runs:
        needed = timed_bytes(
            model.transformer,
            model.tokenizer,
            {name: expanded[name]},
            model.pixels,
            model.dtype.itemsize,
            model.kv_cache,
            engine,
            batch,
        )
        kept, working = kept + needed.kept[name], max(working, needed.working)
    return kept + working <= USABLE * free


def _key(args: argparse.Namespace, batch: int, schedule: str, engine: str) -> str:
    return f"{schedule} {engine}" + (f" batch {batch}" if len(args.batches) > 1 else "")


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--weights", help="'random' for real sizes without weights")
    parser.add_argument("--resolution")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kv-cache", default="model", help="model or int8")
    parser.add_argument(
        "--attention", default="flash", help="kernel tried first on a card: flash, cudnn, efficient, math"
    )
    parser.add_argument("--schedules", type=comma_list, default="exact,stagevar-paper", help="presets, or preset+int8")
    parser.add_argument("--engines", type=comma_list, default="eager", help=f"{', '.join(ENGINES)}, growing")
    parser.add_argument(
        "--batches", type=comma_list, default="1", help="images per run; the first one is broken down by scale"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, pinned")
    parser.add_argument("--peak-tflops", type=float, help="instead of the measured peak")
    parser.add_argument("--peak-gbs", type=float, help="instead of the measured bandwidth")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="time other code in the same rounds, see above")
    parser.add_argument(
        "--check", action="store_true", help="first compare graphs with the same kernels launched eagerly"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/engine.json"))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if not all(part.isdigit() and int(part) for part in args.batches):
            raise UsageError(f"batches {','.join(args.batches)} must be whole numbers of at least 1")
        args.batches = [int(part) for part in args.batches]
        figures = run(args)
    except StagevarError as error:
        print(f"benchmarks.engine: {error}", file=sys.stderr)
        return error.exit_code
    write_json(args.output, figures)
    return 0 if all(figures.get("check", {}).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
