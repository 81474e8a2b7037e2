"""Finds a model's stages: what each scale still changes, what guidance still decides, how many tokens carry the features.

For every scale the partial image is decoded and compared with the final one; the same scale is run once with each branch
alone (rewinding makes that a fork, not a second generation) to see what dropping guidance would change; and the features
that enter each chunk of blocks are decomposed into singular values. From these a schedule is proposed by a stated rule,
and the proposal is checked by ablation: the same acceleration started at every scale, against the full schedule.

Source: StageVAR (arXiv 2512.16483) for the idea of the three curves and for rank by kept energy. The plateau rule with
confidence over prompts, the image effect of dropping a branch and the ablation are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.accelerators.base import Accelerator, Cached, ScaleContext
from stagevar.accelerators.composite import Composite
from stagevar.analysis.ablation import Quality, ablation_rows, ablation_verdict
from stagevar.analysis.bands import band_changes, low_error
from stagevar.analysis.result import Analysis, Curve
from stagevar.analysis.rules import (
    Rules,
    begun_at,
    missing_upper,
    propose_ranks,
    propose_stages,
    side_key,
    with_ranks,
)
from stagevar.analysis.similarity import Similarity
from stagevar.errors import UsageError
from stagevar.images import psnr_db, ssim
from stagevar.models.base import Around, LoadedModel, Site, SiteFn
from stagevar.prompts.seeds import non_negative
from stagevar.sampling.generation import Generation
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, PROJECTIONS, Branch, ScaleStep, StageSchedule, Steps, exact
from stagevar.schedule.ranks import RankTable

#: kept energies of the rank table: the published ones, so that `energy` schedules work with either table
ENERGIES = ("0.999", "0.99", "0.98", "0.97", "0.96", "0.95", "0.92", "0.91", "0.90", "0.85", "0.80", "0.70")
#: of these, what the rank rule tries, with every projection
TRIED_ENERGIES = ("0.999", "0.99", "0.98", "0.96", "0.92", "0.85", "0.70")


def nano_inputs(count: int, seed: int = 0) -> tuple[list[str], list[int], dict[str, Quality]]:
    """Prompts and seeds from nano's search split, and the pixel checker as the quality of the ablation."""
    from stagevar.models.nano.checker import check_batch
    from stagevar.models.nano.scenes import prompts as draw_prompts

    items = draw_prompts("search", count, non_negative(seed))
    metadata = {item["prompt"]: item for item in items}

    def checker(images_BHW3: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        images_B3HW = images_BHW3.transpose(0, 3, 1, 2).astype(np.float32) / 255
        return np.asarray(check_batch(images_B3HW, [metadata[prompt] for prompt in prompts]), dtype=np.float64)

    return [item["prompt"] for item in items], list(range(seed, seed + count)), {"checker": checker}


def analyze(
    model: LoadedModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    similarities: Sequence[Similarity] = (),
    quality: Mapping[str, Quality] | None = None,
    rules: Rules | None = None,
    micro_batch: int = 16,
    rank_prompts: int = 16,
    ablation_prompts: int | None = None,
    shown: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> Analysis:
    """Measures every scale on these prompts, proposes a schedule and checks the proposal by ablation.

    Args:
        model: from `registry.load_model`.
        prompts, seeds: one per image; at least 2.
        similarities: image comparisons in addition to the built-in ones.
        quality: name -> score(images, prompts) -> (B,), higher is better; the ablation compares it (e.g. a CLIP score).
        rules: see Rules.
        micro_batch: images at a time.
        rank_prompts: how many prompts' features are decomposed; the rank rule is tried on as many.
        ablation_prompts: how many prompts the ablation runs on (None: all, 0: no ablation).
        shown: prompts whose partial images are kept for the picture.
        progress: called with (what, done, total).

    Raises:
        UsageError: if there are too few prompts, or they do not match the seeds.
    """
    rules = rules or Rules()
    passes = _Passes(prompts, seeds, micro_batch, rank_prompts, ablation_prompts, progress)
    observer = _Observer()
    probe = _Probe(model, observer)
    rows: dict[str, list[np.ndarray]] = {}
    partials: list[np.ndarray] = []
    for batch in passes.over("scales"):
        observer.watched = max(0, rank_prompts - batch.start)
        images_KBHW3 = _measure(probe, prompts[batch], seeds[batch], similarities, rows)
        partials.append(images_KBHW3[:, : max(0, shown - batch.start)].swapaxes(0, 1))
    measured = {name: np.concatenate(found) for name, found in rows.items()}

    stage_of = _stages_read(similarities)
    missing = {n: missing_upper(1 - measured[n], measured[n], rules) for n in stage_of if n != "psnr_db"}
    table, spectrum = observer.table(model)
    proposal, reasons = propose_stages(model, rules, measured, missing, stage_of)
    trials: dict[tuple[str, str], list[np.ndarray]] = {}
    for batch in passes.over("ranks"):
        _try_ranks(probe, prompts[batch], seeds[batch], proposal, table, trials)
    proposal, reasons["ranks"] = propose_ranks(model, rules, measured["ssim"], trials, proposal, table)
    scores: dict[str, list[np.ndarray]] = {}
    for batch in passes.over("ablation"):
        _ablate(probe, prompts[batch], seeds[batch], proposal, similarities, quality or {}, scores)
    ablation: list[dict[str, Any]] = []
    if scores:
        ablation = ablation_rows({k: np.concatenate(v) for k, v in scores.items()}, model, proposal, rules)
        reasons["ablation"] = ablation_verdict(ablation, model, proposal, quality or {}, rules)

    curves = {name: Curve.of(values, rules.confidence) for name, values in measured.items()}
    return Analysis(
        model=model.name,
        weights="random" if model.random_weights else "trained",
        grids=tuple(model.grids),
        chunks=probe.chunks,
        prompts=tuple(prompts),
        seeds=tuple(int(s) for s in seeds),
        rules=rules,
        similarity={name: curves[name] for name in stage_of},
        missing=missing,
        stage_of=stage_of,
        frequency={band: curves[f"{band}_change"] for band in ("low", "high")},
        guidance={b: {m: curves[f"{m}:{b}"] for m in ("divergence", "flips", "image")} for b in BOTH},
        rank_ratio=table,
        spectrum=spectrum,
        proposal=proposal,
        reasons=reasons,
        ablation=ablation,
        partials=np.concatenate(partials) if shown else None,
    )


def _stages_read(similarities: Sequence[Similarity]) -> dict[str, str]:
    """The stage that each similarity decides; the low frequencies stand in if no similarity reads the meaning."""
    reads_meaning = any(similarity.stage == "semantic" for similarity in similarities)
    own = {"low_frequency": "none" if reads_meaning else "semantic", "ssim": "structure", "psnr_db": "none"}
    return own | {similarity.name: similarity.stage for similarity in similarities}


class _Passes:
    """Three passes over the prompts, batch by batch, and how far they are. Raises UsageError for too few prompts."""

    def __init__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        micro_batch: int,
        rank_prompts: int,
        ablation_prompts: int | None,
        progress: Callable[[str, int, int], None] | None,
    ):
        if len(prompts) < 2 or len(prompts) != len(seeds):
            raise UsageError(
                f"analysis needs at least 2 prompts with a seed each, not {len(prompts)} prompts and {len(seeds)} seeds"
            )
        ablated = len(prompts) if ablation_prompts is None else ablation_prompts
        batches = [slice(start, start + micro_batch) for start in range(0, len(prompts), micro_batch)]
        self._batches = {
            "scales": batches,
            "ranks": [batch for batch in batches if batch.start < rank_prompts],
            "ablation": [batch for batch in batches if batch.start < ablated],
        }
        self._done, self._progress = 0, progress

    def over(self, what: str) -> Iterator[slice]:
        """The batches of a pass; progress is told once each has been worked on."""
        for batch in self._batches[what]:
            yield batch
            self._done += 1
            if self._progress:
                self._progress(what, self._done, sum(map(len, self._batches.values())))


# ---------------------------------------------------------------- probing a generation


class _Observer(Accelerator):
    """Leaves the work to the methods that the steps name, and decomposes what enters each chunk while it watches."""

    name = "observer"

    def __init__(self) -> None:
        self.inner = Composite()
        self.watched = 0  # prompts of the batch whose features are decomposed
        self.on = False
        self.energies: dict[tuple[int, int], list[np.ndarray]] = {}

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        inner = self.inner.around(context, updates)
        if not self.on or not self.watched:
            return inner

        def around(site: Site, x: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
            if site.kind == "chunk":
                self._record(context.step.scale, site.index, x, len(context.step.branches))
            return inner(site, x, positions, run)

        return around

    def _record(self, scale: int, chunk: int, x_RMC: Tensor, branches: int) -> None:
        """Keeps the squared singular values of the features, largest first, as shares of their sum: (rows, M)."""
        batch = x_RMC.shape[0] // branches
        rows = [b * batch + i for b in range(branches) for i in range(min(self.watched, batch))]
        for row in rows:  # one by one: at 4,096 tokens a batch of these would not fit next to the model
            x_MC = x_RMC[row].double()
            gram = x_MC @ x_MC.T if x_MC.shape[0] <= x_MC.shape[1] else x_MC.T @ x_MC
            energy = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).cpu().numpy()
            share_M = np.zeros(x_MC.shape[0])
            share_M[: len(energy)] = energy[: len(share_M)] / max(energy.sum(), 1e-300)
            self.energies.setdefault((scale, chunk), []).append(share_M)

    def table(self, model: LoadedModel) -> tuple[dict[str, dict[str, list[float]]], np.ndarray]:
        """Kept share of tokens per energy, side and chunk (mean over prompts and branches), and the mean spectra (K, C, 33)."""
        scales, chunks = len(model.grids), len(model.transformer.chunk_layers)
        table: dict[str, dict[str, list[float]]] = {energy: {} for energy in ENERGIES}
        spectrum_KCP = np.ones((scales, chunks, 33))
        if not self.energies:
            return {}, spectrum_KCP
        for scale, grid in enumerate(model.grids):
            cumulative = [np.cumsum(np.stack(self.energies[scale, c]), axis=1) for c in range(chunks)]
            for energy in ENERGIES:
                needed = [1 + (rows < float(energy) - 1e-12).sum(axis=1) for rows in cumulative]
                tokens = grid[0] * grid[1]
                table[energy][side_key(grid)] = [round(float(np.minimum(n, tokens).mean() / tokens), 6) for n in needed]
            for chunk, rows in enumerate(cumulative):
                at = np.linspace(0, 1, 33)
                own = np.concatenate([[0.0], rows.mean(axis=0)])
                spectrum_KCP[scale, chunk] = np.interp(at, np.linspace(0, 1, len(own)), own)
        return table, spectrum_KCP


class _Probe(Sampler):
    """A sampler that keeps what the last scale decided."""

    def __init__(self, model: LoadedModel, observer: _Observer):
        super().__init__(model, observer)
        self.observer = observer
        self.logits: Tensor | None = None
        self.tokens: Tensor | None = None

    def on_scale(self, step: ScaleStep, logits_BLV: Tensor, tokens: Tensor) -> None:
        # Vectors never come out equal; they count as drawn differently if another code is nearest.
        nearest = getattr(self.model.tokenizer.residual, "nearest", None)
        self.logits, self.tokens = logits_BLV, tokens if nearest is None else nearest(tokens)

    def try_step(self, generation: Generation, step: ScaleStep) -> tuple[Tensor, Tensor, np.ndarray]:
        """Logits, tokens and partial image of one step; the generation moves on."""
        self.advance(generation, step)
        assert self.logits is not None and self.tokens is not None
        return self.logits, self.tokens, self.decode(generation)


def _measure(
    probe: _Probe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    similarities: Sequence[Similarity],
    rows: dict[str, list[np.ndarray]],
) -> np.ndarray:
    """One batch through all scales: appends (B, K) arrays to `rows`, returns the partial images (K, B, H, W, 3)."""
    model = probe.model
    generation = probe.begin(prompts, seeds)
    before = probe.decode(generation)
    found: dict[str, list[np.ndarray]] = {}
    images: list[np.ndarray] = []
    for step in exact(len(model.grids)).expand(model.grids, probe.chunks):
        alone: dict[Branch, tuple[Tensor, Tensor, np.ndarray]] = {}
        for branch in BOTH:
            alone[branch] = probe.try_step(generation, dataclasses.replace(step, branches=(branch,)))
            probe.rewind(generation, step.scale)
        probe.observer.on = True
        logits, tokens, image = probe.try_step(generation, step)
        probe.observer.on = False
        for branch, (own_logits, own_tokens, own_image) in alone.items():
            found.setdefault(f"divergence:{branch}", []).append(_divergence(logits, own_logits))
            flips = (own_tokens != tokens).float().flatten(1).mean(1).cpu().numpy()
            found.setdefault(f"flips:{branch}", []).append(flips)
            found.setdefault(f"image:{branch}", []).append(1 - ssim(own_image, image))
        images.append(image)
    final = images[-1]
    low_KB, high_KB = band_changes([before, *images], model.grids[-1])
    for name, values_KB in (("low_change", low_KB), ("high_change", high_KB)):
        found[name] = list(values_KB)
    for image in images:
        found.setdefault("low_frequency", []).append(1 - low_error(image, final, model.grids[-1]))
        found.setdefault("ssim", []).append(ssim(image, final))
        found.setdefault("psnr_db", []).append(psnr_db(image, final))
        for similarity in similarities:
            found.setdefault(similarity.name, []).append(np.asarray(similarity.score(image, final), dtype=np.float64))
    for name, parts in found.items():
        rows.setdefault(name, []).append(np.stack(parts, axis=1))
    return np.stack(images)


def _divergence(guided: Tensor, alone: Tensor) -> np.ndarray:
    """KL(guided, alone) in nats per token or bit (B,): the last axis holds the choices, whatever the family."""
    p, q = guided.double().log_softmax(-1), alone.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).flatten(1).mean(1).cpu().numpy()


