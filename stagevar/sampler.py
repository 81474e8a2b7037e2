"""The one sampling loop: begin, advance one scale at a time, rewind, decode.

No model, accelerator or baseline owns a second loop. Everything a scale changes is small (code sum, accelerator state,
cache lengths) and is kept per scale, so rewinding to an earlier scale costs nothing and a generation can be forked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.accelerators.base import Accelerator, Cached, ScaleContext, State
from stagevar.accelerators.stagevar import StageVAR
from stagevar.cache import KVCache, Lengths, step_lengths
from stagevar.models.base import Conditioning, LoadedModel, Sampling, Site
from stagevar.noise import NoiseSource, PromptNoise
from stagevar.schedule import BOTH, Branch, ScaleStep, Steps, exact


@dataclass(frozen=True)
class _Saved:
    """Everything a generation is, before a scale runs, apart from the cache contents."""

    code_sum_BdHW: Tensor
    state: State
    lengths: Lengths
    branches: tuple[Branch, ...]


class Generation:
    """One batch on its way through the scales. Made by `Sampler.begin`.

    Attributes:
        scale: index of the next scale. code_sum_BdHW: codes of all scales so far at the final grid.
        steps: what was run. cache: the sampler's, shared with earlier generations (only the latest one is live).
    """

    def __init__(
        self,
        conditioning: Conditioning,
        noise: NoiseSource,
        sampling: Sampling,
        batch: int,
        cache: KVCache,
        code_sum_BdHW: Tensor,
    ):
        self.conditioning, self.noise, self.sampling, self.batch, self.cache = (
            conditioning, noise, sampling, batch, cache,
        )  # fmt: skip
        self.live = True
        self.steps: list[ScaleStep] = []
        self._saved = [_Saved(code_sum_BdHW, {}, cache.lengths, BOTH)]

    @property
    def scale(self) -> int:
        return len(self.steps)

    @property
    def code_sum_BdHW(self) -> Tensor:
        return self._saved[-1].code_sum_BdHW

    @property
    def state(self) -> State:
        """Accelerator state after the last run scale."""
        return self._saved[-1].state

    def code_sum_before(self, scale: int) -> Tensor:
        """The code sum as it was before `scale` ran."""
        return self._saved[scale].code_sum_BdHW


class Sampler:
    """Runs schedules on a loaded model.

    Args:
        model: what `registry.load_model` returned.
        accelerator: how reduced steps are carried out (StageVAR by default; it leaves unreduced steps exact).
    """

    def __init__(self, model: LoadedModel, accelerator: Accelerator | None = None):
        self.model = model
        self.accelerator = accelerator or StageVAR()
        transformer = model.transformer
        self._full = exact(len(model.grids)).expand(model.grids, len(transformer.chunk_layers))
        self._cache: KVCache | None = None
        self._current: Generation | None = None

    @property
    def chunks(self) -> int:
        """Number of block chunks, as `StageSchedule.expand` wants it."""
        return len(self.model.transformer.chunk_layers)

    @torch.inference_mode()
    def begin(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: Steps | None = None,
        negative: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        noise: NoiseSource | None = None,
        encoded: Any | None = None,
        encoded_negative: Any | None = None,
    ) -> Generation:
        """Starts a batch; an earlier generation of this sampler ends here, because the cache is shared.

        Args:
            prompts, seeds: one per image; the pair decides the noise.
            steps: the only schedule that will run (deployment: smaller cache). None leaves room for any schedule.
            negative: prompts for the unconditional branch (default: the model's null text).
            sampling: instead of the model's defaults. noise: instead of the keyed streams.
            encoded, encoded_negative: text features made earlier, instead of encoding here.
        """
        model = self.model
        batch = len(prompts)
        if len(seeds) != batch:
            raise ValueError(f"{batch} prompts need {batch} seeds, got {len(seeds)}")
        if encoded is None:
            encoded = model.text.encode(prompts)
        if encoded_negative is None and negative is not None:
            encoded_negative = model.text.encode(negative)
        conditioning = model.transformer.condition(encoded, encoded_negative)
        if self._current is not None:
            self._current.live = False
        cache = self._allocate(batch, steps or self._full)
        code_sum = model.tokenizer.residual.zeros(batch, model.device)
        noise = noise or PromptNoise(prompts, seeds, model.device)
        self._current = Generation(conditioning, noise, sampling or model.sampling, batch, cache, code_sum)
        return self._current

    def _allocate(self, batch: int, steps: Steps) -> KVCache:
        transformer = self.model.transformer
        capacity = step_lengths(steps, transformer.chunk_layers)
        cache = self._cache
        if cache is None or cache.batch != batch or cache.capacity != {b: tuple(e) for b, e in capacity.items()}:
            self._cache = None  # freed before the next one is allocated
            self._cache = cache = KVCache(
                batch, transformer.heads, transformer.head_dim, capacity, self.model.device, self.model.dtype
            )
        cache.rewind(tuple((0,) * transformer.depth for _ in BOTH))
        return cache

    @torch.inference_mode()
    def advance(self, generation: Generation, step: ScaleStep) -> None:
        """Runs (or skips) the next scale.

        Raises ValueError when the step is for another scale, wants a branch that was dropped, or the generation is over.
        """
        if not generation.live:
            raise ValueError("this generation ended when the sampler began another one")
        if step.scale != generation.scale or step.grid != self.model.grids[step.scale]:
            raise ValueError(
                f"step for scale {step.scale} {step.grid} does not follow {generation.scale} scales of {self.model.name}"
            )
        before = generation._saved[-1]
        if step.skipped:
            after = before
        else:
            missing = [branch for branch in step.branches if branch not in before.branches]
            if missing:
                raise ValueError(f"scale {step.scale} wants the {missing[0]} branch, which an earlier scale dropped")
            after = self._run(generation, step, before)
        generation.steps.append(step)
        generation._saved.append(after)

    def _run(self, generation: Generation, step: ScaleStep, before: _Saved) -> _Saved:
        model, cache, batch = self.model, generation.cache, generation.batch
        transformer, residual = model.transformer, model.tokenizer.residual
        sampling, scale = generation.sampling, step.scale
        start = BOTH.index(step.branches[0]) * batch
        conditioning = generation.conditioning.select(slice(start, start + len(step.branches) * batch))
        noise = generation.noise.at(scale, step.branches)
        updates: dict[Site, Cached] = {}
        around = self.accelerator.around(ScaleContext(step, noise, before.state), updates)

        features = None if scale == 0 else residual.next_input(before.code_sum_BdHW, scale)
        x_RLC = transformer.embed(features, scale, conditioning)
        guidance, guided = sampling.guidance[scale], step.branches == BOTH
        inner = None
        if guided and guidance != 1 and sampling.inner_guidance_layers:
            inner = {layer % transformer.depth: guidance for layer in sampling.inner_guidance_layers}
        x_RLC = transformer.trunk(
            x_RLC,
            scale,
            conditioning,
            lambda layer, q, k, v, softmax_scale: cache.attend(step.branches, layer, q, k, v, softmax_scale),
            around,
            inner,
        )
        mixed = guided and guidance != 1 and sampling.logits_guidance
        if guided and not mixed:
            x_RLC, conditioning = x_RLC[:batch], conditioning.select(slice(0, batch))
        logits = transformer.logits(x_RLC, conditioning) / sampling.temperature[scale]
        if mixed:
            cond, uncond = logits.chunk(2)
            logits = guidance * cond + (1 - guidance) * uncond
        tokens = transformer.draw(logits, noise, sampling)
        self.on_scale(step, logits, tokens)
        code_sum = residual.add(before.code_sum_BdHW, tokens, scale)
        return _Saved(code_sum, {**before.state, **updates}, cache.lengths, step.branches)

    def on_scale(self, step: ScaleStep, logits_BLV: Tensor, tokens: Tensor) -> None:
        """Called with every run scale's guided logits and drawn tokens; analysis and tests override it."""

    def rewind(self, generation: Generation, scale: int) -> None:
        """Forgets `scale` and everything after it; the next `advance` runs `scale`."""
        if not 0 <= scale <= generation.scale:
            raise ValueError(f"cannot rewind to scale {scale} from {generation.scale}")
        del generation.steps[scale:]
        del generation._saved[scale + 1 :]
        generation.cache.rewind(generation._saved[scale].lengths)

    @torch.inference_mode()
    def decode(self, generation: Generation) -> np.ndarray:
        """Pixels of the code sum as it stands: uint8 (B, H, W, 3), RGB; truncation as in the reference."""
        return to_uint8(self.model.tokenizer.decode(generation.code_sum_BdHW))

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], steps: Steps, **options: Any) -> np.ndarray:
        """All scales of one schedule, then decode: uint8 (B, H, W, 3). Options as for `begin`."""
        generation = self.begin(prompts, seeds, steps=steps, **options)
        for step in steps:
            self.advance(generation, step)
        return self.decode(generation)


def to_uint8(image_B3HW: Tensor) -> np.ndarray:
    """[-1, 1] floats to uint8 (B, H, W, 3), clamped, truncated."""
    pixels = ((image_B3HW.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
