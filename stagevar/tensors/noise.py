"""Randomness that belongs to (seed, prompt, scale, site), never to call order, batch layout or device.

Every draw is a pure function of a key, made from seed and prompt, and of a counter, made from what is drawn (purpose,
scale, site, branch) and the position in the draw: the Philox4x32-10 bijection, written in integer tensor operations so that
CPU and GPU give the same bits and a whole batch is one call. The same prompt therefore gives the same image in any batch,
and two schedules that agree up to a scale are identical up to it. Only the keys change from image to image, so a recorded
graph of a scale needs nothing else refreshed.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); checked against the known-answer vectors
of Random123.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MULTIPLIERS_211 = np.array(_MULTIPLIERS, dtype=np.uint64)[:, None, None]
_WEYL_211 = np.array(_WEYL, dtype=np.uint64)[:, None, None]
#: In the order of a forward pass's rows; 0 is for draws that belong to the image, whatever branches run.
_BRANCH_WORDS = {"cond": 1, "uncond": 2}


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter and two key words, int64 tensors of unsigned 32-bit values that broadcast: four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps as two's complement, so its bits are right; the mask repairs the arithmetic shift.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _philox_on_cpu(count: int, key_R2: Tensor, words: Sequence[Tensor | int]) -> Tensor:
    """The four words of counters 0 to count - 1, (R, count, 4), int64: `philox4x32` in a third of the operations.

    At one image a scale of few tokens costs what its operations cost to start, and torch's start slower than numpy's. So
    both halves of the counter are one array, and products are unsigned.
    """
    rows = len(key_R2)
    even_2RN = np.empty((2, rows, count), dtype=np.uint64)  # words 0 and 2 of the counter
    odd_2RN = np.empty_like(even_2RN)  # words 1 and 3
    even_2RN[0] = np.arange(count, dtype=np.uint64)
    for target, word in zip((odd_2RN[0], even_2RN[1], odd_2RN[1]), words, strict=True):
        target[...] = word.numpy() if isinstance(word, Tensor) else word
    key_2R1 = key_R2.numpy().astype(np.uint64).T[:, :, None]
    shift, mask = np.uint64(32), np.uint64(_MASK32)
    for _ in range(_ROUNDS):
        product_2RN = even_2RN * _MULTIPLIERS_211
        even_2RN = (product_2RN >> shift)[::-1] ^ odd_2RN ^ key_2R1
        odd_2RN = (product_2RN & mask)[::-1]
        key_2R1 = (key_2R1 + _WEYL_211) & mask
    words_RN4 = np.stack((even_2RN[0], odd_2RN[0], even_2RN[1], odd_2RN[1]), axis=-1)
    return torch.from_numpy(words_RN4.view(np.int64))


def hash_words(*parts: object) -> tuple[int, int]:
    """Two 32-bit words from any printable parts (BLAKE2b, so words of neighboring parts are unrelated)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def key_tensor(identities: Sequence[tuple[int, str]], device: torch.device | str = "cpu") -> Tensor:
    """Philox keys (B, 2), int64, of (seed, prompt) pairs."""
    return torch.tensor([hash_words(*identity) for identity in identities], dtype=torch.int64).to(device)


#: philox(counter, key) -> four words; `philox4x32`, or the same as one compiled kernel.
Philox = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


