"""Sizes of nano: `64px` is trained on two cores and shipped, `96px` needs a GPU to train."""

from __future__ import annotations

from dataclasses import dataclass

from stagevar.errors import UsageError
from stagevar.models.infinity.config import InfinityConfig


@dataclass(frozen=True)
class NanoPreset:
    """Everything that fixes nano's shapes.

    Attributes:
        image_size: pixels per side.
        patch: pixels per side of a latent cell.
        scales: grid sides, coarse to fine.
        layout_scales: how many of them decide what is drawn where; most training steps see only these.
        latent_dim: bits per token.
        tokenizer_width: channels.
        depth, width, heads, chunks, ffn_hidden: of the transformer.
        text_dim, text_maxlen: channels and tokens of the text features.
    """

    name: str
    image_size: int
    patch: int
    scales: tuple[int, ...]
    layout_scales: int
    latent_dim: int
    tokenizer_width: int
    depth: int
    width: int
    heads: int
    chunks: int
    ffn_hidden: int
    text_dim: int = 128
    text_maxlen: int = 24

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return tuple((s, s) for s in self.scales)

    def infinity(self) -> InfinityConfig:
        """The transformer's configuration."""
        return InfinityConfig(
            depth=self.depth, width=self.width, heads=self.heads, chunks=self.chunks, token_bits=self.latent_dim,
            text_dim=self.text_dim, text_maxlen=self.text_maxlen, ffn_hidden=self.ffn_hidden,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of one image over all scales."""
        return sum(s * s for s in self.scales)


PRESETS = {
    "64px": NanoPreset(
        "64px", image_size=64, patch=4, scales=(1, 2, 3, 4, 6, 8, 11, 16), layout_scales=6, latent_dim=24,
        tokenizer_width=128, depth=6, width=192, heads=6, chunks=3, ffn_hidden=704,
    ),
    "96px": NanoPreset(
        "96px", image_size=96, patch=6, scales=(1, 2, 3, 4, 5, 6, 8, 10, 12, 16), layout_scales=7, latent_dim=24,
        tokenizer_width=192, depth=6, width=192, heads=6, chunks=3, ffn_hidden=704,
    ),
    # Small enough for a training test of a few seconds; learns nothing worth looking at.
    "micro": NanoPreset(
        "micro", image_size=48, patch=12, scales=(1, 2, 4), layout_scales=2, latent_dim=8, tokenizer_width=32,
        depth=2, width=32, heads=2, chunks=1, ffn_hidden=64,
    ),
}  # fmt: skip


def preset(name: str) -> NanoPreset:
    """A preset by name. Raises UsageError for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f"unknown nano preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
