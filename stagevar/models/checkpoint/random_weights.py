"""Seeded random weights of real sizes, for latency work only."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from stagevar.models.checkpoint.weights import Precision, assign


def randomize(
    module: nn.Module, seed: int, *, device: torch.device | str = "cpu", precision: Precision | None = None
) -> None:
    """Seeded random weights for a module built on the meta device: real sizes, for latency work only.

    Every tensor has its own stream, keyed by (seed, key), so weights do not depend on the order of keys. Scales are
    those that keep activations finite through deep models: fan-in for matrices, one for norms, small biases and gates.
    Integer buffers are zero. Values differ between device types.
    """
    device = torch.device(device)
    tensors: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            tensors[key] = torch.zeros(value.shape, dtype=value.dtype, device=device)
            continue
        dtype = precision(key) if precision else value.dtype
        generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()) ^ (seed * 0x9E3779B1 & 0x7FFFFFFF))
        mean, spread = _random_scale(key, tuple(value.shape))
        tensors[key] = torch.empty(value.shape, device=device, dtype=dtype).normal_(mean, spread, generator=generator)
    assign(module, tensors)


def _random_scale(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a random weight, by the last part of its name."""
    last = key.rpartition(".")[2]
    if last == "zero_k_bias":
        return 0.0, 0.0
    if last.startswith("scale_mul"):
        return math.log(4.0), 0.1
    if last == "weight":
        return (1.0, 0.1) if len(shape) == 1 else (0.0, 1.0 / math.sqrt(math.prod(shape[1:])))
    if last.endswith("bias"):
        return 0.0, 0.05
    return 0.0, 0.2
