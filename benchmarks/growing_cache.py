"""The plain KV cache, one concatenation per layer, branch and scale: the static one must equal it and be no slower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, Branch, Steps
from stagevar.tensors.cache import KVCache, Lengths


class GrowingCache(KVCache):
    """Grows by torch.cat, as in published sampling code; `batch` images, `depth` layers."""

    def __init__(self, batch: int, depth: int):
        nothing = {branch: [0] * depth for branch in BOTH}
        super().__init__(batch, 1, 1, nothing, "cpu", torch.float32)
        self._grown: dict[tuple[Branch, int], tuple[Tensor, Tensor]] = {}

    def rewind(self, lengths: Lengths) -> None:
        super().rewind(lengths)
        for (branch, layer), (k, v) in self._grown.items():
            length = self._length[branch][layer]
            self._grown[branch, layer] = (k[:, :, :length], v[:, :, :length])

    def attend(
        self, branches: Sequence[Branch], layer: int, q_RHLc: Tensor, k_RHLc: Tensor, v_RHLc: Tensor, scale: float
    ) -> Tensor:
        outs = []
        parts = zip(branches, *(x.split(self.batch) for x in (q_RHLc, k_RHLc, v_RHLc)), strict=True)
        for branch, q, k, v in parts:
            k = k.to(v.dtype)
            if self._length[branch][layer]:
                earlier_k, earlier_v = self._grown[branch, layer]
                k, v = torch.cat([earlier_k, k], dim=2), torch.cat([earlier_v, v], dim=2)
            self._grown[branch, layer] = (k, v)
            self._length[branch][layer] = k.shape[2]
            outs.append(F.scaled_dot_product_attention(q.to(v.dtype), k, v, scale=scale))
        return torch.cat(outs)


class GrowingSampler(Sampler):
    """The same sampler over a growing cache."""

    def _allocate(self, batch: int, steps: Steps) -> KVCache:
        return GrowingCache(batch, self.model.transformer.depth)
