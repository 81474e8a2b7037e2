"""Metrics by name, built only when asked for, and the weighted sum that a search maximizes."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stagevar import extras, plugins
from stagevar.errors import UsageError, hint
from stagevar.sections import shown
from tuner.metrics.base import Metric, Prompt
from tuner.metrics.declarations import DECLARATIONS, Declaration
from tuner.metrics.quality_spec import QualitySpec

# name -> (module, class). Modules are imported on use: torch takes seconds, open_clip fifteen.
CLASSES: dict[str, tuple[str, str]] = {
    "clip_score": ("tuner.metrics.clip", "ClipScore"),
    "clip_image_similarity": ("tuner.metrics.clip", "ClipImageSimilarity"),
    "hpsv2": ("tuner.metrics.clip", "HumanPreferenceScore"),
    "image_reward": ("tuner.metrics.preferences", "ImageReward"),
    "pickscore": ("tuner.metrics.preferences", "PickScore"),
    "hpsv3": ("tuner.metrics.hpsv3", "HpsV3"),
    "geneval": ("tuner.metrics.geneval", "GenEval"),
    "geneval_nano": ("tuner.metrics.geneval_nano", "NanoGenEval"),
    "geneval2": ("tuner.metrics.vlm", "GenEval2"),
    "dpg": ("tuner.metrics.vqa", "DpgBench"),
    "psnr": ("tuner.metrics.pixels", "Psnr"),
    "ssim": ("tuner.metrics.pixels", "Ssim"),
    "lpips": ("tuner.metrics.perceptual", "Lpips"),
    "dists": ("tuner.metrics.perceptual", "Dists"),
    "dino": ("tuner.metrics.perceptual", "DinoSimilarity"),
    "fid": ("tuner.metrics.distribution", "Fid"),
    "kid": ("tuner.metrics.distribution", "Kid"),
    "is": ("tuner.metrics.distribution", "InceptionScore"),
    "fid_dinov2": ("tuner.metrics.distribution", "FidDinov2"),
    "cmmd": ("tuner.metrics.distribution", "Cmmd"),
}
#: The built-in metrics; `metric_names` includes those of plug-ins.
METRIC_NAMES: tuple[str, ...] = tuple(CLASSES)
#: Entry-point group in which packages offer metric classes.
METRICS = "stagevar.metrics"
#: Kinds of options that a file or command line can give, by their annotation.
_PLAIN = {"str": str, "int": int, "float": float, "bool": bool, "None": type(None)}
_KIND_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}
#: Packages beyond the base installation that metrics import, by import names.
PACKAGES: dict[str, tuple[str, ...]] = {
    "clip_score": ("open_clip",),
    "clip_image_similarity": ("open_clip",),
    "hpsv2": ("open_clip",),
    "image_reward": ("transformers", "torchvision"),
    "pickscore": ("transformers",),
    "hpsv3": ("transformers",),
    "geneval": ("transformers", "open_clip"),
    "geneval_nano": ("scipy",),
    "geneval2": ("transformers",),
    "dpg": ("transformers",),
    "psnr": ("torchmetrics",),
    "ssim": ("torchmetrics",),
    "lpips": ("lpips", "torchmetrics", "torchvision"),
    "dists": ("torchmetrics", "torchvision"),
    "dino": ("transformers", "torchmetrics", "torchvision"),
    "fid": ("torchmetrics", "torch_fidelity"),
    "kid": ("torchmetrics", "torch_fidelity"),
    "is": ("torchmetrics", "torch_fidelity"),
    "fid_dinov2": ("torchmetrics", "transformers", "torchvision"),
    "cmmd": ("open_clip",),
}


def metric_names() -> tuple[str, ...]:
    """The names of all metrics, the built-in ones first, then plug-ins; imports none of them."""
    return (*CLASSES, *plugins.offered(METRICS, CLASSES))


def declaration_of(name: str) -> Declaration:
    """What a metric measures; imports a plug-in's module. Raises UsageError as `metric_class` does."""
    if name in DECLARATIONS:
        return DECLARATIONS[name]
    declaration = metric_class(name).declaration
    assert declaration is not None  # checked as the plug-in was loaded
    return declaration


def check_name(name: str) -> None:
    """Raises UsageError with the nearest name unless there is such a metric; imports nothing."""
    if name not in CLASSES and plugins.find(METRICS, name, CLASSES) is None:
        raise UsageError(f"unknown metric {name!r}{hint(name, metric_names())}")


def packages_of(name: str) -> tuple[str, ...]:
    """Packages beyond the base installation that a built-in metric needs, by import names."""
    return PACKAGES.get(name, ())


def missing_packages(name: str) -> list[str]:
    """Packages that a metric needs and that are not installed; imports nothing."""
    return [package for package in packages_of(name) if not extras.is_installed(package)]


def check_packages(name: str) -> None:
    """Raises UsageError with the install command if a metric needs packages that are missing."""
    missing = missing_packages(name)
    if missing:
        needed = dict.fromkeys(extra for package in missing if (extra := _extra_of_metric(package)))
        command = extras.install_command(",".join(needed))
        raise extras.MissingExtra(f"metric {name} needs {' and '.join(missing)}: {command}")


def _extra_of_metric(package: str) -> str | None:
    """The extra that provides a metric's package: [metrics] includes all that metrics share with model families."""
    extra = extras.extra_of(package)
    return "metrics" if extra == "infinity" else extra