# ---------------------------------------------------------------- ranks


def _try_ranks(
    probe: _Probe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedule: StageSchedule,
    table: RankTable,
    trials: dict[tuple[str, str], list[np.ndarray]],
) -> None:
    """One batch: 1 - SSIM with the full schedule's image (B,) for every tried energy and projection."""
    model = probe.model
    generation = probe.begin(prompts, seeds)
    final = _finish(probe, generation, exact(len(model.grids)).expand(model.grids, probe.chunks))
    for projection in PROJECTIONS:
        for energy in TRIED_ENERGIES:
            probe.rewind(generation, schedule.structure_end)
            tried = with_ranks(schedule, model, table, energy, projection)
            image = _finish(probe, generation, tried.expand(model.grids, probe.chunks))
            trials.setdefault((energy, projection), []).append(1 - ssim(image, final))


# ---------------------------------------------------------------- ablation


def _ablate(
    probe: _Probe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    proposal: StageSchedule,
    similarities: Sequence[Similarity],
    quality: Mapping[str, Quality],
    scores: dict[str, list[np.ndarray]],
) -> None:
    """One batch: the full schedule, then the acceleration started at each scale, last first, on the same prefix."""
    model = probe.model
    generation = probe.begin(prompts, seeds)
    full = exact(len(model.grids)).expand(model.grids, probe.chunks)
    final = _finish(probe, generation, full)
    base = {name: np.asarray(score(final, prompts), dtype=np.float64) for name, score in quality.items()}
    found: dict[str, list[np.ndarray]] = {}
    for start in range(len(model.grids) - 1, 0, -1):
        probe.rewind(generation, start)
        steps = begun_at(proposal, start, model).expand(model.grids, probe.chunks)
        image = _finish(probe, generation, steps)
        found.setdefault("ssim", []).append(ssim(image, final))
        for similarity in similarities:
            found.setdefault(similarity.name, []).append(np.asarray(similarity.score(image, final), dtype=np.float64))
        for name, score in quality.items():
            found.setdefault(f"change:{name}", []).append(
                np.asarray(score(image, prompts), dtype=np.float64) - base[name]
            )
    for name, parts in found.items():
        scores.setdefault(name, []).append(np.stack(parts[::-1], axis=1))


def _finish(probe: _Probe, generation: Generation, steps: Steps) -> np.ndarray:
    for step in steps[generation.scale :]:
        probe.advance(generation, step)
    return probe.decode(generation)
