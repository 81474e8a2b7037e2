"""A small CLIP for nano's scenes, trained here with torch alone and loaded elsewhere through open_clip.

`NanoClip` names its weights like open_clip's CLIP class and computes the same features (tested), so a training
machine needs no open_clip. Only the BPE tokens that scene captions use have trained rows; the published embedding has
all of open_clip's 49,408 rows, the others zero.

Source: open_clip (mlfoundations/open_clip) for key names, pre-norm blocks, pooling and BPE ids, in our own code;
Radford et al. 2021 for the loss. Captions that occur twice in a batch share the target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.models.nano import scenes
from stagevar.models.nano.presets import NanoPreset
from training.nano.jobs import Job, draw_images

CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 128, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 3},
}
PREPROCESS: dict[str, Any] = {
    "size": [64, 64],
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
START, END, PADDING = 49406, 49407, 0
# open_clip's byte-pair ids of the words in captions.
BPE = {
    "a": (320,), "an": (550,), "photo": (1125,), "of": (539,), "and": (537,), "left": (1823,), "right": (1155,),
    "above": (4348,), "below": (3788,), "two": (1237,), "three": (2097,), "four": (2721,), "red": (736,),
    "orange": (4287,), "yellow": (4481,), "green": (1901,), "cyan": (1470, 550), "blue": (1746,), "purple": (5496,),
    "pink": (3360,), "plain": (10709,), "striped": (22192,), "dotted": (47950,), "circle": (7117,), "square": (3999,),
    "triangle": (14615,), "ring": (2540,), "star": (1565,), "cross": (3417,), "circles": (19411,), "squares": (26972,),
    "triangles": (924, 18627), "rings": (5751,), "stars": (2895,), "crosses": (20473,),
}  # fmt: skip
# Row of every used id in the compact table. Order is kept, so the end token still has the highest number.
_USED = {PADDING, START, END, *(i for ids in BPE.values() for i in ids)}
ROWS = {token: row for row, token in enumerate(sorted(_USED))}


def tokenize(captions: Sequence[str]) -> Tensor:
    """Compact ids (B, context) of scene captions."""
    context = CONFIG["text_cfg"]["context_length"]
    rows = [[START, *(i for word in caption.split() for i in BPE[word]), END] for caption in captions]
    return torch.tensor([[ROWS[i] for i in row + [PADDING] * (context - len(row))] for row in rows])


class _Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = _Mlp(width)

    def forward(self, x_BTC: Tensor, mask_TT: Tensor | None) -> Tensor:
        heads = self.attn.num_heads
        qkv = F.linear(self.ln_1(x_BTC), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)
        x_BTC = x_BTC + self.attn.out_proj(out.transpose(1, 2).flatten(2))
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x_BTC: Tensor, mask_TT: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x_BTC = block(x_BTC, mask_TT)
        return x_BTC


class _Vision(nn.Module):
    def __init__(self, image_size: int, patch_size: int, layers: int, width: int, head_width: int, embed_dim: int):
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Transformer(width, width // head_width, layers)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        patches_BTC = self.conv1(image_B3HW).flatten(2).transpose(1, 2)
        start = self.class_embedding.to(patches_BTC.dtype).expand(len(patches_BTC), 1, -1)
        x_BTC = self.ln_pre(torch.cat([start, patches_BTC], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x_BTC)[:, 0]) @ self.proj


class NanoClip(nn.Module):
    """Image and text towers; weights named as open_clip's, the token table compact."""

    def __init__(self) -> None:
        super().__init__()
        text = CONFIG["text_cfg"]
        width, context = text["width"], text["context_length"]
        self.visual = _Vision(**CONFIG["vision_cfg"], embed_dim=CONFIG["embed_dim"])
        self.token_embedding = nn.Embedding(len(ROWS), width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.01)
        self.transformer = _Transformer(width, text["heads"], text["layers"])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, CONFIG["embed_dim"]) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        nn.init.normal_(self.token_embedding.weight, std=0.2)

    def encode_image(self, image_B3HW: Tensor) -> Tensor:
        """Unit features (B, D) of images in [-1, 1]."""
        return F.normalize(self.visual(image_B3HW).float(), dim=-1)

    def encode_text(self, ids_BT: Tensor) -> Tensor:
        """Unit features (B, D) of compact ids."""
        mask_TT = torch.ones(ids_BT.shape[1], ids_BT.shape[1], dtype=torch.bool, device=ids_BT.device).tril()
        x_BTC = self.transformer(self.token_embedding(ids_BT) + self.positional_embedding, mask_TT)
        end_B = ids_BT.argmax(1)
        pooled = self.ln_final(x_BTC)[torch.arange(len(ids_BT), device=ids_BT.device), end_B]
        return F.normalize((pooled @ self.text_projection).float(), dim=-1)


def published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as open_clip loads them: every row of its vocabulary, half precision."""
    compact = weights["token_embedding.weight"]
    full = compact.new_zeros(CONFIG["text_cfg"]["vocab_size"], compact.shape[1])
    full[list(ROWS)] = compact
    return {name: tensor.half() for name, tensor in {**weights, "token_embedding.weight": full}.items()}


def compacted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `published`, in float32."""
    found = {name: tensor.float() for name, tensor in weights.items()}
    return {**found, "token_embedding.weight": found["token_embedding.weight"][list(ROWS)]}


def config_json() -> str:
    """open_clip's configuration file for a local folder."""
    return json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}, indent=2) + "\n"


class ClipJob(Job):
    """Contrastive training on fresh scenes and their captions, at 64 pixels whatever size the preset draws."""

    name = "clip"

    def __init__(self, config: NanoPreset, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.model = NanoClip().to(device)

    def uses_muon(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim == 2 and "resblocks" in name

    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        world = scenes.sample(batch, rng)
        image = draw_images(world, self.config, self.device)
        if self.config.image_size != CONFIG["vision_cfg"]["image_size"]:
            image = F.interpolate(image, size=CONFIG["vision_cfg"]["image_size"], mode="area")
        ids_BT = tokenize(world.captions).to(self.device)
        _, groups = np.unique(world.captions, return_inverse=True)
        group_B = torch.from_numpy(groups).to(self.device)
        same_BB = (group_B[:, None] == group_B[None]).float()
        target_BB = same_BB / same_BB.sum(1, keepdim=True)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            image_BD, text_BD = self.model.encode_image(image), self.model.encode_text(ids_BT)
        logits_BB = self.model.logit_scale.clamp(max=np.log(100.0)).exp() * image_BD.float() @ text_BD.float().T
        loss = (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2
        hit = same_BB.gather(1, logits_BB.argmax(1, keepdim=True)).mean().item()
        return loss, {"hit": hit}

    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"open_clip_model.safetensors": published(weights)}

    def take(self, file: str, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(compacted(tensors))
