"""Features of what every schedule is compared with: the same prompts and full-schedule images come up again and again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch

#: Micro-batches remembered; the search sets of all but the largest studies.
MOST = 512


class MemoizedFeatures:
    """A function from texts or images to features that is computed once per distinct input.

    Inputs are compared by content, not by identity, so an array read from disk again is recognized.
    """

    def __init__(self, compute: Callable[..., torch.Tensor]):
        self._compute = compute
        self._found: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __call__(self, inputs: np.ndarray | Sequence[str]) -> torch.Tensor:
        key = _digest(inputs)
        if key not in self._found:
            self._found[key] = self._compute(inputs)
            if len(self._found) > MOST:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]


def _digest(inputs: np.ndarray | Sequence[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(inputs, np.ndarray):
        digest.update(f"{inputs.shape} {inputs.dtype}".encode())
        digest.update(np.ascontiguousarray(inputs).data)
    else:
        for text in inputs:
            digest.update(f"{len(text)} {text}".encode())
    return digest.digest()
