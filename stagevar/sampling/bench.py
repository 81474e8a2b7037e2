"""Schedules side by side in one run: latency ratios, tokens, memory, and quality against the full schedule.

Every schedule makes the same images from the same prompts and seeds. They are timed in turn, so a drifting clock hits
all of them, and a ratio pairs the same prompt in the same round. A schedule with a decision takes its own path with each
batch, so its latency is a mixture over prompts: look at its mean and p90, at batch 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from stagevar.errors import UsageError
from stagevar.images import psnr_db, ssim
from stagevar.models.base import LoadedModel
from stagevar.models.registry import published
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import Steps, preset
from stagevar.statistics import mean_bounds, ratio_bounds
from stagevar.timing import Timing, measure_rounds, pinned

BASELINE = "exact"
IMAGES_AT_ONCE = 4  # of the quality columns; a prompt's image does not depend on its batch
#: score(images, prompts) -> (B,), higher is better; uint8 (B, H, W, 3)
Score = Callable[[np.ndarray, Sequence[str]], np.ndarray]


def compare(
    model: LoadedModel,
    names: Sequence[str],
    *,
    extra_steps: Mapping[str, Steps] | None = None,
    samplers: Mapping[str, Callable[[LoadedModel], Sampler]] | None = None,
    rounds: int = 10,
    batch: int = 1,
    prompts: int | Sequence[str] = 32,
    threads: int = 1,
    scores: Mapping[str, Score] | None = None,
    warm_up_at_most: int = 12,
    engine: str = "eager",
    engines: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One row per schedule, the full one first, as plain data.

    Args:
        names: presets.
        extra_steps: further schedules by name, already expanded.
        samplers: makes a sampler for rows that the default one does not run.
        rounds: timed passes; each times every schedule on the next `batch` prompts.
        prompts: how many of the model's own bench prompts, or the prompts themselves, for the quality columns.
        threads: pinned, on CPU.
        scores: further quality columns, as mean paired difference from the full schedule with a bootstrap interval over
            the prompts.
        warm_up_at_most: runs before timing; fewer if they agree earlier.
        engine: the engine that rows are timed on.
        engines: by name, for rows on another engine. Images, and with them memory, always come from eager: a run that
            is made once is not worth recording.

    Returns:
        Rows with the columns engine (the one that really ran), tokens (per image, both branches), latency_ms (median),
        mean_ms, p90_ms, samples_ms, disturbed (why the samples may be wrong, on a card), the ratio to the full schedule
        with its interval, memory_mib (CUDA: peak allocated above the weights; CPU: KV cache), outcomes (how often a
        decision went each way), and, unless the weights are random, psnr_db, ssim (means) and `scores`. On a CPU also
        cpu_ratio, the same ratio in processor time, which other processes on the machine hardly change.
    """
    sampler, samplers = Sampler(model), samplers or {}
    plans = {
        name: preset(name, model.grids, published(model.name)).expand(model.grids, sampler.chunks)
        for name in (BASELINE, *names)
    }
    plans.update(extra_steps or {})
    texts = bench_prompts(model, prompts) if isinstance(prompts, int) else list(prompts)
    if batch > len(texts):
        raise UsageError(f"batch {batch} is larger than the {len(texts)} prompts; give more prompts")
    batches = [(texts[i : i + batch], list(range(i, i + batch))) for i in range(0, len(texts) - batch + 1, batch)]
    for decision in filter(None, (step.decision for steps in plans.values() for step in steps)):
        sampler.accelerator.check(model, decision)  # refused before anything is measured
    with pinned(threads) if model.device.type == "cpu" else contextlib.nullcontext():
        made = {name: _observe(samplers.get(name, Sampler)(model), plans[name], texts, batch) for name in plans}
        timed = {name: _timed_sampler(model, samplers.get(name), (engines or {}).get(name, engine)) for name in plans}
        timings = time_in_turn(timed, plans, batches, rounds, warm_up_at_most)
    rows = []
    for name in plans:
        row = {"name": name, "engine": timed[name].engine.that_ran, **_timed_columns(timings[name], timings[BASELINE])}
        row |= {"tokens": round(made[name].tokens, 1), "memory_mib": made[name].memory_mib}
        if made[name].outcomes:
            row["outcomes"] = dict(sorted(made[name].outcomes.items()))
        if not model.random_weights:
            row |= _quality_columns(made[name].images, made[BASELINE].images, texts, scores or {})
        rows.append(row)
    return rows


def _timed_columns(timing: Timing, baseline: Timing) -> dict[str, object]:
    ratio, low, high = ratio_bounds(timing.samples_ms, baseline.samples_ms)
    columns: dict[str, object] = {
        "latency_ms": timing.median_ms,
        "mean_ms": float(np.mean(timing.samples_ms)),
        "p90_ms": timing.p90_ms,
        "ratio": ratio,
        "ratio_interval": [low, high],
        "samples_ms": list(timing.samples_ms),
        "warmed": timing.warmed,
    }
    if not timing.device_ms:
        columns["cpu_ratio"] = ratio_bounds(timing.processor_ms, baseline.processor_ms)[0]
    if timing.disturbed:
        columns["disturbed"] = list(timing.disturbed)
    return columns


