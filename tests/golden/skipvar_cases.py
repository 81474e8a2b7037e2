"""Golden cases of the official SkipVAR code on Infinity: decision images, features, decisions, late logits, codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stagevar.accelerators.skipvar import (
    LinearClassifier,
    SkipRule,
    SkipVAR,
    edge_change,
    high_frequency_share,
    load_rule,
    partial_image,
)
from stagevar.models.infinity.tokenizer import BSQVAE
from stagevar.sampling.generation import Generation
from stagevar.schedule import Steps, skipvar
from tests.golden.checks import Check, RecipeNoise, difference, load_arrays, load_recipe, mismatches
from tests.golden.infinity_cases import Recorder, build, text_rows


def _golden_rule(rule: SkipRule, parameters: dict[str, Any]) -> SkipRule:
    """The case's own classifier numbers behind the packaged rule's interface."""

    def classifier(part: dict[str, Any]) -> LinearClassifier:
        rows = tuple(tuple(row) for row in part["coef"])
        return LinearClassifier(
            tuple(part["mean"]), tuple(part["scale"]), tuple(part["classes"]), rows, tuple(part["icpt"])
        )

    return dataclasses.replace(rule, skip=classifier(parameters["skip"]), guidance=classifier(parameters["uncond"]))


def _outcome(run: dict[str, Any]) -> str:
    """Our name of what a reference run did."""
    forced = run.get("forced") or {}
    skip = forced.get("skip", run["lr_skip"])
    uncond = forced.get("uncond", run["lr_uncond"])
    return f"skip{skip}" if skip else f"cond{uncond}" if uncond else "full"


@torch.inference_mode()
def run_case(json_path: Path) -> list[Check]:
    """A `skipvar_*` case: one generation up to the decision, then every run as a continuation of it."""
    case, arrays = json.loads(json_path.read_text()), load_arrays(json_path)
    case.setdefault("tag", 0)
    loaded, checks = build(case)
    config = case["config"]
    vae = BSQVAE(config["d"], loaded.grids, patchify=bool(config.get("patchify", 0)), base_ch=config["base_ch"])
    shapes = case.get("vae_shapes") or {key: list(value.shape) for key, value in vae.state_dict().items()}
    checks += load_recipe(vae, shapes, "vae:")
    # The packaged classifier is for Infinity-2B; the case stands in for it.
    sampler = Recorder(dataclasses.replace(loaded, name="infinity-2b", tokenizer=vae), SkipVAR())
    steps = skipvar(loaded.grids).expand(loaded.grids, sampler.chunks)
    decision = next(step.decision for step in steps if step.decision is not None)
    rule = load_rule(decision.rule, "infinity-2b", len(steps))
    point = len(steps) - 1 - len(decision.continuation("full"))
    prompts, negative = text_rows(arrays, config)
    noise = RecipeNoise(len(prompts), case["tag"])
    generation = sampler.begin(
        [""] * len(prompts), [0] * len(prompts), noise=noise, encoded=prompts, encoded_negative=negative
    )
    for step in steps[: point + 1]:
        sampler.advance(generation, step)

    images = {}
    for which, code_sum in (("old", generation.code_sum_before(point)), ("new", generation.code_sum_BdHW)):
        images[which] = partial_image(sampler.model, code_sum, rule.image_scale)
        codes = F.interpolate(code_sum, size=vae.residual.latent_grids[rule.image_scale], mode="bilinear")
        if f"{which}8_codes" in arrays:
            checks.append(difference(f"partial codes@{which}", codes, arrays[f"{which}8_codes"], 1e-5))
        if f"{which}8_img" in arrays:
            checks.append(difference(f"partial image@{which}", images[which], arrays[f"{which}8_img"], 2e-4))
    features_B2 = torch.stack([edge_change(images["old"], images["new"]), high_frequency_share(images["new"])], dim=1)
    chosen = sampler.decide(generation)
    for name, run in case["runs"].items():
        checks.append(difference(f"features@{name}", features_B2, np.array([run["features"]]), 1e-5))
        if not run.get("forced"):
            checks.append(Check(f"decision@{name} {chosen[0]}", float(chosen[0] != _outcome(run)), 0))
        checks += _continuation(sampler, generation, decision.continuation(_outcome(run)), name, run, arrays)
    if "LR_ssim84" in case:
        theirs = _golden_rule(rule, case["LR_ssim84"])
        for part in ("skip", "guidance"):
            ours, golden = (np.array(getattr(r, part).coefficients) for r in (rule, theirs))
            checks.append(difference(f"classifier@{part}", ours, golden, 1e-6))
    return checks


def _continuation(
    sampler: Recorder,
    generation: Generation,
    late: Steps,
    name: str,
    run: dict[str, Any],
    arrays: dict[str, np.ndarray],
) -> list[Check]:
    """Runs the scales after the decision, compares every 16th row of their logits and the codes, and rewinds."""
    point = generation.scale
    for step in late:
        sampler.advance(generation, step)
    checks = []
    last = max(step.scale for step in generation.steps if not step.skipped)
    checks.append(mismatches(f"last scale@{name}", np.array(last), np.array(run["last_scale_index"])))
    for scale in range(last + 1):
        if f"{name}_logits_s{scale}" in arrays:
            ours = sampler.logits[scale][:, ::16]
            checks.append(difference(f"logits@{name} s{scale}", ours, arrays[f"{name}_logits_s{scale}"], 1e-4))
    if f"{name}_summed_codes" in arrays:
        golden = arrays[f"{name}_summed_codes"].reshape(generation.code_sum_BdHW.shape)
        checks.append(difference(f"summed_codes@{name}", generation.code_sum_BdHW, golden, 1e-5))
    sampler.rewind(generation, point)
    return checks
