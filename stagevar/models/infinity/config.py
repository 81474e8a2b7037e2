"""Shape of an Infinity transformer, which the other families' layers read as well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InfinityConfig:
    """Shape of an Infinity transformer.

    Attributes:
        token_bits: bits per token (the paper's d_vae; 4 * latent_dim with patchify).
        text_dim: width of the text features.
        rope_grid: the finest grid of the full-resolution schedule, to which every scale's positions are stretched.
        level_embedding_every_chunk: the reference's flag value 0 (released models use 1, the first chunk only).
    """

    depth: int
    width: int
    heads: int
    chunks: int
    token_bits: int
    text_dim: int = 2048
    text_maxlen: int = 512
    ffn_hidden: int | None = None
    max_scales: int = 15
    level_embedding_every_chunk: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Feed-forward width: four times the model's, rounded to a multiple of 256 as in the reference."""
        return self.ffn_hidden or round(self.width * 4 / 256) * 256

    @property
    def pool_heads(self) -> int:
        """Heads of the attentive text pooling."""
        return self.text_dim // (64 if self.width > 4096 else 128)
