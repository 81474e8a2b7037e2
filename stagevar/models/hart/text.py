"""Prompts to a language model's features for HART: Qwen2-VL-1.5B-Instruct, a disk cache, and a stand-in.

A prompt becomes 300 feature rows, padding included, and the place of each row among the prompt's own tokens, which the
transformer's rotary tables read. The language model reads an instruction before the prompt, of which no row is kept.

Source: mit-han-lab/hart, hart/utils/tools.py `encode_prompts` and sample.py (facts); the instruction is data with a source of
its own. Differs in that prompts are encoded a few at a time and kept on disk.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.errors import WeightsError, reason_of
from stagevar.models.hub import HubFile
from stagevar.models.text_encoder import LazyEncoder

#: Rows of every prompt, padding included.
TEXT_LENGTH = 300
#: Prompts encoded at once.
_BATCH = 8


@dataclass(frozen=True)
class HARTText:
    """Features of one prompt: features_TD, and place_T, the number of its own tokens up to each row less one."""

    features_TD: Tensor
    place_T: Tensor


@cache
def instruction() -> str:
    """What the language model reads before every prompt."""
    file = importlib.resources.files("stagevar") / "data" / "hart_instruction.json"
    return json.loads(file.read_text(encoding="utf-8"))["text"]


class QwenText(LazyEncoder):
    """HART's text encoder. Nothing is loaded until a prompt is encoded that is not cached.

    Its weights are float16 on a GPU, as in the reference, and float32 elsewhere.

    Args:
        source: hub repository, or a local folder with tokenizer and weights of the language model.
        device: where it runs; features are returned on the CPU.
        length: rows of every prompt.
        cache_folder: used instead of the user's cache.

    Raises:
        WeightsError: on use, or at once for a local folder, if transformers is missing or the encoder is unavailable.
    """

    loaded_files = ("*.safetensors", "pytorch_model*.bin", "*.json", "merges.txt")

    def __init__(
        self,
        source: HubFile | Path | str,
        *,
        device: torch.device | str = "cpu",
        length: int = TEXT_LENGTH,
        cache_folder: Path | None = None,
    ):
        super().__init__(source, device, cache_folder)
        self.length = length
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        if isinstance(self.source, Path) and not (self.source / "config.json").is_file():
            raise WeightsError(
                f"no text encoder at {self.source}: the folder needs config.json, tokenizer and weights of a language model"
            )

    def _identity(self, known: dict[str, object]) -> list[object]:
        asked = hashlib.sha256(instruction().encode()).hexdigest()
        return ["qwen", known, str(self.dtype), self.length, asked]

    def encode(self, prompts: Sequence[str]) -> list[HARTText]:
        """Features, one per prompt, in order; a prompt that repeats is encoded once."""
        found = self._features(prompts, _BATCH)
        return [HARTText(found[prompt]["features"], found[prompt]["place"]) for prompt in prompts]

    @torch.inference_mode()
    def _run(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        tokenizer, model = self._load()
        limits = {"max_length": self.length, "truncation": True}
        for prompt in prompts:
            count = len(tokenizer(prompt, verbose=False)["input_ids"])
            if count > self.length:
                warnings.warn(f"prompt of {count} tokens is cut to {self.length}: {prompt[:40]!r}...", stacklevel=4)
        ids_BT = tokenizer(list(prompts), padding="max_length", return_tensors="pt", **limits)["input_ids"]
        real_BT = ids_BT != tokenizer.pad_token_id
        asked_1S = tokenizer([instruction()], return_tensors="pt", **limits)["input_ids"]
        asked_BS = asked_1S.expand(len(prompts), -1)
        hidden_BND = model(
            input_ids=torch.cat([asked_BS, ids_BT], dim=1).to(self.device),
            attention_mask=torch.cat([torch.ones_like(asked_BS), real_BT.long()], dim=1).to(self.device),
            use_cache=False,
        ).last_hidden_state
        place_BT = real_BT.cumsum(dim=1) - 1
        rows = zip(hidden_BND[:, asked_1S.shape[1] :].cpu(), place_BT, strict=True)
        return [{"features": features, "place": place} for features, place in rows]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            try:
                from transformers import AutoModel, AutoTokenizer
            except ImportError:
                raise WeightsError(
                    "the Qwen2 text encoder needs transformers: pip install 'stagevar-tune[infinity]'"
                ) from None
            name, options = str(self.source), dict[str, object](local_files_only=True)
            if isinstance(self.source, HubFile):
                name, options = self.source.repo, {"revision": self.source.revision}
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, **options)
                model = AutoModel.from_pretrained(name, dtype=self.dtype, **options)
            # transformers passes on its own, the hub's and the system's errors; all mean the same to the user.
            except Exception as error:
                reason = reason_of(error)
                raise WeightsError(
                    f"cannot load the text encoder {name} ({reason}); give a local folder, or --weights random"
                ) from None
            self._loaded = tokenizer, model.to(self.device).eval().requires_grad_(False)
        return self._loaded


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
