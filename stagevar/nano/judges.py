"""nano's own judges for stage analysis: the similarity of its CLIP's image tower, and the checker as a quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from stagevar.analysis import Quality, Similarity
from stagevar.errors import WeightsError
from stagevar.nano import checker, scenes
from stagevar.nano.clip import NanoClip, compacted


def clip_similarity(folder: Path) -> Similarity:
    """Cosine of image features, as in the paper's semantic curve. Raises WeightsError when the folder has no CLIP."""
    path = folder / "open_clip_model.safetensors"
    if not path.is_file():
        raise WeightsError(f"no {path.name} in {folder}; train it with `python -m stagevar.nano.train clip`")
    clip = NanoClip().eval()
    clip.load_state_dict(compacted(load_file(path)))

    @torch.inference_mode()
    def features(images_BHW3: np.ndarray) -> torch.Tensor:
        image = torch.from_numpy(np.ascontiguousarray(images_BHW3)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return clip.encode_image(image)

    def score(images: np.ndarray, finals: np.ndarray) -> np.ndarray:
        return (features(images) * features(finals)).sum(-1).double().numpy()

    return Similarity("clip", score, "semantic")


def geneval(prompts: Sequence[scenes.Metadata]) -> Quality:
    """Score 1 where the checker finds what the prompt of that text asks for, else 0."""
    by_text = {metadata["prompt"]: metadata for metadata in prompts}

    def score(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
        return checker.check_batch(pixels, [by_text[text] for text in texts]).astype(np.float64)

    return score
