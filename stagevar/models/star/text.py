"""Prompts to CLIP features for STAR: the text model of Stable Diffusion 2.1, a disk cache, and a stand-in.

A prompt becomes 77 feature rows (padded, with a mask), their pooled row, and the pooled row of the empty prompt, which
is all that STAR's unconditional branch reads.

Source: Davinci-XLab/STAR-T2I, models/text_encoder.py and sample.py (facts).
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagevar.errors import WeightsError, reason_of
from stagevar.folders import visible
from stagevar.models.hub import HubFile, fetch
from stagevar.models.text_encoder import LazyEncoder

#: Text rows of every prompt, padding included.
TEXT_LENGTH = 77


@dataclass(frozen=True)
class PromptText:
    """Text features of one prompt: features_TD, mask_T (1 where real), pooled_D, and the empty prompt's pooled_D."""

    features_TD: Tensor
    mask_T: Tensor
    pooled_D: Tensor
    null_pooled_D: Tensor


class ClipText(LazyEncoder):
    """STAR's text encoder. Nothing is loaded until a prompt is encoded that is not cached.

    Args:
        source: hub folder, or a local one, with the subfolders `tokenizer` and `text_encoder` of Stable Diffusion 2.1.
        device: where CLIP runs, in float32; features are returned on the CPU.
        cache_folder: used instead of the user's cache.

    Raises:
        WeightsError: on use, or at once for a local folder, if transformers is missing or the encoder is unavailable.
    """

    def __init__(
        self, source: HubFile | Path | str, *, device: torch.device | str = "cpu", cache_folder: Path | None = None
    ):
        super().__init__(source, device, cache_folder)
        if isinstance(self.source, Path):
            for part in ("tokenizer", "text_encoder"):
                if not (self.source / part).is_dir():
                    raise WeightsError(
                        f"no CLIP text encoder at {self.source}: the folder needs {part}/ as in Stable Diffusion 2.1"
                    )

    def _files(self, folder: Path) -> list[Path]:
        return [path for path in visible((folder / "text_encoder").iterdir()) if path.is_file()]

    def _identity(self, known: dict[str, object]) -> list[object]:
        return ["clip", known]

    def encode(self, prompts: Sequence[str]) -> list[PromptText]:
        """Features, one per prompt, in order; a prompt that repeats is encoded once."""
        found = self._features(["", *prompts], 32)
        null = found[""]["pooled"]
        return [PromptText(found[p]["features"], found[p]["mask"], found[p]["pooled"], null) for p in prompts]

    @torch.inference_mode()
    def _run(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        tokenizer, model = self._load()
        for prompt in prompts:
            count = len(tokenizer(prompt, verbose=False)["input_ids"])
            if count > TEXT_LENGTH:
                warnings.warn(f"prompt of {count} tokens is cut to {TEXT_LENGTH}: {prompt[:40]!r}...", stacklevel=4)
        batch = tokenizer(
            list(prompts), max_length=TEXT_LENGTH, truncation=True, padding="max_length", return_tensors="pt"
        ).to(self.device)
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        parts = (out.last_hidden_state.float().cpu(), batch["attention_mask"].cpu(), out.pooler_output.float().cpu())
        return [
            {"features": features, "mask": mask, "pooled": pooled}
            for features, mask, pooled in zip(*parts, strict=True)
        ]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            try:
                from transformers import CLIPTextModel, CLIPTokenizer
            except ImportError:
                raise WeightsError(
                    "the CLIP text encoder needs transformers: pip install 'stagevar-tune[infinity]'"
                ) from None
            folder = fetch(self.source)[0] if isinstance(self.source, HubFile) else self.source
            try:
                tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
                model: Any = CLIPTextModel.from_pretrained(
                    folder / "text_encoder", dtype=torch.float32, local_files_only=True
                )
            # transformers passes on its own and the system's errors; all mean the same to the user.
            except Exception as error:
                reason = reason_of(error)
                raise WeightsError(
                    f"cannot load the text encoder {self.source} ({reason}); give a local folder, or --weights random"
                ) from None
            self._loaded = tokenizer, model.to(self.device).eval().requires_grad_(False)
        return self._loaded


class RandomClipText:
    """Deterministic made-up features with CLIP-like lengths, for `--weights random`: no encoder, no meaning."""

    def __init__(self, dim: int, length: int = TEXT_LENGTH):
        self.dim, self.length = dim, length

    def encode(self, prompts: Sequence[str]) -> list[PromptText]:
        """Features of every prompt: about four tokens per three words, plus start and end."""
        null = self._noise("", 1)[0]
        return [self._features(prompt, null) for prompt in prompts]

    def _features(self, prompt: str, null_pooled_D: Tensor) -> PromptText:
        real = min(len(prompt.split()) * 4 // 3 + 2, self.length)
        rows = self._noise(prompt, 1 + self.length)
        mask_T = (torch.arange(self.length) < real).long()
        return PromptText(rows[1:], mask_T, rows[0], null_pooled_D)

    def _noise(self, prompt: str, rows: int) -> Tensor:
        noise = np.random.default_rng(zlib.crc32(prompt.encode())).standard_normal((rows, self.dim), dtype=np.float32)
        return torch.from_numpy(noise)
