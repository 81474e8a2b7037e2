"""The static KV cache: allocated once, filled by length pointers, rewound by resetting them.

Layout: per branch and layer two tensors (B, H, capacity, c), keys and values. Branches have their own tensors, so dropping
one only stops reading and writing it: rewinding to before the cutoff finds it whole, and a cache built for deployment gives
the dropped branch only the room it needs until then. Lengths are per branch and layer, because kept tokens may differ per
chunk. Whatever lies beyond a length is stale and never read.

If both branches can grow equally (the full schedule, and the cache that tuning allocates) their tensors are two halves of
one, so that guided scales write and attend once instead of per branch.

With 8 bits an entry is a row of int8 per token and head with a float32 scale of its own: half of bfloat16 for 1/32 more at
a head dimension of 128. Everything is read back from it, the current scale's entries too, so that a rewound generation
continues identically; one layer at a time is widened for its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stagevar.schedule import BOTH, Branch, LowRank, Pivotal, Steps
from stagevar.tensors import attention

#: How entries are stored: in the blocks' precision, or in 8 bits.
KV_CACHES = ("model", "int8")
#: (qkv_RL3C, factor_H, cos_sin, keys_RHLc, values_RHLc) -> q_RHLc: `stagevar.engine.kernels.heads_into_cache_twin`.
HeadsIntoCache = Callable[[Tensor, Tensor, "Tensor | None", Tensor, Tensor], Tensor]
#: lengths[branch][layer]
Lengths = tuple[tuple[int, ...], ...]


def step_lengths(steps: Steps, chunk_layers: Sequence[range], prefix_tokens: int = 0) -> dict[Branch, list[int]]:
    """Cache entries per branch and layer after all these steps ran: the smallest capacity that holds the schedule.

    Args:
        prefix_tokens: what the first scale caches in addition to its grid's tokens.
    """
    depth = sum(len(layers) for layers in chunk_layers)
    needed: dict[Branch, list[int]] = {branch: [prefix_tokens] * depth for branch in BOTH}
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
                for branch in step.branches_at(layer):
                    needed[branch][layer] += tokens
    return needed


def even(lengths: dict[Branch, list[int]]) -> dict[Branch, list[int]]:
    """The smallest capacity for these entries that is the same in all layers and both branches.

    Both branches then share one tensor, so a guided scale writes and attends once, and all layers have the same
    strides.
    """
    most = max(map(max, lengths.values()))
    return {branch: [most] * len(entries) for branch, entries in lengths.items()}


class KVCache:
    """Keys and values of one batch.

    Args:
        batch, heads, head_dim: row shape.
        capacity: entries per branch and layer (`step_lengths` of the schedule, or of the full one for tuning).
        device, dtype: of the stored tensors; inputs are cast on write, and attention runs in dtype.
        eight_bit: store int8 and scales; dtype is then that of attention only.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: dict[Branch, list[int]],
        device: torch.device | str,
        dtype: torch.dtype,
        eight_bit: bool = False,
    ):
        self.batch, self.dtype, self.eight_bit = batch, dtype, eight_bit
        self.capacity = {branch: tuple(entries) for branch, entries in capacity.items()}
        self.joint = self.capacity[BOTH[0]] == self.capacity[BOTH[1]]
        self._length = {branch: [0] * len(entries) for branch, entries in capacity.items()}

        def allocate(width: int, dtype: torch.dtype) -> dict[Branch | tuple[Branch, ...], list[Tensor]]:
            def empty(rows: int, length: int) -> Tensor:
                return torch.empty(2, rows, heads, length, width, device=device, dtype=dtype)

            if not self.joint:
                return {branch: [empty(batch, length) for length in entries] for branch, entries in capacity.items()}
            whole = [empty(2 * batch, length) for length in self.capacity[BOTH[0]]]
            cond, uncond = ([t[:, rows] for t in whole] for rows in (slice(0, batch), slice(batch, None)))
            return {BOTH: whole, BOTH[0]: cond, BOTH[1]: uncond}

        self._store = allocate(head_dim, torch.int8 if eight_bit else dtype)
        self._scales = allocate(1, torch.float32) if eight_bit else None

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for store in self._stores for branch in BOTH for t in store[branch])

    @property
    def _stores(self) -> list[dict[Branch | tuple[Branch, ...], list[Tensor]]]:
        return [self._store] if self._scales is None else [self._store, self._scales]

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
        """A separate cache that holds a copy of these images' entries, with the same capacity and lengths."""
        first = self._store[BOTH[0]][0]
        _, _, heads, _, head_dim = first.shape
        capacity = {branch: list(entries) for branch, entries in self.capacity.items()}
        chosen = KVCache(len(rows), heads, head_dim, capacity, first.device, self.dtype, self.eight_bit)
        chosen.rewind(self.lengths)
        for mine, theirs in zip(self._stores, chosen._stores, strict=True):
            for branch, lengths in self._length.items():
                for layer, length in enumerate(lengths):
                    theirs[branch][layer][..., :length, :] = mine[branch][layer][:, list(rows), :, :length]
        return chosen

    def copy_entries(self, other: KVCache, first: Lengths, last: Lengths) -> None:
        """Takes from a cache of the same batch the entries between two of its lengths, and ends there."""
        for branch, starts, stops in zip(BOTH, first, last, strict=True):
            for layer, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                for mine, theirs in zip(self._stores, other._stores, strict=True):
                    mine[branch][layer][..., start:stop, :] = theirs[branch][layer][..., start:stop, :]
        self.rewind(last)

    def storage(self, branch: Branch, layer: int) -> Tensor:
        """The filled part (2, B, H, length, c) of one branch and layer as stored, a view."""
        return self._store[branch][layer][..., : self._length[branch][layer], :]

    def attend(
        self, branches: Sequence[Branch], layer: int, q_RHLc: Tensor, k_RHLc: Tensor, v_RHLc: Tensor, scale: float
    ) -> Tensor:
        """Appends k and v, then attends over all entries of the layer; rows are ordered branch by branch.

        Raises:
            RuntimeError: if the capacity is exceeded (a larger schedule than the one that the cache was built for).
        """
        start = self._extend(branches, layer, k_RHLc.shape[2])
        if len(branches) == 1 or self.joint:
            return self._attend(tuple(branches), layer, start, q_RHLc, k_RHLc, v_RHLc, scale)
        halves = zip(branches, *(x.chunk(2) for x in (q_RHLc, k_RHLc, v_RHLc)), strict=True)
        return torch.cat([self._attend((branch,), layer, start, q, k, v, scale) for branch, q, k, v in halves])

    def attend_heads(
        self,
        branches: Sequence[Branch],
        layer: int,
        qkv_RL3C: Tensor,
        factor_H: Tensor,
        cos_sin: Tensor | None,
        write: HeadsIntoCache,
        scale: float,
    ) -> Tensor:
        """Like `attend`, but from the output of the qkv product: `write` makes the heads and stores keys and values in place.

        Args:
            factor_H, cos_sin: passed to `write`; a table per row is (2, R, L, c/2).

        Raises:
            RuntimeError: as in `attend`. Not available for 8-bit entries.
        """
        start = self._extend(branches, layer, qkv_RL3C.shape[1])
        stop = start + qkv_RL3C.shape[1]
        if len(branches) == 1 or self.joint:
            parts: list[tuple[tuple[Branch, ...], Tensor, Tensor | None]] = [(tuple(branches), qkv_RL3C, cos_sin)]
        else:
            tables = (cos_sin, cos_sin) if cos_sin is None or cos_sin.ndim == 3 else cos_sin.chunk(2, dim=1)
            by_branch = zip(branches, qkv_RL3C.chunk(2), tables, strict=True)
            parts = [((branch,), qkv, table) for branch, qkv, table in by_branch]
        out = []
        for rows, qkv, table in parts:
            store = self._store[rows[0] if len(rows) == 1 else rows][layer]
            q = write(qkv, factor_H, table, store[0, :, :, start:stop], store[1, :, :, start:stop])
            out.append(attention.attend(q, store[0, :, :, :stop], store[1, :, :, :stop], scale=scale))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _extend(self, branches: Sequence[Branch], layer: int, tokens: int) -> int:
        """Reserves entries of a layer; returns where they begin."""
        start = self._length[branches[0]][layer]
        stop = start + tokens
        for branch in branches:
            if self._length[branch][layer] != start:
                raise RuntimeError(
                    f"layer {layer}: the branches hold different entries; rewind to before one was dropped"
                )
            if stop > self.capacity[branch][layer]:
                raise RuntimeError(
                    f"KV cache of {self.capacity[branch][layer]} entries (branch {branch}, layer {layer}) cannot take "
                    f"entry {stop}; build it for a schedule that keeps as many tokens"
                )
            self._length[branch][layer] = stop
        return start

    def _attend(
        self, branches: tuple[Branch, ...], layer: int, start: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        """Writes at `start`, then attends over everything up to there, for rows in one tensor."""
        stop = start + k.shape[2]
        rows = branches[0] if len(branches) == 1 else branches
        store = self._store[rows][layer]
        if self._scales is None:
            store[0, :, :, start:stop] = k
            store[1, :, :, start:stop] = v
            keys, values = store[0, :, :, :stop], store[1, :, :, :stop]
        else:
            scales = self._scales[rows][layer]
            for index, x in enumerate((k, v)):
                x = x.float()
                largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-12)
                store[index, :, :, start:stop] = (x * (127 / largest)).round()
                scales[index, :, :, start:stop] = largest / 127
            # Written as it is multiplied: a float32 product next to it would be the largest tensor of all.
            wide = store.new_empty((*store.shape[:3], stop, store.shape[4]), dtype=self.dtype)
            keys, values = torch.mul(store[..., :stop, :], scales[..., :stop, :], out=wide)
        return attention.attend(q.to(self.dtype), keys, values, scale=scale)
