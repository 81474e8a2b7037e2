"""Golden cases of the official HART code and of FastVAR's fork of it.

How they were made: the reference's classes on a CPU in float32, weights and inputs by the recipe of `checks` (tokenizer
keys with "vae:" before them, text features `hart_text`, places of the text tokens in the case's config). Replaced in memory:
the CUDA norm by the same formula, `.cuda()` by nothing, the tokenizer that is read from disk by one that is built, the
multinomial draw by Gumbel-argmax on `gumbel_s{scale}` after the reference's own top-k, the draws of its Gumbel-softmax by
`smooth_s{scale}`, and the diffusion head's by `diffusion_s{scale}` (B, 8, L, d): the start, then what each step but the last
adds. Of FastVAR, whose path without a flash kernel reads the wrong axis of q, that axis was mended. `every`: one row in so
many of logits and block inputs is kept, of images one pixel in three.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.accelerators.base import SUBLAYERS, Cached, ScaleContext
from stagevar.accelerators.fastvar import FastVAR, pivotal_indices
from stagevar.models.base import Around, LoadedModel, Sampling, Site
from stagevar.models.hart.text import HARTText
from stagevar.models.hart.tokenizer import HybridVAE
from stagevar.models.hart.transformer import HART, HARTConfig, guidance_ramp
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import Pivotal, ScaleStep, StageSchedule, exact
from stagevar.schedule.grids import square
from tests.golden.checks import Check, RecipeNoise, difference, load_arrays, load_recipe, mismatches, rand_in
from tests.golden.var_cases import read_shapes

LIMIT, PIXELS_LIMIT = 1e-4, 2e-4
#: What FastVAR's fork prunes, by the side of the scale.
PRUNED = {48: 0.5, 64: 0.25}


class _Probe(FastVAR):
    """FastVAR that keeps the positions that it chose, per (side, layer, kind)."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int, str], Tensor] = {}

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        inner, step = super().around(context, updates), context.step

        def around(site: Site, x: Tensor, positions: Tensor | None, run: Any) -> Tensor:
            if site.kind in SUBLAYERS and isinstance(step.reduction, Pivotal):
                chosen = pivotal_indices(x, step.reduction.kept)
                self.kept[step.grid[0], site.index, site.kind] = chosen.sort(dim=1).values
            return inner(site, x, positions, run)

        return around


class _Recorder(Sampler):
    """Keeps what the cases hold; every hook is on the model's own methods."""

    def __init__(self, model: LoadedModel, accelerator: FastVAR | None = None):
        super().__init__(model, accelerator)
        self.seen: dict[str, list[Tensor]] = {
            name: [] for name in ("block_in", "block_out", "index", "diffusion", "logits")
        }
        transformer = model.transformer
        assert isinstance(transformer, HART)
        self._keep(transformer.blocks[0], "block_in", lambda inputs, output: inputs[0])
        self._keep(transformer.blocks[-1], "block_out", lambda inputs, output: output)
        self._keep(transformer.diffloss, "diffusion", lambda inputs, output: output)
        draw = transformer.draw

        def drawn(*arguments: Any) -> Tensor:
            self.seen["index"].append(draw(*arguments))
            return self.seen["index"][-1]

        transformer.draw = drawn  # type: ignore[method-assign]

    def _keep(self, module: torch.nn.Module, name: str, choose: Any) -> None:
        module.register_forward_hook(lambda module, inputs, output: self.seen[name].append(choose(inputs, output)))

    def on_scale(self, step: ScaleStep, logits_BLV: Tensor, tokens: Tensor) -> None:
        self.seen["logits"].append(logits_BLV)


