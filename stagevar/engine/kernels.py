"""What runs between a block's matrix products, as Triton kernels, each next to its plain PyTorch twin.

A block of Infinity is memory traffic around products. Two kernels carry all of it: `gated_norm` adds a sublayer's gated
output to the residual stream and gives the next sublayer's normed input, reading the stream once; `heads_into_cache` takes
the output of the qkv product and writes k and v where the KV cache keeps them, so that only q is a separate tensor.

The twins are the definition: on a CPU they run, and the kernels are tested against them in Triton's interpreter. Arithmetic
is float32 whatever the inputs are. Triton comes with torch's builds for CUDA only; without it `triton` is None here and
`available` says why.

Source: `modulated_norm`, `cosine_heads` and `rotate` of stagevar.models.layers; differs in rounding only, at the
places where these keep a value in the products' precision.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.tensors import noise

if TYPE_CHECKING:
    from stagevar.models.layers import Chained

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without
    triton = tl = None

#: Added to the variance by every norm of the blocks.
NORM_EPS = 1e-6
#: Least length that a head is divided by.
LEAST_LENGTH = 1e-12
#: Heads of one token that a program of `heads_into_cache` takes, if the model's number is a multiple of it.
_HEADS_AT_ONCE = 4


def available() -> str | None:
    """Why the kernels cannot run in this process, None if they can."""
    if triton is None:
        return "Triton is not installed; torch's builds for CUDA bring it"
    return None if torch.cuda.is_available() else "there is no CUDA device"


# -------------------------------------------------------------------------------------------------- gate, residual, norm


def gated_norm_twin(
    x_RLC: Tensor,
    update_RLC: Tensor | None,
    gate_R1C: Tensor | None,
    scale_R1C: Tensor,
    shift_R1C: Tensor,
    plus_one: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The residual stream with a sublayer's output added, and the next sublayer's input.

    Args:
        x_RLC: the stream, float32. update_RLC: the sublayer's output in any precision; None adds nothing and returns x.
        gate_R1C: factor of the update, float32; None is one.
        scale_R1C, shift_R1C: applied to the norm, float32, R rows or one for all.
        plus_one: whether the factor is 1 + scale (modulation) or scale itself (a norm's own weight).
        dtype: of the second result.

    Returns x + update * gate, float32 (R, L, C), and its layer norm times the factor plus the shift, in dtype (R, L, C).
    """
    if update_RLC is not None:
        x_RLC = x_RLC + (update_RLC.float() if gate_R1C is None else update_RLC.float() * gate_R1C)
    normed_RLC = F.layer_norm(x_RLC, x_RLC.shape[-1:], eps=NORM_EPS)
    return x_RLC, torch.addcmul(shift_R1C, normed_RLC, 1 + scale_R1C if plus_one else scale_R1C).to(dtype)


