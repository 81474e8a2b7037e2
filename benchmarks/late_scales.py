"""What to do about the last scales, besides reducing their tokens: which other method extends the front?

    python -m benchmarks.late_scales --prompts 512 --rounds 20 --output late_scales.json

Candidates, in one interleaved run: guidance dropped at a scale; fused at an inner layer of it (FocusVAR); several scales
decoded in one forward (LazyVAR); a scale before the last one not run at all.

Source: LazyVAR (no public code) decodes its last four scales together and also prunes their tokens, which is not done here.
In one forward no scale of the group knows what the others drew, so all of them read the code sum before the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablation import nano_verdicts
from benchmarks.environment import environment, write_json
from stagevar.errors import UsageError
from stagevar.models.base import LoadedModel, around_nothing
from stagevar.models.infinity.transformer import Infinity
from stagevar.models.registry import load_model
from stagevar.sampling.bench import bench_prompts, compare, format_table
from stagevar.sampling.generation import Generation, SavedScale
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, ScaleStep, StageSchedule
from stagevar.tensors.cache import KVCache
from tuner.results.pareto import front


class Together(Sampler):
    """Decodes the scales of `group` in one forward. Infinity only, steps without reduction and all of one kind.

    Attention stays as trained: each scale's tokens see their own scale and earlier ones, including those of the group.
    """

    def __init__(self, model: LoadedModel, group: Sequence[int]):
        super().__init__(model)
        self.group = tuple(group)

    def _run(self, generation: Generation, cache: KVCache, step: ScaleStep, before: SavedScale) -> SavedScale:
        if step.scale == self.group[0]:
            return self._together(generation, cache, step, before)
        return before if step.scale in self.group else super()._run(generation, cache, step, before)

    def _together(self, generation: Generation, cache: KVCache, step: ScaleStep, before: SavedScale) -> SavedScale:
        transformer, residual = self.model.transformer, self.model.tokenizer.residual
        assert isinstance(transformer, Infinity)
        batch, sampling = generation.batch, generation.sampling
        start = BOTH.index(step.branches[0]) * batch
        conditioning = generation.conditioning.select(slice(start, start + len(step.branches) * batch))
        parts = []
        for scale in self.group:
            features = residual.next_input(before.code_sum_BdHW, scale)
            parts.append(transformer.embed(features, scale, conditioning) + transformer.lvl_embed.weight[scale])
        sizes = [part.shape[1] for part in parts]
        rotation = transformer._rotation(torch.cat([transformer._scale_rope(scale) for scale in self.group], dim=1))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
            of_scales = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
            return torch.cat([cache.attend(step.branches, layer, *qkv, softmax_scale) for qkv in of_scales], dim=2)

        x_RLC = torch.cat(parts, dim=1)
        for layer, block in enumerate(transformer.layers()):
            x_RLC = block(x_RLC, layer, rotation, None, conditioning, attend, around_nothing)
        logits = transformer.logits(x_RLC, conditioning)
        if step.branches == BOTH:
            cond, uncond = logits.chunk(2)
            guidance = sampling.guidance[step.scale]
            logits = guidance * cond + (1 - guidance) * uncond
        code_sum = before.code_sum_BdHW
        for scale, part in zip(self.group, logits.split(sizes, dim=1), strict=True):
            tempered = part / sampling.temperature[scale]
            tokens = transformer.draw(tempered, generation.noise.at(scale, step.branches), sampling)
            self.on_scale(step, tempered, tokens)
            code_sum = residual.add(code_sum, tokens, scale)
        return SavedScale(code_sum, before.state, cache.lengths, step.branches)


def candidates(model: LoadedModel) -> tuple[dict[str, StageSchedule], dict[str, Callable[[LoadedModel], Sampler]]]:
    """Schedules by row name, and how to build samplers for the rows that need their own."""
    scales, depth = len(model.grids), model.transformer.depth
    schedules: dict[str, StageSchedule] = {}
    samplers: dict[str, Callable[[LoadedModel], Sampler]] = {}
    for first in range(scales - 3, scales):
        conditional = partial(StageSchedule, first, cfg_delay=0, branch="cond")
        schedules[f"conditional from {first}"] = conditional()
        for layer in sorted({depth // 2, depth - 2, depth - 1}):
            schedules[f"fused at {first}, layer {layer}"] = conditional(fuse_layer=layer)
    for skipped in (scales - 2, scales - 3):
        schedules[f"without {skipped}"] = StageSchedule(scales, skip=(skipped,))
        for first in range(scales - 3, scales):
            if first != skipped:
                name = f"without {skipped}, conditional from {first}"
                schedules[name] = StageSchedule(first, cfg_delay=0, branch="cond", skip=(skipped,))
    for group in ((scales - 2, scales - 1), (scales - 3, scales - 2)):
        pair = f"{group[0]} and {group[1]} together"
        for first in (scales, group[0], group[0] - 1):
            name = pair if first == scales else f"{pair}, conditional from {first}"
            delay = None if first == scales else 0
            schedules[name] = StageSchedule(first, cfg_delay=delay, branch="cond")
            samplers[name] = partial(Together, group=group)
    schedules["without the last"] = StageSchedule(scales, skip=(scales - 1,))
    return schedules, samplers


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and both fronts; writes the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.late_scales", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    try:
        model = load_model("nano", device="cpu")
        schedules, samplers = candidates(model)
        prompts, chunks = bench_prompts(model, args.prompts), Sampler(model).chunks
        rows = compare(
            model,
            [],
            extra_steps={name: schedule.expand(model.grids, chunks) for name, schedule in schedules.items()},
            samplers=samplers,
            rounds=args.rounds,
            prompts=prompts,
            warm_up_at_most=3,  # dozens of rows; processor time needs little warm-up
            scores=nano_verdicts(prompts),
        )
    except UsageError as error:
        print(f"late_scales: {error}", file=sys.stderr)
        return error.exit_code
    print(format_table(sorted(rows, key=lambda row: row["cpu_ratio"])))
    for quality in ("ssim", "geneval"):
        on_front = front([(row["cpu_ratio"], row[quality]) for row in rows])
        print(f"front by {quality}: {'; '.join(rows[i]['name'] for i in on_front)}")
    if args.output is not None:
        slim = [{key: value for key, value in row.items() if key != "samples_ms"} for row in rows]
        write_json(args.output, {"environment": environment(model.device), "rows": slim})
    return 0


if __name__ == "__main__":
    sys.exit(main())