def _build(case: dict[str, Any]) -> tuple[LoadedModel, list[Check]]:
    c = case["config"]
    sides = tuple(c["patch_nums"])
    transformer = HART(
        HARTConfig(
            depth=c["depth"],
            width=c["embed_dim"],
            heads=c["num_heads"],
            sides=sides,
            text_dim=c["context_dim"],
            text_tokens=c["context_token"],
            vocabulary=c["V"],
            code_dim=c["Cvae"],
            head_width=c["diff_width"],
            head_depth=c["diff_depth"],
            smooth=c["more_smooth"],
            context_norm=c["use_context_norm"],
            level_table=not c["use_timestep_embed"],
            cosine=c["attn_l2_norm"],
        )
    )
    tokenizer = HybridVAE(square(sides), c["V"], c["Cvae"], c["ch"])
    checks = load_recipe(transformer, read_shapes(case["shapes"]))
    checks += [
        Check(f"vae {x.name}", x.value, x.limit)
        for x in load_recipe(tokenizer, read_shapes(case["vae_shapes"]), "vae:")
    ]
    transformer.set_grids(square(sides))
    scales = len(sides)
    sampling = Sampling(guidance_ramp(c["cfg"], scales), (1.0,) * scales, top_k=600)
    pixels = (tokenizer.stride * sides[-1],) * 2
    text: Any = None
    model = LoadedModel(
        "golden", transformer, tokenizer, text, sampling, square(sides), pixels, torch.device("cpu"), torch.float32
    )
    return model, checks


@torch.inference_mode()
def run_case(json_path: Path) -> list[Check]:
    """All checks of one HART case; of a FastVAR one under the fork's own rule."""
    case, arrays = json.loads(json_path.read_text()), load_arrays(json_path)
    c, pruned = case["config"], json_path.name.startswith("hart_fastvar")
    model, checks = _build(case)
    scales, every, batch = len(model.grids), c["every"], c["B"]
    schedule = exact(scales)
    if pruned:
        schedule = StageSchedule(
            scales - len(PRUNED), accelerator="fastvar", rank_ratios=tuple(PRUNED.values()), layers=(0, c["depth"])
        )
    probe = _Probe()
    sampler = _Recorder(model, probe if pruned else None)
    steps = schedule.expand(model.grids, sampler.chunks)
    features = rand_in("hart_text", (batch, c["context_token"], c["context_dim"]), 1.0)
    encoded = [HARTText(row, torch.tensor(place)) for row, place in zip(features, c["positions"], strict=True)]
    generation = sampler.begin([""] * batch, [0] * batch, steps=steps, noise=RecipeNoise(batch), encoded=encoded)
    for step in steps:
        sampler.advance(generation, step)
    seen = sampler.seen
    drawn = range(scales) if not c["more_smooth"] else (scales - 1,)
    for index, scale in zip(seen["index"], drawn, strict=True):
        checks.append(mismatches(f"idx@s{scale}", index, arrays[f"idx_s{scale}"]))
    for scale in range(scales):
        logits = seen["logits"][scale][:, :: every if scale else 1]
        checks.append(difference(f"logits@s{scale}", logits, arrays[f"logits_s{scale}"], LIMIT))
    for scale in (0, 1, scales - 1):
        for name in ("block_in", "block_out"):
            checks.append(
                difference(f"{name}@s{scale}", seen[name][scale][:, ::every], arrays[f"{name}_s{scale}"], LIMIT)
            )
    return [*checks, *_ends(seen, generation.code_sum_BdHW, model, arrays, every), *_kept(probe, arrays)]


def _ends(
    seen: dict[str, list[Tensor]], code_sum: Tensor, model: LoadedModel, arrays: dict[str, np.ndarray], every: int
) -> list[Check]:
    """The residual, the code sum and, where the case has one, the image."""
    if "image01" not in arrays:
        return [
            difference("diffusion", seen["diffusion"][0][:, ::every], arrays["diffusion"], LIMIT),
            difference("f_hat", code_sum[:, :, ::8, ::8], arrays["f_hat"], LIMIT),
        ]
    image01 = (model.tokenizer.decode(code_sum).clamp(-1, 1) + 1) / 2
    return [
        difference("diffusion", seen["diffusion"][0], arrays["diffusion"], LIMIT),
        difference("f_hat", code_sum, arrays["f_hat"], LIMIT),
        difference("image01", image01[:, :, ::3, ::3], arrays["image01"], PIXELS_LIMIT),
    ]


def _kept(probe: _Probe, arrays: dict[str, np.ndarray]) -> list[Check]:
    names = {f"kept_w{side}_l{layer}_{kind}": kept for (side, layer, kind), kept in probe.kept.items()}
    found = [mismatches(f"kept@{name}", kept, arrays[name]) for name, kept in names.items()]
    missing = [name for name in arrays if name.startswith("kept") and name not in names]
    return [*found, Check("sites that prune", len(missing), 0)]
