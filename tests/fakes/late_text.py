"""A text encoder that is loaded when it is needed, with made-up features: no files, no transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stagevar.models.infinity.text import RandomText
from stagevar.models.text_encoder import LazyEncoder


class LateText(LazyEncoder):
    """`RandomText` behind the caches of real encoders; `encoded` lists what was not cached."""

    def __init__(self, dim: int, cache_folder: Path):
        super().__init__(cache_folder, "cpu", cache_folder)
        self.dim = dim
        self.encoded: list[str] = []

    def _identity(self, known: dict[str, object]) -> list[object]:
        return ["late", self.dim]

    def _load(self) -> tuple[Any, Any]:
        self._loaded = self._loaded or (None, RandomText(self.dim))
        return self._loaded

    def _run(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        self.encoded += prompts
        return [{"features": rows} for rows in self._load()[1].encode(prompts)]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        found = self._features(prompts, 16)
        return [found[prompt]["features"] for prompt in prompts]
