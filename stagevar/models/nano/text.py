"""nano's text encoder: a closed vocabulary of the words that scenes use, a window over neighbors, two small layers.

It is trained together with the transformer. Features go to `Infinity.condition` as a ragged list, like flan-T5's do.

Source: our own; the shape of the interface follows Infinity's use of flan-T5 (rows up to and including the end token).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.models.nano.presets import NanoPreset
from stagevar.models.nano.scenes import COLORS, NUMBERS, PLURALS, SHAPES, TEXTURES
from stagevar.sections import shown

PAD, END, UNKNOWN = 0, 1, 2
_GRAMMAR = ("a", "an", "photo", "of", "and", "left", "right", "above", "below")
VOCABULARY = ("<pad>", "<end>", "<unk>", *_GRAMMAR, *NUMBERS.values(), *COLORS, *TEXTURES, *SHAPES, *PLURALS)
_WINDOW = 9  # words that the first layer mixes: far enough for "left of a red star" to reach "star"
#: Unknown words that one encoder names; it reads prompts for as long as its process lives.
MOST_NAMED = 100
_INDEX = {word: index for index, word in enumerate(VOCABULARY)}


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor, mask_B11T: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x_BTC)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11T)
        x_BTC = x_BTC + self.proj(out.transpose(1, 2).flatten(2))
        return x_BTC + self.fc2(F.gelu(self.fc1(self.norm2(x_BTC)), approximate="tanh"))


class NanoTextEncoder(nn.Module):
    """Prompts to text features (text_dim channels, at most text_maxlen rows, the end token included)."""

    def __init__(self, config: NanoPreset, layers: int = 2):
        super().__init__()
        self.maxlen = config.text_maxlen
        self.embed = nn.Embedding(len(VOCABULARY), config.text_dim)
        self.positions = nn.Parameter(torch.zeros(config.text_maxlen, config.text_dim))
        self.window = nn.Parameter(torch.zeros(config.text_dim, config.text_dim * _WINDOW))
        self.layers = nn.ModuleList(_Layer(config.text_dim, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(config.text_dim)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.positions, std=0.1)
        self._warned: set[str] = set()

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Word ids (B, T) padded with 0, and lengths (B,) that count the end token.

        Words outside the vocabulary become <unk>, warned of once per word, up to MOST_NAMED; prompts too long are cut.
        """
        rows = []
        for prompt in prompts:
            ids = []
            for word in prompt.lower().replace(",", " ").replace(".", " ").split():
                if word not in _INDEX and len(self._warned) < MOST_NAMED and shown(word) not in self._warned:
                    self._warned.add(shown(word))
                    last = "; further unknown words are not named" if len(self._warned) == MOST_NAMED else ""
                    warnings.warn(
                        f"nano does not know the word {shown(word)}; it reads it as <unk>{last}", stacklevel=3
                    )
                ids.append(_INDEX.get(word, UNKNOWN))
            rows.append([*ids[: self.maxlen - 1], END])
        lengths_B = torch.tensor([len(row) for row in rows])
        ids_BT = torch.full((len(rows), max((len(row) for row in rows), default=1)), PAD)
        for row, ids in zip(ids_BT, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return ids_BT, lengths_B

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, text_dim) and a bool mask (B, 1, 1, T), True where a row is real."""
        mask_B11T = (ids_BT != PAD)[:, None, None]
        x_BTC = (self.embed(ids_BT) + self.positions[: ids_BT.shape[1]]) * mask_B11T[:, 0, 0, :, None]
        # Words first see their neighbors, so that an adjective reaches its noun without attention having to find it.
        near_BCT = F.conv1d(x_BTC.transpose(1, 2), self.window.unflatten(1, (-1, _WINDOW)), padding=_WINDOW // 2)
        x_BTC = x_BTC + near_BCT.transpose(1, 2)
        for layer in self.layers:
            x_BTC = layer(x_BTC, mask_B11T)
        return self.norm(x_BTC), mask_B11T

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features per prompt, [(len_i, text_dim)], float32."""
        ids_BT, lengths_B = self.tokenize(prompts)
        features_BTC, _ = self(ids_BT.to(self.positions.device))
        return [row[:n].float() for row, n in zip(features_BTC, lengths_B.tolist(), strict=True)]
