"""What a metric is: one value per image, in batches; set metrics also give one value for a whole set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, TypeAlias

import numpy as np

from stagevar.errors import UsageError
from tuner.metrics.declarations import Declaration

#: A JSON object: what a metric says about one image, about many, or about itself.
Facts: TypeAlias = dict[str, object]
Prompt = str | Mapping[str, object]  # a caption, or GenEval metadata with its caption under "prompt"


class Metric(ABC):
    """Scores images one by one.

    Attributes:
        name: in the registry and in YAML.
        higher_is_better: direction.
        needs_reference: whether `score` compares with the full schedule's image of the same prompt and seed.
        needs_prompt: whether it reads the prompts.
        declaration: for metrics of other packages; the built-in ones have a row in tuner.metrics.declarations.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False
    declaration: ClassVar[Declaration | None] = None

    def score(
        self,
        images_uint8_BHW3: np.ndarray,
        prompts: Sequence[Prompt],
        reference_images_uint8_BHW3: np.ndarray | None = None,
    ) -> np.ndarray:
        """Values (B,) float64, one per image. Raises UsageError if shapes, prompts or references do not fit."""
        self.check(images_uint8_BHW3, prompts, reference_images_uint8_BHW3)
        if len(images_uint8_BHW3) == 0:
            return np.zeros(0)
        values_B = np.asarray(self._score(images_uint8_BHW3, prompts, reference_images_uint8_BHW3), dtype=np.float64)
        if values_B.shape != (len(images_uint8_BHW3),):
            raise AssertionError(f"{self.name} returned {values_B.shape} for {len(images_uint8_BHW3)} images")
        return values_B

    def check(
        self,
        images_uint8_BHW3: np.ndarray,
        prompts: Sequence[Prompt],
        reference_images_uint8_BHW3: np.ndarray | None = None,
    ) -> None:
        """Raises UsageError if shapes, prompts or references do not fit."""
        check_images(self.name, images_uint8_BHW3)
        if len(prompts) != len(images_uint8_BHW3):
            raise UsageError(f"{self.name}: {len(images_uint8_BHW3)} images but {len(prompts)} prompts")
        if self.needs_reference:
            if reference_images_uint8_BHW3 is None:
                raise UsageError(f"{self.name} compares with reference images: pass them (--reference)")
            check_images(self.name, reference_images_uint8_BHW3)
            if reference_images_uint8_BHW3.shape != images_uint8_BHW3.shape:
                raise UsageError(
                    f"{self.name}: images are {images_uint8_BHW3.shape}, references "
                    f"{reference_images_uint8_BHW3.shape}; sizes must agree"
                )

    @abstractmethod
    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        """As `score`, with inputs already checked and B >= 1."""

    def rows(
        self,
        images_uint8_BHW3: np.ndarray,
        prompts: Sequence[Prompt],
        reference_images_uint8_BHW3: np.ndarray | None = None,
    ) -> list[Facts]:
        """Like `score`, but one JSON object per image with its "value" and whatever else `summary` needs."""
        return [
            {"value": float(value)} for value in self.score(images_uint8_BHW3, prompts, reference_images_uint8_BHW3)
        ]

    def summary(self, rows: Sequence[Mapping[str, object]], prompts: Sequence[Prompt]) -> Facts:
        """The published figure of many images from their rows, in the benchmark's own arithmetic. JSON values only."""
        values = [value_of(row) for row in rows]
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}

    def remarks(self, prompts: Sequence[Prompt]) -> list[str]:
        """What a reader of the figures for these prompts must know, such as that texts were truncated; a sentence each."""
        return []

    def describe(self) -> Facts:
        """What makes the figure reproducible: model names, file hashes, rules. JSON values only."""
        return {"name": self.name}


def needed(reference_images_uint8_BHW3: np.ndarray | None) -> np.ndarray:
    """The reference images of a metric that needs them; `Metric.check` has made sure that they are there."""
    assert reference_images_uint8_BHW3 is not None
    return reference_images_uint8_BHW3


class BenchmarkMetric(Metric):
    """A metric that keeps more than one value per image: reasons, detections, answers."""

    needs_prompt: ClassVar[bool] = True

    @abstractmethod
    def _rows(self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt]) -> list[Facts]:
        """As `rows`, with inputs already checked."""

    def rows(
        self,
        images_uint8_BHW3: np.ndarray,
        prompts: Sequence[Prompt],
        reference_images_uint8_BHW3: np.ndarray | None = None,
    ) -> list[Facts]:
        self.check(images_uint8_BHW3, prompts, reference_images_uint8_BHW3)
        return self._rows(images_uint8_BHW3, prompts)

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        return np.array([value_of(row) for row in self._rows(images_uint8_BHW3, prompts)], dtype=np.float64)


def value_of(row: Mapping[str, object]) -> float:
    """The value of an image's row."""
    value = row["value"]
    assert isinstance(value, int | float)
    return float(value)


class SetMetric(Metric):
    """A metric of a whole set (FID, KID, IS, CMMD).

    `score_set` is the figure to publish. `score` splits the value of the given images into one contribution per image, with
    a mean that estimates it, so that a set metric can serve as an objective; each class says how.
    """

    @abstractmethod
    def score_set(self, batches: Iterable[np.ndarray], reference_batches: Iterable[np.ndarray] | None = None) -> float:
        """Value of the set, streamed in batches (B, H, W, 3) uint8."""

    def score_pairs(
        self, batches: Iterable[np.ndarray], reference_batches: Iterable[np.ndarray]
    ) -> tuple[float, float, float] | None:
        """`score_set` and its 95 % interval over pairs of image and reference, in the same order.

        None if the metric has no interval; the batches are then left unread.
        """
        return None


def prompt_text(prompt: Prompt) -> str:
    """The caption of a prompt. Raises UsageError if its metadata has none."""
    if isinstance(prompt, str):
        return prompt
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else None
    if not isinstance(text, str):
        raise UsageError(f"prompt {prompt!r:.80} has no text under 'prompt'")
    return text


def check_images(name: str, images: np.ndarray) -> None:
    """Raises UsageError unless `images` is uint8 (B, H, W, 3)."""
    shape = getattr(images, "shape", None)
    if getattr(images, "dtype", None) != np.uint8 or shape is None or len(shape) != 4 or shape[3] != 3:
        kind = getattr(images, "dtype", type(images).__name__)
        raise UsageError(f"{name}: images are {kind} {shape}, expected uint8 (B, H, W, 3)")
