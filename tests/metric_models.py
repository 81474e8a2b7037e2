"""Small models with random weights, saved in the layouts that the real loaders read. Their scores mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def clip_folder(folder: Path) -> str:
    """An open_clip `local-dir:` model."""
    import open_clip
    from safetensors.torch import save_file

    preprocess = {"size": 32, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**{key: CLIP_CONFIG[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})
    save_file({key: value.contiguous() for key, value in model.state_dict().items()},
              folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


class Lookup(nn.Module):
    """Features by number: image i, whose first two pixels spell i, has row i of a given table."""

    def __init__(self, table_ND: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(table_ND, dtype=torch.float64))
        self.num_features = table_ND.shape[1]

    def forward(self, images_uint8_B3HW: torch.Tensor) -> torch.Tensor:
        number_B = images_uint8_B3HW[:, 0, 0, 0].long() + 256 * images_uint8_B3HW[:, 0, 0, 1].long()
        return self.table[number_B]


def numbered_images(start: int, count: int) -> np.ndarray:
    """uint8 (count, 4, 4, 3) images for `Lookup`, numbers start..start + count - 1."""
    images = np.zeros((count, 4, 4, 3), dtype=np.uint8)
    numbers = np.arange(start, start + count)
    images[:, 0, 0] = (numbers % 256)[:, None]
    images[:, 0, 1] = (numbers // 256)[:, None]
    return images


def exact_gaussian(rng: np.random.Generator, count: int, mean_D: np.ndarray, covariance_DD: np.ndarray) -> np.ndarray:
    """A sample (count, D) whose mean and (unbiased) covariance are exactly these."""
    noise_ND = rng.standard_normal((count, len(mean_D)))
    noise_ND -= noise_ND.mean(0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(noise_ND.T))))
    return noise_ND @ whiten.T @ np.linalg.cholesky(covariance_DD).T + mean_D