def _quality_columns(
    images: np.ndarray, full: np.ndarray, texts: Sequence[str], scores: Mapping[str, Score]
) -> dict[str, object]:
    columns: dict[str, object] = {
        "psnr_db": float(psnr_db(images, full).mean()),
        "ssim": float(ssim(images, full).mean()),
    }
    for label, score in scores.items():
        difference_B = np.asarray(score(images, texts), float) - np.asarray(score(full, texts), float)
        columns[label], columns[f"{label}_interval"] = float(difference_B.mean()), list(mean_bounds(difference_B))
    return columns


def _timed_sampler(model: LoadedModel, make: Callable[[LoadedModel], Sampler] | None, engine: str) -> Sampler:
    return Sampler(model, engine=engine) if make is None else make(model)


@dataclasses.dataclass
class _Made:
    """What one schedule made: images of all batches, decisions, tokens per image, memory."""

    images: np.ndarray
    outcomes: Counter[str]
    tokens: float
    memory_mib: float


def _observe(sampler: Sampler, steps: Steps, texts: Sequence[str], batch: int) -> _Made:
    """Memory from one run of `batch` images; the images from larger runs, which draw the same."""
    device, chunks = sampler.model.device, sampler.chunks
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    generation = sampler.begin(texts[:batch], list(range(batch)), steps=steps)
    sampler.finish(generation, steps)
    used = torch.cuda.max_memory_allocated(device) - before if cuda else generation.cache.memory_bytes
    images, outcomes, tokens = [], Counter[str](), []
    for first in range(0, len(texts), max(batch, IMAGES_AT_ONCE)):
        part = texts[first : first + max(batch, IMAGES_AT_ONCE)]
        generation = sampler.begin(part, list(range(first, first + len(part))), steps=steps)
        images.append(sampler.finish(generation, steps))
        chosen = generation.outcomes or ()
        outcomes.update(chosen)
        tokens += [sum(s.processed_tokens(chunks) for s in way) for way in _ways(steps, chosen, len(part))]
    return _Made(np.concatenate(images), outcomes, float(np.mean(tokens)), used / 2**20)


def _ways(steps: Steps, outcomes: Sequence[str], batch: int) -> Iterator[Steps]:
    """The steps that each image really took."""
    decided = next((step for step in steps if step.decision is not None), None)
    if decided is None or decided.decision is None:
        yield from [steps] * batch
        return
    for outcome in outcomes:
        yield (*steps[: decided.scale + 1], *decided.decision.continuation(outcome))


def time_in_turn(
    samplers: Mapping[str, Sampler],
    plans: Mapping[str, Steps],
    batches: Sequence[tuple[list[str], list[int]]],
    rounds: int,
    warm_up_at_most: int,
) -> dict[str, Timing]:
    """Times every plan on the same (prompts, seeds) in turn, another batch in each round.

    Each has its own sampler, so that none pays for another's cache.
    """

    def draw(name: str, index: int) -> np.ndarray:
        prompts, seeds = batches[index % len(batches)]
        return samplers[name].generate(prompts, seeds, plans[name])

    device = next(iter(samplers.values())).model.device
    return measure_rounds({name: partial(draw, name) for name in plans}, rounds, device, warm_up_at_most)


def bench_prompts(model: LoadedModel, count: int) -> list[str]:
    """`count` prompts that this model understands: class indices for VAR, nano's held-out captions for the others."""
    if model.name.startswith("var"):
        return [str(37 * i % 1000) for i in range(count)]
    from stagevar.models.nano.scenes import prompts

    return [metadata["prompt"] for metadata in prompts("heldout", count)]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain text, one line per row, the columns that the rows have."""
    titles = {
        "name": ("schedule", "{}"),
        "engine": ("engine", "{}"),
        "tokens": ("tokens", "{:.0f}"),
        "latency_ms": ("median ms", "{:.1f}"),
        "mean_ms": ("mean ms", "{:.1f}"),
        "p90_ms": ("p90 ms", "{:.1f}"),
        "ratio": ("ratio", "{:.3f}"),
        "ratio_interval": ("95 % of ratio", "{0[0]:.3f}-{0[1]:.3f}"),
        "cpu_ratio": ("cpu ratio", "{:.3f}"),
        "memory_mib": ("MiB", "{:.1f}"),
    }
    titles = {key: column for key, column in titles.items() if any(key in row for row in rows)}
    hidden = {"samples_ms", "warmed", "outcomes", "disturbed"}
    further = {
        key: (key.replace("_", " "), "[{0[0]:.3f}, {0[1]:.3f}]" if key.endswith("_interval") else "{:.3f}")
        for row in rows
        for key in row
        if key not in hidden
    }
    columns = {**titles, **{key: value for key, value in further.items() if key not in titles}}
    table = [[title for title, _ in columns.values()]]
    for row in rows:
        table.append([form.format(row[key]) if key in row else "" for key, (_, form) in columns.items()])
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    for row in rows:
        if row.get("outcomes"):
            lines.append(f"{row['name']} decided: " + ", ".join(f"{k} {v}" for k, v in row["outcomes"].items()))
    unsettled = sum(not row["warmed"] for row in rows)
    if unsettled:
        lines.append(
            f"{unsettled} of {len(rows)} did not settle while warming up: the machine is busy, trust only the ratios"
        )
    disturbed = dict.fromkeys(why for row in rows for why in row.get("disturbed", ()))
    if disturbed:
        lines.append(f"the card was disturbed, even on a repeat ({', '.join(disturbed)}): trust only the ratios")
    return "\n".join(lines)
