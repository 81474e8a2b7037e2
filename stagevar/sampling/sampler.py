"""The one sampling loop: begin, advance one scale at a time, rewind, decode.

No model, accelerator or baseline owns a second loop. Everything a scale changes is small (code sum, accelerator state,
cache lengths) and is kept per scale, so rewinding to an earlier scale costs nothing and a generation can be forked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.accelerators.base import Accelerator, ScaleContext, State
from stagevar.accelerators.composite import Composite
from stagevar.engine import Engine, Start, build_engine
from stagevar.errors import ScheduleError
from stagevar.models.base import Around, LoadedModel, NextScaleModel, Sampling, Site, SiteFn
from stagevar.models.memory import total_bytes
from stagevar.models.precision import low_precision
from stagevar.prompts.requests import check_negatives, check_prompts, check_seeds
from stagevar.sampling.generation import ENDED, CachedAttention, Generation, SavedScale, Updates
from stagevar.sampling.pixels import to_uint8
from stagevar.schedule import BOTH, Branch, Decision, ScaleStep, Steps, exact
from stagevar.tensors.attention import attention_kernels
from stagevar.tensors.cache import KVCache, even, step_lengths
from stagevar.tensors.noise import Draws, NoiseSource, PromptNoise

#: Share of a card's memory that a cache may take beyond its entries, to have as many in every layer and branch.
EVEN_SHARE = 0.02


class Sampler:
    """Runs schedules on a loaded model.

    Args:
        model: from `registry.load_model`.
        accelerator: carries out the reduced steps; by default each step uses the method that it names.
        engine: how steps reach the device: one of stagevar.engine.ENGINES, or an engine object.
    """

    def __init__(self, model: LoadedModel, accelerator: Accelerator | None = None, engine: str | Engine = "eager"):
        self.model = model
        self.accelerator = accelerator or Composite()
        self.engine = build_engine(engine, model.device) if isinstance(engine, str) else engine
        transformer = model.transformer
        self._full = exact(len(model.grids)).expand(model.grids, len(transformer.chunk_layers))
        self._caches: list[KVCache] = []
        self._draws, plain = Draws(), transformer
        if self.engine.compiled:
            from stagevar.models import fused  # compilers take long to import

            self._draws, plain = fused.draws(), fused.compiled(transformer, self.engine.chained)
            self._draws = self.engine.draws or self._draws
        self._tokenizer = model.tokenizer
        if self.engine.swished is not None and hasattr(model.tokenizer, "decoding_with"):
            self._tokenizer = model.tokenizer.decoding_with(self.engine.swished)
        self._transformers: dict[str, NextScaleModel] = {"model": plain}
        self._current: Generation | None = None

    @property
    def chunks(self) -> int:
        """Number of block chunks, as `StageSchedule.expand` wants it."""
        return len(self.model.transformer.chunk_layers)

    def _transformer(self, precision: str) -> NextScaleModel:
        """The model's transformer with its products in this precision, made when first wanted."""
        if precision not in self._transformers:
            self._transformers[precision] = low_precision(self._transformers["model"], precision)
        return self._transformers[precision]

    @torch.inference_mode()
    def begin(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: Steps | None = None,
        among: Sequence[Steps] | None = None,
        negative: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        noise: NoiseSource | None = None,
        encoded: Any | None = None,
        encoded_negative: Any | None = None,
    ) -> Generation:
        """Starts a batch. This ends the sampler's previous generation, because they share the cache.

        Args:
            prompts, seeds: one per image, as in `Pipeline.generate`; the pair determines the noise.
            steps: the only schedule that will run (deployment): a smaller cache, and only what that schedule restores
                from is kept. None leaves room for any schedule.
            among: instead of `steps`, the schedules that may run: leaves room for any, but keeps only what these
                restore from.
            negative: prompts for the unconditional branch, instead of the model's null text.
            sampling: used instead of the model's defaults.
            noise: used instead of the keyed streams.
            encoded, encoded_negative: text features made earlier; nothing is encoded here then.

        Raises:
            UsageError: for prompts, seeds or negatives of the wrong kind or number.
        """
        model, prompts = self.model, check_prompts(prompts)
        batch = len(prompts)
        seeds, negative = check_seeds(seeds, batch), check_negatives(negative, batch)
        if encoded is None:
            encoded = model.text.encode(prompts)
        if encoded_negative is None and negative is not None:
            encoded_negative = model.text.encode(negative)
        self._end_current()  # it would hold a cache that `_allocate` is about to free
        cache = self._allocate(batch, steps or self._full)
        noise = noise or PromptNoise(prompts, seeds, model.device, self._draws)
        with attention_kernels(model.device):
            conditioning = self.engine.condition(model.transformer, encoded, encoded_negative, noise)
        code_sum = model.tokenizer.residual.zeros(batch, model.device)
        sampling = sampling or model.sampling
        plans = tuple(among) if among else None if steps is None else (steps,)
        start = self.engine.start(Start(conditioning, noise, code_sum), cache, (sampling, plans))
        self._current = Generation(start, sampling, batch, cache, plans)
        return self._current

    def _allocate(self, batch: int, steps: Steps) -> KVCache:
        transformer = self.model.transformer
        capacity = self._capacity(batch, steps)
        wanted = {branch: tuple(entries) for branch, entries in capacity.items()}
        cache = next((c for c in self._caches if c.batch == batch and c.capacity == wanted), None)
        if cache is None:
            while len(self._caches) >= self.engine.max_caches:  # freed before the next one is allocated
                self.engine.forget(self._caches.pop(0))
            model, shape = self.model, (batch, transformer.heads, transformer.head_dim)
            cache = KVCache(*shape, capacity, model.device, model.dtype, eight_bit=model.kv_cache == "int8")
            self._caches.append(cache)
        cache.rewind(tuple((0,) * transformer.depth for _ in BOTH))
        return cache

    def _capacity(self, batch: int, steps: Steps) -> dict[Branch, list[int]]:
        """Entries per branch and layer: as few as the schedule makes; on a card, equal everywhere if that costs little."""
        transformer, device = self.model.transformer, self.model.device
        least = step_lengths(steps, transformer.chunk_layers, transformer.prefix_tokens)
        total = total_bytes(device) if device.type == "cuda" else None
        if total is None:
            return least
        alike = even(least)
        further = sum(map(sum, alike.values())) - sum(map(sum, least.values()))
        entry_bytes = 2 * batch * transformer.width * self.model.dtype.itemsize
        return alike if further * entry_bytes <= EVEN_SHARE * total else least

    def release(self) -> None:
        """Frees the caches and the engine's recordings, and ends the current generation."""
        self._end_current()
        while self._caches:
            self.engine.forget(self._caches.pop())
        self.engine.release()

    def _end_current(self) -> None:
        if self._current is not None:
            self._current.end()
        self._current = None

    @torch.inference_mode()
    def advance(self, generation: Generation, step: ScaleStep) -> None:
        """Runs (or skips) the next scale.

        Raises:
            ValueError: if the step is for another scale or needs a branch that was dropped, or if the generation has
                ended or is waiting for its decision.
        """
        if not generation.live:
            raise ValueError(ENDED)
        if step.scale != generation.scale or step.grid != self.model.grids[step.scale]:
            raise ValueError(
                f"step for scale {step.scale} {step.grid} does not follow {generation.scale} scales of {self.model.name}"
            )
        if generation.outcomes is None and any(done.decision for done in generation.steps):
            raise ValueError(f"scale {step.scale} comes after an open decision; call `decide` or `finish`")
        before = generation._saved[-1]
        if step.skipped:
            after = before
        else:
            missing = [branch for branch in step.branches if branch not in before.branches]
            if missing:
                raise ValueError(f"scale {step.scale} needs the {missing[0]} branch, which an earlier scale dropped")
            if step.fuse_layer:
                self._check_fusing(step, generation.sampling)
            self._transformer(step.precision)  # made here so that it is not part of a recording
            steps = (*generation.steps, step)
            cache = generation.cache  # recordings outlive the generation that made them
            with attention_kernels(self.model.device):
                after = self.engine.run(
                    generation.resident, steps, cache, lambda: self._run(generation, cache, step, before)
                )
        generation.steps.append(step)
        generation._saved.append(after)

    @torch.inference_mode()
    def advance_like(self, generation: Generation, kept: Generation) -> None:
        """Runs the next scale by copying what `kept` computed for it: bit-identical, at the cost of copying cache entries.

        Args:
            generation: the one to advance.
            kept: a generation of the same batch and the same steps so far (`split` makes one that lasts).

        Raises:
            ValueError: if their steps differ, or if recorded graphs own the buffers.
        """
        scale = generation.scale
        if generation.resident is not None:
            raise ValueError(f"the {self.engine.name} engine cannot take over scales computed elsewhere")
        if not generation.live or kept.scale <= scale or kept.steps[:scale] != generation.steps:
            raise ValueError(f"no scale {scale} to take over: the other generation took other steps")
        before, after = kept._saved[scale], kept._saved[scale + 1]
        generation.cache.copy_entries(kept.cache, before.lengths, after.lengths)
        generation.steps.append(kept.steps[scale])
        generation._saved.append(after)

    def _check_fusing(self, step: ScaleStep, sampling: Sampling) -> None:
        depth = self.model.transformer.depth
        if step.fuse_layer >= depth:
            raise ScheduleError(
                f"fuse_layer {step.fuse_layer} is beyond the {depth} layers of {self.model.name}; use 0 to {depth - 1}"
            )
        if sampling.inner_guidance_layers:
            raise ScheduleError(
                f"fuse_layer {step.fuse_layer} would mix the branches again: this sampling mixes them after layers "
                f"{list(sampling.inner_guidance_layers)}; use fuse_layer 0"
            )

    def _around(self, generation: Generation, step: ScaleStep, state: State, updates: Updates) -> Around:
        """The accelerator's hook. At a fusing scale, each site runs as a step with the branches that the site puts out."""

        def hook(step: ScaleStep) -> Around:
            noise = generation.noise.at(step.scale, step.branches)
            return self.accelerator.around(ScaleContext(step, noise, state), updates)

        if not step.fuse_layer:
            return hook(step)
        before, behind = hook(step), hook(step.rest)
        transformer = self.model.transformer

        def around(site: Site, x_RLC: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
            last = site.index
            if site.kind in ("trunk", "chunk"):
                last = transformer.chunk_layers[site.index if site.kind == "chunk" else -1][-1]
            return (behind if last >= step.fuse_layer else before)(site, x_RLC, positions, run)

        return around

    def _run(self, generation: Generation, cache: KVCache, step: ScaleStep, before: SavedScale) -> SavedScale:
        model, batch = self.model, generation.batch
        transformer, residual = self._transformer(step.precision), model.tokenizer.residual
        sampling, scale = generation.sampling, step.scale
        start = BOTH.index(step.branches[0]) * batch
        conditioning = generation.conditioning.select(slice(start, start + len(step.branches) * batch))
        noise = generation.noise.at(scale, step.branches)
        last = scale == len(self.model.grids) - 1
        plans = generation.plans
        later = () if last else None if plans is None else tuple({plan[scale + 1 :] for plan in plans})
        updates = Updates(self.accelerator, later)
        around = self._around(generation, step, before.state, updates)

        features = None if scale == 0 else residual.next_input(before.code_sum_BdHW, scale)
        x_RLC = transformer.embed(features, scale, conditioning)
        guidance, guided = sampling.guidance[scale], step.branches == BOTH and not step.fuse_layer
        inner = None
        if guided and guidance != 1 and sampling.inner_guidance_layers:
            inner = {layer % transformer.depth: guidance for layer in sampling.inner_guidance_layers}
        x_RLC = transformer.trunk(
            x_RLC,
            scale,
            conditioning,
            CachedAttention(cache, step),
            around,
            inner,
            (step.fuse_layer, guidance) if step.fuse_layer else None,
        )
        mixed = guided and guidance != 1 and sampling.logits_guidance
        if step.branches == BOTH and not mixed:
            x_RLC, conditioning = x_RLC[:batch], conditioning.select(slice(0, batch))
        logits = transformer.logits(x_RLC, conditioning) / sampling.temperature[scale]
        if mixed:
            cond, uncond = logits.chunk(2)
            logits = guidance * cond + (1 - guidance) * uncond
        tokens = transformer.scale_tokens(logits, x_RLC, scale, noise, sampling, residual)
        self.on_scale(step, logits, tokens)
        code_sum = residual.add(before.code_sum_BdHW, tokens, scale)
        state = {site: cached for site, cached in before.state.items() if updates.wanted(site)}
        # After a fusing layer the dropped branch has no entries of this scale, so it cannot come back at a later one.
        branches = step.rest.branches if step.fuse_layer else step.branches
        return SavedScale(code_sum, {**state, **updates}, cache.lengths, branches)

    def on_scale(self, step: ScaleStep, logits_BLV: Tensor, tokens: Tensor) -> None:
        """Called with every run scale's guided logits and drawn tokens; analysis and tests override it.

        The graph engine calls it only while recording, so overriding it requires the eager engine.
        """

    def rewind(self, generation: Generation, scale: int) -> None:
        """Forgets `scale` and everything after it; the next `advance` runs `scale`."""
        if not 0 <= scale <= generation.scale:
            raise ValueError(f"cannot rewind to scale {scale} from {generation.scale}")
        del generation.steps[scale:]
        del generation._saved[scale + 1 :]
        generation.cache.rewind(generation._saved[scale].lengths)
        if not any(step.decision for step in generation.steps):
            generation.outcomes = None

    @torch.inference_mode()
    def decode(self, generation: Generation) -> np.ndarray:
        """Pixels of the code sum as it stands: uint8 (B, H, W, 3), RGB; truncated as in the reference.

        Raises:
            ValueError: if the generation has ended: a later one may have overwritten its code sum.
        """
        if not generation.live:
            raise ValueError(ENDED)
        return to_uint8(self.engine.decode(generation.code_sum_BdHW, self._tokenizer.decode))

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], steps: Steps, **options: Any) -> np.ndarray:
        """All scales of one schedule, then decode: uint8 (B, H, W, 3). Takes the options of `begin`.

        If decoding runs out of memory, the caches and recordings are freed and it is tried again, eagerly.
        """
        generation = self.begin(prompts, seeds, steps=steps, **options)
        try:
            return self.finish(generation, steps)
        except torch.OutOfMemoryError:
            if generation.scale < len(self.model.grids):
                raise
            code_sum_BdHW = generation.code_sum_BdHW.clone()
        # Only here is the error gone, whose frames hold the generation and with it the cache.
        self.release()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        with torch.inference_mode():
            return to_uint8(self._tokenizer.decode(code_sum_BdHW))

    def finish(self, generation: Generation, steps: Steps) -> np.ndarray:
        """Runs the rest of a schedule, including its decision, then decodes: uint8 (B, H, W, 3), RGB.

        Raises:
            UsageError: before anything runs, if the decision was not fitted for this model.
        """
        rest = steps[generation.scale :]
        for step in rest:
            if step.decision is not None:
                self.accelerator.check(self.model, step.decision)
        for step in rest:
            self.advance(generation, step)
            if step.decision is not None:
                return self._finish_decided(generation, step.decision)
        return self.decode(generation)

    def _finish_decided(self, generation: Generation, decision: Decision) -> np.ndarray:
        rows_of: dict[Steps, list[int]] = {}
        for row, outcome in enumerate(self.decide(generation)):
            rows_of.setdefault(decision.continuation(outcome), []).append(row)
        if len(rows_of) == 1:
            return self.finish(generation, (*generation.steps, *next(iter(rows_of))))
        images: dict[int, np.ndarray] = {}
        for steps, rows in rows_of.items():
            part = self.split(generation, rows)
            images.update(zip(rows, self.finish(part, (*part.steps, *steps)), strict=True))
        return np.stack([images[row] for row in range(generation.batch)])

    @torch.inference_mode()
    def decide(self, generation: Generation) -> tuple[str, ...]:
        """Takes the decision after the last scale: one outcome per image, kept in `generation.outcomes`.

        Raises:
            ValueError: if that scale has no decision.
            UsageError: if its classifier is for another model.
        """
        step = generation.steps[-1] if generation.steps else None
        if step is None or step.decision is None:
            raise ValueError(f"no decision follows the {generation.scale} scales that were run")
        before, after = generation.code_sum_before(step.scale), generation.code_sum_BdHW
        generation.outcomes = tuple(self.accelerator.decide(self.model, step.decision, before, after))
        return generation.outcomes

    @torch.inference_mode()
    def split(self, generation: Generation, rows: Sequence[int]) -> Generation:
        """A separate generation of some images of a batch, at the same scale, with its own copy of their cache.

        It can be advanced, rewound and decoded independently, even after the sampler begins another batch.
        """
        return generation.select(list(rows))
