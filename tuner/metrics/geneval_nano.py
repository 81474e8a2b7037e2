"""GenEval's verdict on nano's scenes, with nano's pixel checker as detector: exact rules, no model needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from stagevar.models.nano.checker import detect
from stagevar.prompts.geneval import judge
from tuner.metrics.base import BenchmarkMetric, Prompt
from tuner.metrics.detections import geneval_metadata, geneval_summary


class NanoGenEval(BenchmarkMetric):
    """1 if the image shows what the prompt's metadata asks for, else 0."""

    name: ClassVar[str] = "geneval_nano"

    def __init__(self, *, device: str = "cpu") -> None:
        """`device` is part of the interface; the checker runs on the CPU."""

    def _rows(self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt]) -> list[dict[str, object]]:
        rows = []
        for image_uint8_HW3, prompt in zip(images_uint8_BHW3, prompts, strict=True):
            found = detect(image_uint8_HW3.transpose(2, 0, 1).astype(np.float32) / 255.0)
            verdict = judge(geneval_metadata(self.name, prompt), found)
            rows.append({"value": float(verdict.correct), "reason": verdict.reason})
        return rows

    def summary(self, rows: Sequence[Mapping[str, object]], prompts: Sequence[Prompt]) -> dict[str, object]:
        return geneval_summary(rows, prompts)