def metric_class(name: str) -> type[Metric]:
    """The class behind a name.

    Raises UsageError naming the nearest name, a missing package, or the plug-in that cannot be used.
    """
    check_name(name)
    check_packages(name)
    if name in CLASSES:
        module, class_name = CLASSES[name]
        return getattr(importlib.import_module(module), class_name)
    plugin = plugins.find(METRICS, name, CLASSES)
    assert plugin is not None  # check_name saw it
    return _plugged(plugin)


def _plugged(plugin: plugins.Plugin) -> type[Metric]:
    """The class that a package offers. Raises PluginError unless it is a metric of that name with a declaration."""
    cls = plugin.load()
    if not (inspect.isclass(cls) and issubclass(cls, Metric)) or inspect.isabstract(cls):
        raise plugin.wrong("must be a class that inherits tuner.metrics.base.Metric and computes its values")
    if getattr(cls, "name", None) != plugin.name:
        raise plugin.wrong(f"is named {getattr(cls, 'name', None)!r}; both names must be the same")
    if not isinstance(cls.declaration, Declaration):
        raise plugin.wrong(
            "needs a `declaration`: tuner.metrics.declarations.Declaration(kind, unit, change, max_drop)"
        )
    if cls.declaration.higher_is_better != cls.higher_is_better:
        raise plugin.wrong("gives one direction in `higher_is_better` and the opposite in its `declaration`")
    if "device" not in inspect.signature(cls).parameters:
        raise plugin.wrong("must take the keyword argument `device`")
    return cls


def create(name: str, *, device: str = "cpu", **options: Any) -> Metric:
    """Builds a metric with its models loaded on `device`.

    `options` are the keyword arguments of its class (docs/metrics.md lists them). Raises UsageError for an unknown name
    or option, or an unavailable model.
    """
    check_options(name, options)
    build: Callable[..., Metric] = metric_class(name)
    return build(device=device, **options)


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Raises UsageError for an option that a metric does not have, or a value that does not fit the option's annotation.

    Counts must be at least 1; objects that Python callers pass (a detector, a classifier) are accepted. Imports the metric's
    module, builds nothing.
    """
    parameters = inspect.signature(metric_class(name).__init__).parameters
    known = [parameter for parameter in parameters if parameter not in ("self", "device")]
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"metric {name} has no option {option!r:.60}; its options: {', '.join(known) or 'none'}")
        kinds = [_PLAIN.get(word.strip()) for word in str(parameters[option].annotation).split("|")]
        if None in kinds and not (value is None or isinstance(value, str | int | float | list | Mapping)):
            continue
        plain = [kind for kind in kinds if kind is not None]
        fits = any(isinstance(value, kind) or (kind is float and isinstance(value, int)) for kind in plain)
        if plain and (not fits or (isinstance(value, bool) and bool not in plain)):
            wanted = " or ".join(_KIND_NAMES[kind] for kind in plain)
            raise UsageError(f"metric {name}: option {option} is {shown(value)}, expected {wanted}")
        if int in plain and option != "seed" and isinstance(value, int) and value < 1:
            raise UsageError(f"metric {name}: option {option} is {shown(value)}, expected at least 1")
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise UsageError(f"metric {name}: option {option} is {shown(value)}, expected a non-empty text")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"metric {name}: option {option} is {shown(value)}, expected a finite number")


class CompositeQuality(Metric):
    """Weighted sum of metrics, higher is better: a metric for which lower is better enters with a minus sign."""

    name = "quality"

    def __init__(self, parts: Mapping[str, tuple[float, Metric]]) -> None:
        if not parts:
            raise UsageError("the quality has no metrics: name at least one, such as {geneval: 1.0}")
        self.parts = dict(parts)
        # Set per instance, since it follows from the parts.
        self.needs_reference = any(metric.needs_reference for _, metric in parts.values())  # type: ignore[misc]
        self.needs_prompt = any(metric.needs_prompt for _, metric in parts.values())  # type: ignore[misc]

    def score_parts(
        self,
        images_uint8_BHW3: np.ndarray,
        prompts: Sequence[Prompt],
        reference_images_uint8_BHW3: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Values (B,) of every metric by name, unweighted."""
        return {
            name: metric.score(images_uint8_BHW3, prompts, reference_images_uint8_BHW3)
            for name, (_, metric) in self.parts.items()
        }

    def combine(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum (B,) of values by name."""
        return np.asarray(
            sum(
                weight * (1.0 if metric.higher_is_better else -1.0) * np.asarray(values[name], dtype=np.float64)
                for name, (weight, metric) in self.parts.items()
            )
        )

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        return self.combine(self.score_parts(images_uint8_BHW3, prompts, reference_images_uint8_BHW3))

    def describe(self) -> dict[str, object]:
        return {name: {"weight": weight, **metric.describe()} for name, (weight, metric) in self.parts.items()}


def create_composite(quality: Mapping[str, QualitySpec], *, device: str = "cpu") -> CompositeQuality:
    """The composite of metrics by name.

    A metric of weight 0 is computed but not added; the first must have a weight. Raises UsageError for a weight that is
    negative or not finite, a first weight of 0, and anything that `create` rejects.
    """
    parts: dict[str, tuple[float, Metric]] = {}
    for name, spec in quality.items():
        if not 0 <= spec.weight < float("inf") or (spec.weight == 0 and not parts):
            least = "of at least 0" if parts else "above 0"
            raise UsageError(f"quality weight of {name} is {spec.weight!r}: expected a number {least}")
        try:
            parts[name] = (spec.weight, create(name, device=device, **spec.options))
        except UsageError as error:
            others = ", ".join(other for other in quality if other != name)
            rest = f"; fix this, or remove it from the quality, which leaves {others}" if others else ""
            raise type(error)(f"metric {name}: {error}{rest}") from None
    return CompositeQuality(parts)
