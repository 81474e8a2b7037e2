"""Golden cases of the official FastVAR code on Infinity: kept sets, caches and their lengths, block outputs, logits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.accelerators.base import SUBLAYERS, Cached, ScaleContext
from stagevar.accelerators.fastvar import FastVAR, pivotal_indices
from stagevar.models.base import Around, Grid, Site
from stagevar.models.infinity.transformer import Infinity
from stagevar.sampling.generation import Generation
from stagevar.schedule import BOTH, Pivotal, StageSchedule, Steps
from tests.golden.checks import Check, difference, load_arrays, mismatches
from tests.golden.infinity_cases import Recorder, build

#: The reference's names of the three sublayers.
KINDS = {"sa": "attn", "ca": "cross", "ffn": "mlp"}


class _Probe(FastVAR):
    """FastVAR that keeps every sublayer's output and what it pruned, per (scale, kind, layer)."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, str, int], Tensor] = {}
        self.kept: dict[tuple[int, str, int], Tensor] = {}

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        inner, step = super().around(context, updates), context.step

        def around(site: Site, x: Tensor, positions: Tensor | None, run: Any) -> Tensor:
            y = inner(site, x, positions, run)
            if site.kind in SUBLAYERS:
                key = (step.scale, site.kind, site.index)
                self.outputs[key] = y
                if isinstance(step.reduction, Pivotal) and site.index in range(*step.reduction.layers):
                    self.kept[key] = pivotal_indices(x, step.reduction.kept)
            return y

        return around


def reference_schedule(grids: Sequence[Grid]) -> StageSchedule:
    """The released code's rule, which reads grid widths: 32 keeps 60 %, 40 keeps 50 %, 48 and 64 are not run."""
    kept = {32: 0.6, 40: 0.5}
    pruned = [scale for scale, (_, width) in enumerate(grids) if width in kept]
    return StageSchedule(
        structure_end=pruned[0] if pruned else len(grids),
        accelerator="fastvar",
        rank_ratios=tuple(kept[grids[scale][1]] for scale in pruned) or None,
        skip=tuple(scale for scale, (_, width) in enumerate(grids) if width in (48, 64)),
    )


def _scale_of_width(steps: Steps, width: int) -> int:
    return next(step.scale for step in steps if step.grid[1] == width)


@torch.inference_mode()
def run_case(json_path: Path) -> list[Check]:
    """A `fastvar_*` case, run by the released code's rule."""
    case, arrays = json.loads(json_path.read_text()), load_arrays(json_path)
    loaded, checks = build(case)
    transformer, grids = loaded.transformer, loaded.grids
    assert isinstance(transformer, Infinity)
    blocks: dict[tuple[str, int], list[Tensor]] = {}
    for layer, block in enumerate(transformer.layers()):
        block.register_forward_hook(
            lambda module, inputs, output, layer=layer: blocks.setdefault(("out", layer), []).append(output)
        )
    transformer.layers()[0].register_forward_pre_hook(
        lambda module, inputs: blocks.setdefault(("in", 0), []).append(inputs[0])
    )
    probe = _Probe()
    sampler = Recorder(loaded, probe)
    steps = reference_schedule(grids).expand(grids, sampler.chunks)
    generation = sampler.run(case, arrays, steps)
    checks += sampler.compare(generation, arrays, 1e-4)
    run = [step.scale for step in steps if not step.skipped]
    bits_scales = [scale for scale in range(len(grids)) if f"bits_s{scale}" in arrays]
    checks.append(mismatches("scales run", np.array(run), np.array(bits_scales)) if bits_scales else Check("run", 0, 0))
    for key, golden in arrays.items():
        if match := re.fullmatch(r"keep_w(\d+)_l(\d+)_(sa|ca|ffn)", key):
            width, layer, kind = int(match[1]), int(match[2]), KINDS[match[3]]
            checks.append(_same_sets(key, probe.kept[_scale_of_width(steps, width), kind, layer], golden))
        elif match := re.fullmatch(r"cache(\d+)_(sa|ca|ffn)_block(\d+)", key):
            ours = probe.outputs[_scale_of_width(steps, int(match[1])), KINDS[match[2]], int(match[3])]
            checks.append(difference(f"cache@{key}", ours, golden, 1e-4))
        elif match := re.fullmatch(r"block(\d*)_(in|out)_s(\d+)", key):
            ours = blocks[match[2], int(match[1] or 0)][run.index(int(match[3]))]
            checks.append(difference(f"block {match[2]}@{key}", ours, golden, 1e-4))
        elif match := re.fullmatch(r"kvlen_block(\d+)_after_s(\d+)", key):
            shape = _cache_shape(generation, int(match[1]), int(match[2]))
            checks.append(mismatches(f"cache shape@{key}", shape, golden))
    return checks


def _same_sets(name: str, ours_Rk: Tensor, golden_Rk: np.ndarray) -> Check:
    """Kept positions as sets per row: the order within a set changes nothing but the order of cache entries."""
    golden = np.sort(golden_Rk.astype(np.int64), axis=1)
    return mismatches(f"kept@{name}", ours_Rk.sort(dim=1).values, golden)


def _cache_shape(generation: Generation, layer: int, scale: int) -> np.ndarray:
    """The reference's cache shape (rows, heads, entries, head_dim) of a layer after a scale."""
    lengths = generation._saved[scale + 1].lengths
    _, batch, heads, _, head_dim = generation.cache.storage("cond", layer).shape
    entries = {lengths[BOTH.index(branch)][layer] for branch in BOTH}
    assert len(entries) == 1, "both branches run at every scale of FastVAR"
    return np.array([len(BOTH) * batch, heads, entries.pop(), head_dim])
