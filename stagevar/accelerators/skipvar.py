"""SkipVAR: a look at the partial image decides per image whether to skip the last scales or to drop guidance there.

After the fourth to last scale the code sums before and after it are decoded at a small grid. Two numbers, how much the
edges changed and how much of the spectrum is high-frequency, go through a linear classifier: skip the last 0 to 3
scales; if that says 0, a second one says for how many last scales to run the conditional branch alone.

Source: SkipVAR (arXiv 2506.08908), fakerone-li/SkipVAR (facts; the published classifiers' numbers are in
data/skipvar_models.json). Differs: the decision point counts from the end of the schedule, rows of a batch regroup by
decision, and a classifier is refused on a model it was not fitted for. `stagevar.analysis.skipvar_fit` fits one for
another model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stagevar.accelerators.base import Accelerator, Cached, ScaleContext
from stagevar.errors import UsageError
from stagevar.models.base import Around, LoadedModel, Site, around_nothing
from stagevar.schedule import UNDECIDED_SCALES, Decision
from stagevar.text_files import read_json


@dataclass(frozen=True)
class LinearClassifier:
    """Standardized features through a linear layer; the class with the highest score wins.

    Attributes:
        mean, scale: (F,), of the features.
        classes: (K,).
        coefficients: (K, F).
        intercepts: (K,).
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    classes: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]
    intercepts: tuple[float, ...]

    def predict(self, features_BF: np.ndarray) -> np.ndarray:
        """Class per row (B,). Features beyond the fitted ones are ignored."""
        standard_BF = (features_BF[:, : len(self.mean)] - np.array(self.mean)) / np.array(self.scale)
        scores_BK = standard_BF @ np.array(self.coefficients).T + np.array(self.intercepts)
        return np.array(self.classes)[scores_BK.argmax(axis=1)]


@dataclass(frozen=True)
class SkipRule:
    """A fitted pair of classifiers, and the model that they hold for.

    Attributes:
        model: name of the model that they were fitted for.
        scales: number of scales of that model.
        image_scale: the scale at whose grid the partial images are decoded.
        skip: gives the number of last scales to skip.
        guidance: asked if `skip` gives 0; the number of last scales to run without the unconditional branch.
    """

    name: str
    model: str
    scales: int
    image_scale: int
    skip: LinearClassifier
    guidance: LinearClassifier | None

    def outcomes(self, features_BF: np.ndarray) -> list[str]:
        """Outcome names, one per row."""
        skips = self.skip.predict(features_BF)
        drops = np.zeros_like(skips) if self.guidance is None else self.guidance.predict(features_BF)
        names = []
        for skip, drop in zip(skips.tolist(), drops.tolist(), strict=True):
            names.append(f"skip{skip}" if skip else f"cond{drop}" if drop else "full")
        return names

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data without the name, as in data/skipvar_models.json."""
        data = {"model": self.model, "scales": self.scales, "image_scale": self.image_scale}
        for part, classifier in (("skip", self.skip), ("guidance", self.guidance)):
            data[part] = None if classifier is None else {key: _lists(value) for key, value in vars(classifier).items()}
        return data

    @classmethod
    def from_dict(cls, name: str, data: Any) -> SkipRule:
        """The inverse. Raises UsageError when something is missing or shapes do not match."""
        try:
            parts = {}
            for part in ("skip", "guidance"):
                stored = data[part]
                parts[part] = None if stored is None else LinearClassifier(**{k: _tuples(stored[k]) for k in _FIELDS})
            skip, guidance = parts["skip"], parts["guidance"]
            if skip is None:
                raise KeyError("skip")
            for classifier in (skip, guidance):
                if classifier is not None:
                    _check_shapes(classifier)
            return cls(name, str(data["model"]), int(data["scales"]), int(data["image_scale"]), skip, guidance)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"skip classifier {name!r} is malformed: {error}; refit it") from None


_FIELDS = ("mean", "scale", "classes", "coefficients", "intercepts")


def _check_shapes(classifier: LinearClassifier) -> None:
    features, classes = len(classifier.mean), len(classifier.classes)
    if not 1 <= features <= 2 or len(classifier.scale) != features or len(classifier.intercepts) != classes:
        raise ValueError("lengths of mean, scale, classes and intercepts do not match")
    if len(classifier.coefficients) != classes or any(len(row) != features for row in classifier.coefficients):
        raise ValueError("coefficients are not one row per class")
    if not classifier.classes or not set(classifier.classes) <= set(range(UNDECIDED_SCALES + 1)):
        raise ValueError(f"classes {classifier.classes} are not within 0 to {UNDECIDED_SCALES}")
    numbers = [*classifier.mean, *classifier.scale, *classifier.intercepts, *sum(classifier.coefficients, ())]
    if not all(math.isfinite(number) for number in numbers) or not all(scale > 0 for scale in classifier.scale):
        raise ValueError("numbers are not finite, or a scale is not positive")


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@cache
def packaged_rules() -> dict[str, dict[str, SkipRule]]:
    """The published classifiers and those of the shipped model: model -> name -> rule."""
    data = json.loads((files("stagevar") / "data" / "skipvar_models.json").read_text(encoding="utf-8"))
    return {
        model: {name: SkipRule.from_dict(name, {**entry, "model": model}) for name, entry in entries.items()}
        for model, entries in data["rules"].items()
    }


def load_rule(name: str, model: str, scales: int) -> SkipRule:
    """A model's packaged classifier by name, or the one in a JSON file that `stagevar.analysis.skipvar_fit` wrote.

    Raises:
        UsageError: for an unknown name, an unreadable file, or a classifier fitted for another model or number of
            scales.
    """
    if name.endswith(".json"):
        try:
            rule = SkipRule.from_dict(name, read_json(name, "skip classifier"))
        except ValueError as error:
            raise UsageError(f"skip classifier {name!r} cannot be read: {error}") from None
    else:
        named = [rules[name] for rules in packaged_rules().values() if name in rules]
        if not named:
            known = dict.fromkeys(known for rules in packaged_rules().values() for known in rules)
            raise UsageError(f"unknown skip classifier {name!r}; known: {', '.join(known)}, or a .json file")
        rule = packaged_rules().get(model, {}).get(name, named[0])
    if (rule.model, rule.scales) != (model, scales):
        raise UsageError(
            f"skip classifier {name!r} was fitted for {rule.model} with {rule.scales} scales, not for {model} with "
            f"{scales}; refit it"
        )
    return rule


# -------------------------------------------------------------------- features


def edge_strength(image_B3HW: Tensor) -> Tensor:
    """Sobel gradient magnitude of the channel mean (B, H, W); the border sees zeros outside."""
    grey_B1HW = image_B3HW.float().mean(dim=1, keepdim=True)
    kernel = grey_B1HW.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    gradient_B2HW = F.conv2d(grey_B1HW, torch.stack([kernel, kernel.T])[:, None], padding=1)
    return gradient_B2HW.square().sum(1).sqrt()


def edge_change(before_B3HW: Tensor, after_B3HW: Tensor) -> Tensor:
    """Mean absolute change of the edge strength (B,): "HF_Diff"."""
    return (edge_strength(after_B3HW) - edge_strength(before_B3HW)).abs().mean(dim=(1, 2))


def high_frequency_share(image_B3HW: Tensor) -> Tensor:
    """Share of the spectrum's amplitude further from the center than 0.4 of the half side (B,): "HF ratio"."""
    amplitude_BHW = torch.fft.fftshift(torch.fft.fft2(image_B3HW.float().mean(dim=1)), dim=(1, 2)).abs()
    height, width = amplitude_BHW.shape[1:]
    y = torch.arange(height, device=image_B3HW.device) - height // 2
    x = torch.arange(width, device=image_B3HW.device) - width // 2
    # Squared whole numbers, so that no rounding decides which side of the circle a frequency is on.
    outside_HW = y[:, None] ** 2 + x[None] ** 2 > int(0.4 * min(height, width) / 2) ** 2
    return (amplitude_BHW * outside_HW).sum(dim=(1, 2)) / (amplitude_BHW.sum(dim=(1, 2)) + 1e-6)