def uniform(
    key_R2: Tensor, count: int, draw: tuple[int, int], word_R1: Tensor | int = 0, philox: Philox = philox4x32
) -> Tensor:
    """Uniform draws in the open interval (0, 1), float32, shape (R, count): row i depends only on its key and word.

    Args:
        key_R2: from `key_tensor`.
        draw: `hash_words` of what is drawn.
        word_R1: one more word per row.
        philox: the function that draws.
    """
    device, counters = key_R2.device, -(-count // 4)
    if device.type == "cpu" and philox is philox4x32:
        words_RN4 = _philox_on_cpu(counters, key_R2, (word_R1, *draw))
    else:
        # Made on the device at every draw: a kept one could be freed while a recorded graph still reads it.
        counter = torch.arange(counters, device=device, dtype=torch.int64)[None]
        zero_R1 = torch.zeros((len(key_R2), 1), dtype=torch.int64, device=device)
        words = philox((counter, *(zero_R1 + word for word in (word_R1, *draw))), (key_R2[:, :1], key_R2[:, 1:]))
        words_RN4 = torch.stack(words, dim=-1)
    # 23 bits plus a half, so that the nearest float32 never rounds to 0 or 1.
    return ((words_RN4.flatten(1)[:, :count] >> 9).to(torch.float32) + 0.5) * 2.0**-23


def normal(
    key_R2: Tensor, count: int, draw: tuple[int, int], word_R1: Tensor | int = 0, philox: Philox = philox4x32
) -> Tensor:
    """Standard normal draws, float32, shape (R, count), by Box-Muller on pairs of uniforms; arguments as in `uniform`."""
    pairs = -(-count // 2)
    u_R2N = uniform(key_R2, 2 * pairs, draw, word_R1, philox)
    radius = torch.sqrt(-2.0 * torch.log(u_R2N[:, :pairs]))
    angle = (2.0 * math.pi) * u_R2N[:, pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]


@dataclass(frozen=True)
class Draws:
    """What draws: the functions above, or a card's kernels that give the same (stagevar.engine.kernels)."""

    uniform: Callable[..., Tensor] = uniform
    normal: Callable[..., Tensor] = normal


class ScaleNoise(Protocol):
    """The draws of one scale for the rows of one forward pass. Golden tests inject their own."""

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) draws in (0, 1) for the B prompts."""
        ...

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard normal draws for the B prompts."""
        ...

    def site_uniform(self, purpose: str, site: object, shape: tuple[int, ...]) -> Tensor:
        """(R, *shape) draws in (0, 1) for the rows being run at a site."""
        ...

    def site_normal(self, purpose: str, site: object, shape: tuple[int, ...]) -> Tensor:
        """(R, *shape) standard normal draws for the rows being run at a site."""
        ...


class NoiseSource(Protocol):
    """Gives each scale its draws."""

    def at(self, scale: int, branches: Sequence[str]) -> ScaleNoise:
        """Draws of `scale` for rows ordered branch by branch, e.g. ("cond", "uncond")."""
        ...

    def rows(self, indices: Sequence[int]) -> NoiseSource:
        """The source of a sub-batch: the same draws for these images."""
        ...


class PromptNoise:
    """The production source: keyed by (seed, prompt) per batch row.

    Args:
        prompts, seeds: one per image of the batch, in any order.
        device: where the draws are made and used.
        draws: the functions that make them.

    Attributes:
        keys_B2: a recorded graph reads them and `refresh` overwrites them.
        words_R1: one word per row of both branches (R = 2B) that tells the branches apart.
    """

    def __init__(
        self, prompts: Sequence[str], seeds: Sequence[int], device: torch.device | str, draws: Draws = Draws()
    ):
        self.identities = tuple(zip(map(int, seeds), prompts, strict=True))
        self.device, self.draws = device, draws
        self.keys_B2 = key_tensor(self.identities, device)
        words = torch.tensor(list(_BRANCH_WORDS.values()), dtype=torch.int64)
        self.words_R1 = words.repeat_interleave(len(self.identities))[:, None].to(device)

    def at(self, scale: int, branches: Sequence[str]) -> ScaleNoise:
        return _PromptScaleNoise(self, scale, tuple(branches))

    def rows(self, indices: Sequence[int]) -> PromptNoise:
        """The source of a sub-batch."""
        return PromptNoise(
            [self.identities[i][1] for i in indices],
            [self.identities[i][0] for i in indices],
            self.device,
            self.draws,
        )

    def refresh(self, other: PromptNoise) -> None:
        """Becomes the other source, of the same batch size, in place."""
        self.identities = other.identities
        self.keys_B2.copy_(other.keys_B2)


class _PromptScaleNoise:
    def __init__(self, source: PromptNoise, scale: int, branches: tuple[str, ...]):
        self.source, self.scale, self.branches = source, scale, branches

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        keys_B2, draw = self.source.keys_B2, hash_words(purpose, self.scale)
        return self.source.draws.uniform(keys_B2, math.prod(shape), draw).reshape(len(keys_B2), *shape)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        keys_B2, draw = self.source.keys_B2, hash_words(purpose, self.scale)
        return self.source.draws.normal(keys_B2, math.prod(shape), draw).reshape(len(keys_B2), *shape)

    def _rows(self) -> tuple[Tensor, Tensor]:
        keys_B2 = self.source.keys_B2
        first = list(_BRANCH_WORDS).index(self.branches[0]) * len(keys_B2)
        rows = slice(first, first + len(self.branches) * len(keys_B2))
        return keys_B2.repeat(len(self.branches), 1), self.source.words_R1[rows]

    def site_uniform(self, purpose: str, site: object, shape: tuple[int, ...]) -> Tensor:
        keys_R2, words_R1 = self._rows()
        draw = hash_words(purpose, self.scale, site)
        draws_RN = self.source.draws.uniform(keys_R2, math.prod(shape), draw, words_R1)
        return draws_RN.reshape(len(keys_R2), *shape)

    def site_normal(self, purpose: str, site: object, shape: tuple[int, ...]) -> Tensor:
        keys_R2, words_R1 = self._rows()
        draw = hash_words(purpose, self.scale, site)
        draws_RN = self.source.draws.normal(keys_R2, math.prod(shape), draw, words_R1)
        return draws_RN.reshape(len(keys_R2), *shape)
