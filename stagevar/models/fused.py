"""The pieces between matrix products as compiled kernels: fewer launches, the same values up to rounding.

Norm, modulation and cast become one kernel; unit length, rotation, scale and cast of q and k another; the integer
arithmetic of a draw, some two hundred operations, a third, which gives the same bits. A piece is compiled when first met,
a few times per model and batch: the number of tokens is a variable of its kernels, widths are not. Where that fails, for
want of a compiler for instance, the plain piece runs, a warning says why, and no figure counts as the engine's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from stagevar.models.base import NextScaleModel
from stagevar.models.layers import Chained, Pieces, cosine_heads, modulated_norm
from stagevar.models.variants import variant
from stagevar.tensors import noise

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


#: Axes of tokens in the arguments of `modulated_norm` and `real_heads`.
NORM_AXES = (1, None, None, None)
HEADS_AXES = (1, None, None, -2)
#: Why a piece runs plainly, by its name: a compiler was missing or failed.
_plain_because: dict[str, str] = {}
_numbers = itertools.count()


def plain_because() -> str | None:
    """Why some piece of this process is not compiled; figures that were taken meanwhile are not a compiled engine's."""
    return next((f"{name} is not compiled: {reason}" for name, reason in _plain_because.items()), None)


def compiler(function: Callable[..., Any], token_axes: Sequence[int | None] | None = None) -> Callable[..., Any]:
    """The function, compiled when first met; the plain one, with a warning, once compiling it has failed.

    Args:
        token_axes: per argument the axis of its tokens, None if it has none. There the compiled kernels take any size;
            every other size, type and number is fixed in a kernel of its own, so that loads are as wide as the card has
            them and no function meets the compiler's limit of variants, beyond which it would silently run uncompiled. Without
            token_axes all sizes are variables of one kernel.
    """
    variants: dict[Any, Callable[..., Any]] = {}

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if function.__name__ in _plain_because:
            return function(*arguments)
        key = None if token_axes is None else tuple(map(_fixed, arguments, token_axes))
        if key not in variants:
            # A copy with a code object and a name of its own: compiled variants are kept, and limited, per code object, and
            # which sizes have changed so far, hence are variables, is remembered by name.
            name = f"{function.__name__}_{next(_numbers)}"
            own = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
            own.__defaults__ = function.__defaults__  # type: ignore[attr-defined]
            variants[key] = torch.compile(own, dynamic=True if token_axes is None else None)
        try:
            return variants[key](*arguments)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # imports a great deal, already loaded by now

            if not isinstance(error, TorchDynamoException):
                raise
            reason = " ".join(str(error).strip().splitlines()[:2])
            warnings.warn(f"{function.__name__} runs uncompiled: {reason}", stacklevel=2)
            _plain_because[function.__name__] = reason
            return function(*arguments)

    run.variants = variants  # type: ignore[attr-defined]
    return run


def _fixed(argument: Any, token_axis: int | None) -> Any:
    """What a kernel is compiled for: of a tensor everything but its number of tokens, though one token is a case apart."""
    if not isinstance(argument, Tensor):
        return argument
    shape = list(argument.shape)
    if token_axis is not None:
        shape[token_axis] = min(shape[token_axis], 2)
    return argument.dtype, argument.device, argument.is_inference(), tuple(shape)


@cache
def pieces() -> Pieces:
    """The compiled pieces, one set for all models of a process."""
    return Pieces(compiler(modulated_norm, NORM_AXES), compiler(real_heads, HEADS_AXES), pair_table)


@cache
def philox() -> noise.Philox:
    """The compiled `noise.philox4x32`."""
    return compiler(noise.philox4x32)


@cache
def draws() -> noise.Draws:
    """Draws whose integer arithmetic is the compiled `philox`."""
    return noise.Draws(
        functools.partial(noise.uniform, philox=philox()), functools.partial(noise.normal, philox=philox())
    )


def compiled(transformer: Model, chained: Chained | None = None) -> Model:
    """The transformer with compiled pieces; every tensor is shared with the given one.

    Args:
        chained: also pieces across sublayers, for models that can use them.
    """
    copied = variant(transformer, lambda name, module: None)
    own = pieces() if chained is None else dataclasses.replace(pieces(), chained=chained)
    for part in copied.modules():
        if hasattr(part, "pieces"):
            part.pieces = own  # type: ignore[assignment]
    return copied
