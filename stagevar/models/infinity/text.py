"""Prompts to text features for the Infinity family: the flan-t5-xl encoder and a stand-in.

Features are ragged: one (tokens, 2048) float32 tensor per prompt, the end-of-sentence token included, no padding rows.

Source: FoundationVision/Infinity tools/run_infinity.py `encode_prompt` and `load_tokenizer` (facts). Differs in that a
batch is padded to its longest prompt instead of 512 tokens (masked, hence the same features), and longer prompts warn.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.errors import WeightsError, reason_of
from stagevar.models.hub import HubFile
from stagevar.models.text_encoder import LazyEncoder


class T5Text(LazyEncoder):
    """The text encoder of Infinity. Nothing is loaded until a prompt is encoded that is not cached.

    Args:
        source: hub repository, or a local folder with tokenizer and weights.
        device: where T5 runs; features are returned on the CPU.
        dtype: of T5's weights. Default float16 on a GPU as in the reference, float32 elsewhere.
        cache_folder: used instead of the user's cache.
        max_length: how many tokens of a prompt are kept.

    Raises:
        WeightsError: on use, if transformers is missing or the encoder is unavailable.
    """

    loaded_files = ("*.safetensors", "pytorch_model*.bin", "*.json", "spiece.model")

    def __init__(
        self,
        source: HubFile | Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cache_folder: Path | None = None,
        max_length: int = 512,
    ):
        super().__init__(source, device, cache_folder)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.max_length = max_length
        if isinstance(self.source, Path) and not (self.source / "config.json").is_file():
            raise WeightsError(f"no text encoder at {self.source}: the folder needs config.json, tokenizer and weights")

    def _identity(self, known: dict[str, object]) -> list[object]:
        return [known, str(self.dtype), self.max_length]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features [(tokens_i, dim)] float32, one per prompt, in order; a prompt that repeats is encoded once."""
        # Similar lengths together, so that little is padded.
        found = self._features(sorted(prompts, key=len), 16)
        return [found[prompt]["features"].float() for prompt in prompts]

    @torch.inference_mode()
    def _run(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        tokenizer, model = self._load()
        whole = tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > self.max_length:
                warnings.warn(
                    f"prompt of {len(ids)} tokens is cut to {self.max_length}: {prompt[:40]!r}...", stacklevel=4
                )
        batch = tokenizer(
            list(prompts), max_length=self.max_length, truncation=True, padding="longest", return_tensors="pt"
        ).to(self.device)
        hidden_BTD = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        lengths = batch["attention_mask"].sum(1).tolist()
        return [{"features": rows[:length].cpu()} for rows, length in zip(hidden_BTD, lengths, strict=True)]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError:
                raise WeightsError(
                    "the T5 text encoder needs transformers: pip install 'stagevar-tune[infinity]'"
                ) from None
            name, revision, here = str(self.source), "main", True
            if isinstance(self.source, HubFile):
                name, revision, here = self.source.repo, self.source.revision, False
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, legacy=True, revision=revision, local_files_only=here)
                model: Any = T5EncoderModel.from_pretrained(
                    name, dtype=self.dtype, revision=revision, local_files_only=here
                )
            # transformers passes on its own, the hub's and the system's errors; all mean the same to the user.
            except Exception as error:
                reason = reason_of(error)
                raise WeightsError(
                    f"cannot load the text encoder {name} ({reason}); give a local folder, or --weights random"
                ) from None
            self._loaded = tokenizer, model.to(self.device).eval().requires_grad_(False)
        return self._loaded


class RandomText:
    """Deterministic made-up features with T5-like lengths, for `--weights random`: no encoder, no meaning.

    Lengths follow T5's rate of about four tokens per three words, plus one for the end of the sentence.
    """

    def __init__(self, dim: int, max_length: int = 512):
        self.dim, self.max_length = dim, max_length

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features [(tokens_i, dim)] float32."""
        return [self._features(prompt) for prompt in prompts]

    def _features(self, prompt: str) -> Tensor:
        length = min(math.ceil(len(prompt.split()) * 4 / 3) + 1, self.max_length)
        noise = np.random.default_rng(zlib.crc32(prompt.encode())).standard_normal((length, self.dim), dtype=np.float32)
        return torch.from_numpy(noise * 0.3)
