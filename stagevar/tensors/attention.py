"""Which of a card's attention kernels a call takes.

Flash attention refuses any mask, so a library that tries cuDNN next gives it every masked call, and cuDNN builds a plan of
0.2 to 0.5 s for each new shape: cross-attention has one per scale and text bucket. Therefore masked calls never go there.
Unmasked calls with many queries may, if timings favor it: their shapes are few, because all layers have one capacity.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stagevar.errors import UsageError

#: Attention kernels of a card by name.
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Queries above which an unmasked call may go to cuDNN: below, a plan saves less than a launch takes.
MANY_QUERIES = 256
#: Tried in this order by small and by masked calls; the first that can run is taken.
_ORDER = ("flash", "efficient", "math")
_preferred = "flash"


def prefer_attention(name: str) -> None:
    """Puts a kernel first for this process: flash (the default), cudnn, efficient or math. Raises UsageError.

    cudnn is for unmasked calls of more than MANY_QUERIES queries; all others take the default order.
    """
    global _preferred
    if name not in _KERNELS:
        raise UsageError(f"unknown attention {name!r}; use {', '.join(_KERNELS)}")
    _preferred = name


def order_of(masked: bool, queries: int) -> list[str]:
    """The kernels that a call may take; the first that can run is taken."""
    large = not masked and queries > MANY_QUERIES
    first = [_preferred] if _preferred != "cudnn" or large else []
    return list(dict.fromkeys([*first, *_ORDER]))


def attention_kernels(device: torch.device) -> AbstractContextManager[object]:
    """Fixes the order in which a card's attention kernels are tried, instead of the library's current order."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([_KERNELS[name] for name in order_of(masked=True, queries=1)], set_priority=True)


def attend(
    q_RHLc: Tensor, k_RHMc: Tensor, v_RHMc: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention (R, H, L, c) of queries to keys; inside `attention_kernels`, with the kernels of `order_of`.

    Args:
        bias: added to the scores, broadcast to (R, H, L, M); or a boolean mask.
        scale: of the scores; 1 / sqrt(c) by default.
    """
    large = bias is None and q_RHLc.shape[2] > MANY_QUERIES
    if _preferred == "cudnn" and large and q_RHLc.device.type == "cuda":
        kernels = [_KERNELS[name] for name in order_of(masked=False, queries=q_RHLc.shape[2])]
        with sdpa_kernel(kernels, set_priority=True):
            return F.scaled_dot_product_attention(q_RHLc, k_RHMc, v_RHMc, scale=scale)
    return F.scaled_dot_product_attention(q_RHLc, k_RHMc, v_RHMc, attn_mask=bias, scale=scale)
