"""The pieces between matrix products as compiled kernels: fewer launches, the same values up to rounding.

Norm, modulation and cast become one kernel; unit length, rotation, scale and cast of q and k another; the integer
arithmetic of a draw, some two hundred operations, a third, which gives the same bits. Sizes are variables of the kernels,
but for those of one: a piece is compiled a few times per process, when first met. Where that fails, for want of a compiler
for instance, the plain piece runs and a warning says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from stagevar import noise
from stagevar.models.base import NextScaleModel
from stagevar.models.infinity import Pieces, cosine_heads, modulated_norm
from stagevar.models.variants import variant

Model = TypeVar("Model", bound=NextScaleModel)


def rotate_pairs(x_RHLc: Tensor, cos_sin: Tensor) -> Tensor:
    """`infinity.rotate` of (cos, sin), without complex numbers, for which compilers generate no code."""
    cos, sin = cos_sin.unbind(0)
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = x_RHLc.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def pair_table(cos_sin: Tensor) -> Tensor:
    """The table that `rotate_pairs` takes."""
    return cos_sin


def real_heads(
    qkv_RL3C: Tensor, heads: int, factor_1H11: Tensor, cos_sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`infinity.cosine_heads`, q and k already in the precision that attention casts them to."""
    q, k, v = cosine_heads(qkv_RL3C, heads, factor_1H11, cos_sin, rotate_pairs)
    return q.to(v.dtype), k.to(v.dtype), v


def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for any size; the plain function, with one warning, once compiling it has failed."""
    current = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        nonlocal current
        try:
            return current(*arguments)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # imports a great deal, by now already there

            if not isinstance(error, TorchDynamoException):
                raise
            reason = " ".join(str(error).strip().splitlines()[:2])
            warnings.warn(f"{function.__name__} runs without being compiled: {reason}", stacklevel=2)
            current = function
            return current(*arguments)

    return run


@cache
def pieces() -> Pieces:
    """The compiled pieces, one set for all models of a process."""
    return Pieces(compiler(modulated_norm), compiler(real_heads), pair_table)


@cache
def philox() -> noise.Philox:
    """The compiled `noise.philox4x32`."""
    return compiler(noise.philox4x32)


def compiled(transformer: Model) -> Model:
    """The transformer with compiled pieces; every tensor is shared with the one given."""
    copied = variant(transformer, lambda name, module: None)
    for part in copied.modules():
        if hasattr(part, "pieces"):
            part.pieces = pieces()
    return copied