def partial_image(model: LoadedModel, code_sum_BdHW: Tensor, image_scale: int) -> Tensor:
    """The image of a code sum at the grid of a scale, (B, 3, h, w), clamped to [-1, 1]."""
    (height, width), (last_height, last_width) = model.grids[image_scale], model.grids[-1]
    size = (
        code_sum_BdHW.shape[-2] * height // last_height,
        code_sum_BdHW.shape[-1] * width // last_width,
    )
    small_Bdhw = F.interpolate(code_sum_BdHW, size=size, mode="bilinear", align_corners=False)
    return model.tokenizer.decode(small_Bdhw).clamp(-1, 1)


def look(model: LoadedModel, before_BdHW: Tensor, after_BdHW: Tensor, image_scale: int) -> np.ndarray:
    """Both features of every image of a batch (B, 2), float64, from the code sums around the decision's scale."""
    before_B3HW = partial_image(model, before_BdHW, image_scale)
    after_B3HW = partial_image(model, after_BdHW, image_scale)
    features_B2 = torch.stack([edge_change(before_B3HW, after_B3HW), high_frequency_share(after_B3HW)], dim=1)
    return features_B2.double().cpu().numpy()


class SkipVAR(Accelerator):
    """Takes the decision; tokens are left alone."""

    name = "skipvar"

    def around(self, context: ScaleContext, updates: dict[Site, Cached]) -> Around:
        if context.step.reduction is not None:
            raise ValueError(f"scale {context.step.scale} reduces tokens; SkipVAR does not")
        return around_nothing

    def check(self, model: LoadedModel, decision: Decision) -> None:
        """Raises UsageError if the classifier was fitted for another model or number of scales."""
        load_rule(decision.rule, model.name, len(model.grids))

    def decide(self, model: LoadedModel, decision: Decision, before_BdHW: Tensor, after_BdHW: Tensor) -> Sequence[str]:
        rule = load_rule(decision.rule, model.name, len(model.grids))
        return rule.outcomes(look(model, before_BdHW, after_BdHW, rule.image_scale))
