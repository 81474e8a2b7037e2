"""The static KV cache: allocated once, filled by length pointers, rewound by resetting them.

Layout: per branch and layer two tensors (B, H, capacity, c), keys and values. Branches have their own tensors, so dropping
one only stops reading and writing it: rewinding to before the cutoff finds it whole, and a cache built for deployment gives
the dropped branch only the room it needs until then. Lengths are per branch and layer, because kept tokens may differ per
chunk. Whatever lies beyond a length is stale and never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stagevar.schedule import BOTH, Branch, LowRank, Pivotal, Steps

#: lengths[branch][layer]
Lengths = tuple[tuple[int, ...], ...]


def step_lengths(steps: Steps, chunk_layers: Sequence[range]) -> dict[Branch, list[int]]:
    """Cache entries per branch and layer after all these steps ran: the smallest capacity that holds the schedule."""
    depth = sum(len(layers) for layers in chunk_layers)
    needed: dict[Branch, list[int]] = {branch: [0] * depth for branch in BOTH}
    for step in steps:
        if step.skipped:
            continue
        for chunk, layers in enumerate(chunk_layers):
            for layer in layers:
                tokens = step.tokens
                if isinstance(step.reduction, LowRank):
                    tokens = step.reduction.ranks[chunk if step.reduction.site == "chunk" else 0]
                elif isinstance(step.reduction, Pivotal) and layer in range(*step.reduction.layers):
                    tokens = step.reduction.kept
                for branch in step.branches:
                    needed[branch][layer] += tokens
    return needed


class KVCache:
    """Keys and values of one batch.

    Args:
        batch, heads, head_dim: row shape.
        capacity: entries per branch and layer (`step_lengths` of the schedule, or of the full one for tuning).
        device, dtype: of the stored tensors; inputs are cast on write.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: dict[Branch, list[int]],
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.batch = batch
        self.capacity = {branch: tuple(entries) for branch, entries in capacity.items()}
        self._store: dict[Branch, list[Tensor]] = {
            branch: [torch.empty(2, batch, heads, length, head_dim, device=device, dtype=dtype) for length in entries]
            for branch, entries in capacity.items()
        }
        self._length = {branch: [0] * len(entries) for branch, entries in capacity.items()}

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for tensors in self._store.values() for t in tensors)

    @property
    def lengths(self) -> Lengths:
        """Filled entries per branch (cond, uncond) and layer."""
        return tuple(tuple(self._length[branch]) for branch in BOTH)

    def rewind(self, lengths: Lengths) -> None:
        """Forgets everything after these lengths (as returned by `lengths` earlier)."""
        for branch, entries in zip(BOTH, lengths, strict=True):
            self._length[branch] = list(entries)

    def fits(self, capacity: dict[Branch, list[int]]) -> bool:
        """Whether a schedule with these needs can run in this cache."""
        return all(have >= need for b in BOTH for have, need in zip(self.capacity[b], capacity[b], strict=True))

    def select(self, rows: Sequence[int]) -> KVCache:
        """A cache of its own that holds a copy of these images' entries, with the same capacity and lengths."""
        first = self._store[BOTH[0]][0]
        _, _, heads, _, head_dim = first.shape
        capacity = {branch: list(entries) for branch, entries in self.capacity.items()}
        chosen = KVCache(len(rows), heads, head_dim, capacity, first.device, first.dtype)
        chosen.rewind(self.lengths)
        for branch in BOTH:
            for layer in range(len(capacity[branch])):
                chosen.storage(branch, layer).copy_(self.storage(branch, layer)[:, list(rows)])
        return chosen

    def copy_entries(self, other: KVCache, first: Lengths, last: Lengths) -> None:
        """Takes from a cache of the same batch the entries between two of its lengths, and ends there."""
        for branch, starts, stops in zip(BOTH, first, last, strict=True):
            for layer, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                self._store[branch][layer][..., start:stop, :] = other._store[branch][layer][..., start:stop, :]
        self.rewind(last)

    def storage(self, branch: Branch, layer: int) -> Tensor:
        """The filled part (2, B, H, length, c) of one branch and layer, a view."""
        return self._store[branch][layer][..., : self._length[branch][layer], :]

    def attend(
        self, branches: Sequence[Branch], layer: int, q_RHLc: Tensor, k_RHLc: Tensor, v_RHLc: Tensor, scale: float
    ) -> Tensor:
        """Appends k and v, then attends over all entries of the layer; rows are ordered branch by branch.

        Raises RuntimeError when the capacity is exceeded (a schedule larger than the one the cache was built for).
        """
        outs = []
        for index, branch in enumerate(branches):
            rows = slice(index * self.batch, (index + 1) * self.batch)
            store, start = self._store[branch][layer], self._length[branch][layer]
            stop = start + k_RHLc.shape[2]
            if stop > store.shape[3]:
                raise RuntimeError(
                    f"KV cache of {store.shape[3]} entries (branch {branch}, layer {layer}) cannot take entry {stop}; "
                    "build it for a schedule that keeps as many tokens"
                )
            store[0, :, :, start:stop] = k_RHLc[rows]
            store[1, :, :, start:stop] = v_RHLc[rows]
            self._length[branch][layer] = stop
            outs.append(
                F.scaled_dot_product_attention(
                    q_RHLc[rows].to(store.dtype), store[0, :, :, :stop], store[1, :, :, :stop], scale=scale
                )
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)
