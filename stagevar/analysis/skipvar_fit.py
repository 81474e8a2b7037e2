"""Fits SkipVAR's classifiers to another model: which late scales can be skipped, or run without guidance, per image.

Every training prompt is run in full; at the decision point its two features are taken, and every continuation's image
is compared with the full one. The label is the largest number of scales that may be skipped (or, if none may, run on
the conditional branch alone) with the similarity still at the target. Skipped continuations cost nothing, because the
full run passes through their code sums; the others are forks of it.

Source: SkipVAR (arXiv 2506.08908): standardized features, multinomial logistic regression, labels by target SSIM; its
training code is not public, the rest is ours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stagevar import extras
from stagevar.accelerators.skipvar import LinearClassifier, SkipRule, look
from stagevar.errors import UsageError
from stagevar.files import check_output, write_text_atomically, writing
from stagevar.images import ssim
from stagevar.sampling.pixels import to_uint8
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import UNDECIDED_SCALES, skipvar

#: Prompts below which a fit means nothing.
LEAST_PROMPTS = 8

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fit:
    """A fitted rule and the evidence: features (N, 2) and labels (N,) per prompt; guidance labels where skip is 0."""

    rule: SkipRule
    target: float
    features_N2: np.ndarray
    skip_N: np.ndarray
    guidance_N: np.ndarray

    def to_dict(self) -> dict[str, object]:
        """The rule with how it was fitted, as plain JSON data."""
        outcomes = self.rule.outcomes(self.features_N2)
        fit = {
            "target": self.target,
            "prompts": len(self.skip_N),
            "skip_labels": np.bincount(self.skip_N, minlength=UNDECIDED_SCALES + 1).tolist(),
            "guidance_labels": np.bincount(self.guidance_N[self.skip_N == 0], minlength=UNDECIDED_SCALES + 1).tolist(),
            "skip_accuracy": float(np.mean(self.rule.skip.predict(self.features_N2) == self.skip_N)),
            "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        }
        return {**self.rule.to_dict(), "fit": fit}

    def save(self, path: Path) -> None:
        """Writes the JSON file that a schedule's `decision` may name."""
        check_file(path)
        with writing(path):
            write_text_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")


def check_file(path: Path) -> None:
    """Raises UsageError for a path that a classifier cannot be written to, or that a schedule could not name."""
    if path.suffix != ".json":
        raise UsageError(f"classifier file {path!s:.200} must end in .json, so that a schedule can name it")
    check_output(path, "classifier file")


def check_fitting(prompts: int, random_weights: bool) -> None:
    """Raises UsageError if no classifier can be fitted: random weights, too few prompts, or no scikit-learn."""
    if random_weights:
        raise UsageError("a skip classifier cannot be fitted on random weights: their images mean nothing")
    if prompts < LEAST_PROMPTS:
        raise UsageError(f"{prompts} prompts are too few to fit on; give at least {LEAST_PROMPTS}")
    extras.require("fitting a skip classifier", "sklearn")


def refit(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    target: float = 0.84,
    *,
    name: str = "refitted",
    image_scale: int | None = None,
    batch: int = 4,
    similarity: Similarity = ssim,
) -> Fit:
    """Fits both classifiers on the sampler's model.

    Args:
        prompts, seeds: one generation each; a useful fit takes hundreds.
        target: similarity to the full schedule's image that a continuation must keep.
        image_scale: scale at whose grid the partial images are decoded (default: the reference's, 4).
        similarity: images and references, uint8 (B, H, W, 3), to (B,).

    Raises:
        UsageError: on random weights, with too few prompts, or without scikit-learn.
    """
    model = sampler.model
    check_fitting(len(prompts), model.random_weights)
    if len(prompts) != len(seeds):
        raise UsageError(f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed per prompt")
    image_scale = min(4, len(model.grids) - 1) if image_scale is None else image_scale
    parts = [
        _observe(sampler, prompts[i : i + batch], seeds[i : i + batch], target, image_scale, similarity)
        for i in range(0, len(prompts), batch)
    ]
    features_N2, skip_N, guidance_N = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    unskipped = skip_N == 0
    rule = SkipRule(
        name,
        model.name,
        len(model.grids),
        image_scale,
        _fit(features_N2, skip_N),
        _fit(features_N2[unskipped], guidance_N[unskipped]) if unskipped.any() else None,
    )
    return Fit(rule, target, features_N2, skip_N, guidance_N)


@torch.inference_mode()
def _observe(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    target: float,
    image_scale: int,
    similarity: Similarity,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (B, 2), largest harmless skip (B,) and largest harmless unguided tail (B,) of one batch."""
    model, grids = sampler.model, sampler.model.grids
    steps = skipvar(grids).expand(grids, sampler.chunks)
    decision = next(step.decision for step in steps if step.decision is not None)
    late = decision.continuation("full")
    point = late[0].scale
    generation = sampler.begin(prompts, seeds)
    for step in steps:
        sampler.advance(generation, dataclasses.replace(step, decision=None))
    features = look(model, generation.code_sum_before(point - 1), generation.code_sum_before(point), image_scale)
    full = sampler.decode(generation)

    def similar_enough(images: np.ndarray) -> np.ndarray:
        return similarity(images, full) >= target

    skip, guidance = np.zeros(len(prompts), dtype=np.int64), np.zeros(len(prompts), dtype=np.int64)
    for count in range(1, UNDECIDED_SCALES + 1):
        skipped = to_uint8(model.tokenizer.decode(generation.code_sum_before(len(grids) - count)))
        skip[similar_enough(skipped)] = count
    for count in range(1, UNDECIDED_SCALES + 1):
        sampler.rewind(generation, len(grids) - count)
        for step in decision.continuation(f"cond{count}")[-count:]:
            sampler.advance(generation, step)
        guidance[similar_enough(sampler.decode(generation))] = count
    return features, skip, guidance


def _fit(features_NF: np.ndarray, labels_N: np.ndarray) -> LinearClassifier:
    """Standardized logistic regression; a single class is always predicted."""
    extras.require("fitting a skip classifier", "sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features_NF)
    mean, scale = tuple(scaler.mean_.tolist()), tuple(scaler.scale_.tolist())
    classes = np.unique(labels_N)
    if len(classes) == 1:
        return LinearClassifier(mean, scale, (int(classes[0]),), ((0.0,) * len(mean),), (0.0,))
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(features_NF), labels_N)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(classes) == 2:  # one row says how far the second class is ahead of the first
        coefficients, intercepts = np.stack([0 * coefficients[0], coefficients[0]]), np.array([0.0, intercepts[0]])
    rows = tuple(tuple(row) for row in coefficients.tolist())
    return LinearClassifier(mean, scale, tuple(classes.tolist()), rows, tuple(intercepts.tolist()))
