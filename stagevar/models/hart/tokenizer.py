"""HART's hybrid tokenizer: VAR's autoencoder, read scale by scale as codes, with what the codebook cannot express at the end.

A token is a vector: an entry of the codebook, or a blend of entries, and at the last scale also the continuous residual.

Source: mit-han-lab/hart, hart/modules/models/autoencoder (facts only); names and shapes are those of
stagevar.models.vq.tokenizer. Differs from VAR's in that the last scale is added as is, without smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stagevar.models.vq.tokenizer import VQVAE, VQResidual
from stagevar.schedule.grids import Grid


class HybridResidual(VQResidual):
    """The residual loop over vectors instead of indices."""

    def codes(self, index_BL: Tensor) -> Tensor:
        """Codebook entries (B, L, d), float32."""
        return F.embedding(index_BL, self.quantizer.embedding.weight).float()

    def blend(self, weight_BLV: Tensor) -> Tensor:
        """Codebook entries averaged with these weights: (B, L, d), float32."""
        return torch.matmul(weight_BLV, self.quantizer.embedding.weight.to(weight_BLV.dtype)).float()

    def nearest(self, codes_BLd: Tensor) -> Tensor:
        """Indices (B, L) of the entries that lie nearest to vectors."""
        return torch.cdist(codes_BLd, self.quantizer.embedding.weight.to(codes_BLd.dtype)[None]).argmin(-1)

    def add(self, code_sum_BdHW: Tensor, codes_BLd: Tensor, scale: int) -> Tensor:
        """New code sum with this scale's vectors added (the input is not changed)."""
        if scale < len(self.grids) - 1:
            return self.add_codes(code_sum_BdHW, codes_BLd, scale)
        codes = codes_BLd.to(code_sum_BdHW.dtype).transpose(1, 2)
        return code_sum_BdHW + codes.unflatten(2, self.final_grid)


class HybridVAE(VQVAE):
    """The tokenizer; arguments as for VQVAE."""

    residual: HybridResidual

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Chooses the scales."""
        self.residual = HybridResidual(grids, self.quantize)
