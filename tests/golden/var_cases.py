"""Golden cases of the official VAR code, and what they share with STAR's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.models.base import Conditioning, LoadedModel, NextScaleModel, Sampling
from stagevar.models.var.transformer import VAR, VARConfig, guidance_ramp
from stagevar.models.vq.tokenizer import VQVAE
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import ScaleStep, exact
from stagevar.schedule.grids import square
from tests.golden.checks import Check, RecipeNoise, difference, load_arrays, load_recipe, mismatches

#: Entries of the reference's state dicts that no model reads: attention masks and codebook statistics.
UNREAD = ("lvl_1L", "attn_bias_for_masking", "quantize.ema_vocab_hit_SV")
LOGITS_LIMIT, CODES_LIMIT, PIXELS_LIMIT = 1e-4, 1e-4, 2e-4


def read_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """A shape table without the entries that no model reads."""
    return {key: shape for key, shape in shapes.items() if key not in UNREAD}


class _NoText:
    def encode(self, prompts: Any) -> Any:
        raise AssertionError("golden cases bring their own conditioning")


class Recorder(Sampler):
    """A sampler that keeps trunk inputs, guided logits and indices per scale."""

    def __init__(self, model: LoadedModel):
        super().__init__(model)
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.index: list[Tensor] = []
        embed = model.transformer.embed

        def kept(features: Tensor | None, scale: int, conditioning: Conditioning) -> Tensor:
            self.inputs.append(embed(features, scale, conditioning))
            return self.inputs[-1]

        model.transformer.embed = kept  # type: ignore[method-assign]

    def on_scale(self, step: ScaleStep, logits_BLV: Tensor, tokens: Tensor) -> None:
        self.logits.append(logits_BLV)
        self.index.append(tokens)


def build_tokenizer(case: dict[str, Any]) -> tuple[VQVAE, list[Check]]:
    """The tokenizer on recipe weights; its names are checked where the case lists them."""
    c = case["config"]
    vae = VQVAE(square(c["patch_nums"]), c["V"], c["Cvae"], c["ch"])
    own = {key: list(value.shape) for key, value in vae.state_dict().items()}
    checks = load_recipe(vae, read_shapes(case.get("vae_shapes", own)), prefix="vae:")
    return vae, [Check(f"vae {check.name}", check.value, check.limit) for check in checks]


def compare(
    case: dict[str, Any], arrays: dict[str, np.ndarray], transformer: NextScaleModel, encoded: Sequence[Any]
) -> list[Check]:
    """Runs the full schedule on injected Gumbel draws and compares every scale, the code sum and the image."""
    c = case["config"]
    grids, scales, batch = square(c["patch_nums"]), len(c["patch_nums"]), len(encoded)
    vae, checks = build_tokenizer(case)
    model = LoadedModel(
        "golden", transformer, vae, _NoText(), Sampling(guidance_ramp(c["cfg"], scales), (1.0,) * scales), grids,
        (vae.stride * grids[-1][0], vae.stride * grids[-1][1]), torch.device("cpu"), torch.float32,
    )  # fmt: skip
    sampler = Recorder(model)
    steps = exact(scales).expand(grids, sampler.chunks)
    generation = sampler.begin([""] * batch, [0] * batch, steps=steps, noise=RecipeNoise(batch), encoded=encoded)
    for step in steps:
        sampler.advance(generation, step)
    for scale in range(scales):
        if f"block_in_s{scale}" in arrays:
            golden = arrays[f"block_in_s{scale}"]
            checks.append(difference(f"block_in@s{scale}", sampler.inputs[scale], golden, LOGITS_LIMIT))
        checks += [
            difference(f"logits@s{scale}", sampler.logits[scale], arrays[f"logits_s{scale}"], LOGITS_LIMIT),
            mismatches(f"idx@s{scale}", sampler.index[scale], arrays[f"idx_s{scale}"]),
        ]
    image01 = (vae.decode(generation.code_sum_BdHW).clamp(-1, 1) + 1) / 2
    return [
        *checks,
        difference("f_hat", generation.code_sum_BdHW, arrays["f_hat"], CODES_LIMIT),
        difference("image01", image01, arrays["image01"], PIXELS_LIMIT),
    ]


def run_case(json_path: Path) -> list[Check]:
    """All checks of one VAR case."""
    case, arrays = json.loads(json_path.read_text()), load_arrays(json_path)
    c = case["config"]
    config = VARConfig(
        depth=c["depth"],
        width=c["embed_dim"],
        heads=c["num_heads"],
        sides=tuple(c["patch_nums"]),
        vocabulary=c["V"],
        code_dim=c["Cvae"],
        classes=c["num_classes"],
        shared_adaln=bool(c["shared_aln"]),
    )
    transformer = VAR(config)
    checks = load_recipe(transformer, read_shapes(case["shapes"]))
    transformer.set_grids(square(config.sides))
    return checks + compare(case, arrays, transformer, c["labels"])
