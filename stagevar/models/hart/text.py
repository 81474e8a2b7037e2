"""Prompts to a language model's features for HART: Qwen2-VL-1.5B-Instruct, a disk cache, and a stand-in.

A prompt becomes 300 feature rows, padding included, and the place of each row in the sequence of real tokens, which the
transformer's rotary tables read. The model is shown an instruction before the prompt, of which no row is kept.

Source: mit-han-lab/hart, hart/utils/tools.py `encode_prompts`, hart/utils/constants.py and sample.py (facts; the instruction
is the text that the released weights were used with).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Rows of every prompt, padding included.
TEXT_LENGTH = 300


@dataclass(frozen=True)
class HARTText:
    """Features of one prompt: features_TD, and place_T, the number of real tokens up to each row less one."""

    features_TD: Tensor
    place_T: Tensor


class RandomLanguageText:
    """Deterministic made-up features, padded on the left as the language model's, for `--weights random`; no meaning."""

    def __init__(self, dim: int, length: int = TEXT_LENGTH):
        self.dim, self.length = dim, length

    def encode(self, prompts: Sequence[str]) -> list[HARTText]:
        """Features of every prompt: about four tokens per three words."""
        return [self._features(prompt) for prompt in prompts]

    def _features(self, prompt: str) -> HARTText:
        real = min(len(prompt.split()) * 4 // 3 + 1, self.length)
        generator = np.random.default_rng(zlib.crc32(prompt.encode()))
        rows = torch.from_numpy(generator.standard_normal((self.length, self.dim), dtype=np.float32))
        return HARTText(rows, torch.arange(real - self.length, real).clamp_min(-1))