def _gated_norm_kernel(
    x_ptr,
    update_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    sum_ptr,
    normed_ptr,
    tokens,
    gate_stride,
    scale_stride,
    shift_stride,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    UPDATE: tl.constexpr,
    GATE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    # A program takes one token. Offsets of whole tensors may exceed 32 bits at batch 16.
    token = tl.program_id(0).to(tl.int64)
    row = token // tokens
    column = tl.arange(0, BLOCK)
    inside = column < C
    x = tl.load(x_ptr + token * C + column, mask=inside, other=0.0)
    if UPDATE:
        update = tl.load(update_ptr + token * C + column, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            update = update * tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
        x = x + update
        tl.store(sum_ptr + token * C + column, x, mask=inside)
    mean = tl.sum(x, axis=0) / C
    centered = tl.where(inside, x - mean, 0.0)
    normed = centered * (1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / C + EPS))
    scale = tl.load(scale_ptr + row * scale_stride + column, mask=inside, other=0.0)
    if PLUS_ONE:
        scale = scale + 1.0
    normed = normed * scale + tl.load(shift_ptr + row * shift_stride + column, mask=inside, other=0.0)
    tl.store(normed_ptr + token * C + column, normed.to(normed_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------- unit length, rotation, cache write


def heads_into_cache_twin(
    qkv_RL3C: Tensor, factor_H: Tensor, cos_sin: Tensor | None, keys_RHLc: Tensor, values_RHLc: Tensor
) -> Tensor:
    """Writes the keys and values of one scale and returns its queries (R, H, L, c), laid out as (R, L, H, c).

    Args:
        qkv_RL3C: output of the qkv product, bias included. factor_H: factor of q per head, float32.
        cos_sin: rotary table, (2, L, c/2) or per row (2, R, L, c/2), float32; None: no rotation.
        keys_RHLc, values_RHLc: where to write, views into the KV cache with adjacent channels.

    q and k have unit length and are rotated in interleaved pairs. All three are in the precision of keys_RHLc.
    """
    rows, tokens, _ = qkv_RL3C.shape
    heads = len(factor_H)
    qkv = qkv_RL3C.view(rows, tokens, 3, heads, -1)
    qk = F.normalize(qkv[:, :, :2].float(), dim=-1, eps=LEAST_LENGTH)
    if cos_sin is not None:
        cos, sin = cos_sin.unbind(0)
        shape = (-1, tokens, 1, 1, cos.shape[-1])
        cos, sin = cos.view(shape), sin.view(shape)
        even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
        qk = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    keys_RHLc.copy_(qk[:, :, 1].transpose(1, 2))
    values_RHLc.copy_(qkv[:, :, 2].transpose(1, 2))
    return (qk[:, :, 0] * factor_H[:, None]).to(keys_RHLc.dtype).transpose(1, 2)


def _heads_into_cache_kernel(
    qkv_ptr,
    factor_ptr,
    table_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    tokens,
    table_row_stride,
    table_sin_stride,
    keys_row_stride,
    keys_head_stride,
    values_row_stride,
    values_head_stride,
    HEADS: tl.constexpr,
    c: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LEAST: tl.constexpr,
    ROTATE: tl.constexpr,
):
    # A program takes some heads of one token, so that the token's angles are read once for all of them.
    token = tl.program_id(0).to(tl.int64)
    row, place = token // tokens, token % tokens
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    channel = tl.arange(0, c)[None, :]
    inner = head * c + channel
    start = qkv_ptr + token * (3 * HEADS * c) + inner
    q = tl.load(start).to(tl.float32)
    k = tl.load(start + HEADS * c).to(tl.float32)
    v = tl.load(start + 2 * HEADS * c)
    q = q / tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), LEAST)[:, None]
    k = k / tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), LEAST)[:, None]
    if ROTATE:
        pair = tl.arange(0, c // 2)[None, :]
        angles = table_ptr + row * table_row_stride + place * (c // 2) + pair
        cos, sin = tl.load(angles), tl.load(angles + table_sin_stride)
        q_even, q_odd = tl.split(tl.reshape(q, (AT_ONCE, c // 2, 2)))
        k_even, k_odd = tl.split(tl.reshape(k, (AT_ONCE, c // 2, 2)))
        q = tl.reshape(tl.join(q_even * cos - q_odd * sin, q_even * sin + q_odd * cos), (AT_ONCE, c))
        k = tl.reshape(tl.join(k_even * cos - k_odd * sin, k_even * sin + k_odd * cos), (AT_ONCE, c))
    q = q * tl.load(factor_ptr + head)
    stored = keys_ptr.dtype.element_ty
    tl.store(q_ptr + token * (HEADS * c) + inner, q.to(stored))
    # The cache's rows and heads are far apart: with 32 bits their offsets overflow for 8B at batch 16.
    wide = head.to(tl.int64)
    tl.store(keys_ptr + row * keys_row_stride + wide * keys_head_stride + place * c + channel, k.to(stored))
    tl.store(values_ptr + row * values_row_stride + wide * values_head_stride + place * c + channel, v.to(stored))


# ------------------------------------------------------------------------------------------------------------------ draws


def _draws_kernel(
    keys_ptr,
    words_ptr,
    out_ptr,
    count,
    pairs,
    draw0,
    draw1,
    NORMAL: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Every draw makes its own words: integer units are idle anyway, and what is stored is four times what is read.
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if NORMAL:
        pair = tl.where(place < pairs, place, place - pairs)
        at = pair[:, None] + pairs * tl.arange(0, 2)[None, :]
    else:
        at = place
    k0 = tl.load(keys_ptr + 2 * row).to(tl.uint32)
    k1 = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32)
    zero = (at * 0).to(tl.uint32)
    c0 = (at // 4).to(tl.uint32)
    c1 = zero
    if WORDS:
        c1 = zero + tl.load(words_ptr + row).to(tl.uint32)
    c2 = zero + draw0.to(tl.uint32)
    c3 = zero + draw1.to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, zero + 0xD2511F53)
        low0 = c0 * (zero + 0xD2511F53)
        high1 = tl.umulhi(c2, zero + 0xCD9E8D57)
        low1 = c2 * (zero + 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    lane = at % 4
    word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    if NORMAL:
        first, second = tl.split(uniform)
        radius = tl.sqrt(-2.0 * tl.log(first))
        angle = 6.283185307179586 * second
        value = radius * tl.where(place < pairs, tl.cos(angle), tl.sin(angle))
    else:
        value = uniform
    tl.store(out_ptr + row * count + place, value, mask=place < count)


if triton is not None:
    gated_norm_kernel = triton.jit(_gated_norm_kernel)
    heads_into_cache_kernel = triton.jit(_heads_into_cache_kernel)
    # Draws differ in these alone: one compiled kernel for all.
    draws_kernel = triton.jit(_draws_kernel, do_not_specialize=["count", "pairs", "draw0", "draw1"])


# --------------------------------------------------------------------------------------------------------------- launches


def gated_norm_launch(kernel, x_RLC, update_RLC, gate_R1C, scale_R1C, shift_R1C, plus_one, dtype):
    """`gated_norm_twin` by a kernel: `gated_norm_kernel`, or the same interpreted. x_RLC and update_RLC are contiguous."""
    rows, tokens, width = x_RLC.shape
    normed_RLC = torch.empty_like(x_RLC, dtype=dtype)
    sum_RLC = x_RLC if update_RLC is None else torch.empty_like(x_RLC)
    block = 1 << (width - 1).bit_length()
    kernel[(rows * tokens,)](
        x_RLC,
        x_RLC if update_RLC is None else update_RLC,
        scale_R1C if gate_R1C is None else gate_R1C,
        scale_R1C,
        shift_R1C,
        sum_RLC,
        normed_RLC,
        tokens,
        0 if gate_R1C is None else _row_stride(gate_R1C),
        _row_stride(scale_R1C),
        _row_stride(shift_R1C),
        C=width,
        BLOCK=block,
        EPS=NORM_EPS,
        UPDATE=update_RLC is not None,
        GATE=gate_R1C is not None,
        PLUS_ONE=plus_one,
        num_warps=gated_norm_warps(width),
    )
    return sum_RLC, normed_RLC


def gated_norm_warps(width: int) -> int:
    """Warps that leave a thread some 16 channels: enough for wide loads, few enough for registers."""
    return max(1, min(8, (1 << (width - 1).bit_length()) // 512))


def heads_into_cache_launch(kernel, qkv_RL3C, factor_H, cos_sin, keys_RHLc, values_RHLc):
    """`heads_into_cache_twin` by a kernel; qkv_RL3C is contiguous, c a power of two, tables have adjacent tokens."""
    rows, tokens, width = qkv_RL3C.shape
    heads = len(factor_H)
    c = width // 3 // heads
    at_once = heads_at_once(heads)
    q_RLHc = torch.empty((rows, tokens, heads, c), dtype=keys_RHLc.dtype, device=qkv_RL3C.device)
    kernel[(rows * tokens, heads // at_once)](
        qkv_RL3C,
        factor_H,
        qkv_RL3C if cos_sin is None else cos_sin,
        q_RLHc,
        keys_RHLc,
        values_RHLc,
        tokens,
        0 if cos_sin is None or cos_sin.ndim == 3 else cos_sin.stride(1),
        0 if cos_sin is None else cos_sin.stride(0),
        keys_RHLc.stride(0),
        keys_RHLc.stride(1),
        values_RHLc.stride(0),
        values_RHLc.stride(1),
        HEADS=heads,
        c=c,
        AT_ONCE=at_once,
        LEAST=LEAST_LENGTH,
        ROTATE=cos_sin is not None,
        num_warps=1,
    )
    return q_RLHc.transpose(1, 2)


#: Draws of one program.
DRAWS_AT_ONCE = 512


def draws_launch(kernel, key_R2, count, draw, word_R1=0, normal=False):
    """`noise.uniform` or `noise.normal` by a kernel: the same bits, or up to the rounding of a logarithm and a cosine."""
    words = isinstance(word_R1, Tensor)
    if not words and word_R1:
        word_R1, words = torch.full_like(key_R2[:, :1], word_R1), True
    out_RN = torch.empty(len(key_R2), count, dtype=torch.float32, device=key_R2.device)
    key_R2 = key_R2.contiguous()
    kernel[(-(-count // DRAWS_AT_ONCE), len(key_R2))](
        key_R2,
        word_R1 if words else key_R2,
        out_RN,
        count,
        -(-count // 2),
        *draw,
        NORMAL=normal,
        WORDS=words,
        BLOCK=DRAWS_AT_ONCE,
    )
    return out_RN


def gelu_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """A layer and a tanh-approximated GELU; on a card of a plain layer the second is part of the product."""
    if not isinstance(layer, nn.Linear) or x.device.type != "cuda":
        from stagevar.models.layers import linear

        return F.gelu(linear(x, layer), approximate="tanh")
    product = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return product.unflatten(0, x.shape[:-1])


def chained() -> Chained:
    """The kernels that a block of Infinity is chained of."""
    from stagevar.models.layers import Chained

    return Chained(
        functools.partial(gated_norm_launch, gated_norm_kernel),
        functools.partial(heads_into_cache_launch, heads_into_cache_kernel),
        gelu_linear,
    )


def draws() -> noise.Draws:
    """Draws by one kernel each."""
    return noise.Draws(
        functools.partial(draws_launch, draws_kernel), functools.partial(draws_launch, draws_kernel, normal=True)
    )


def heads_at_once(heads: int) -> int:
    """Heads per program: a power of two that divides their number."""
    return next(n for n in (_HEADS_AT_ONCE, 2, 1) if heads % n == 0)


def _row_stride(x_R1C: Tensor) -> int:
    """Elements between rows, 0 where one row serves all."""
    return 0 if x_R1C.shape[0] == 1 else x_R1C.stride(0)
