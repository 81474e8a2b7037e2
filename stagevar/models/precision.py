"""The blocks' matrix products in 8 bits, for the scales whose step asks for it.

Weights are quantized once, a scale per output channel; activations on the fly, a scale per token. Products run on
integer (torch._int_mm) or float8 e4m3 (torch._scaled_mm) units, which have about twice the rate of bfloat16 on cards of
compute capability 8.9 and later. On a CPU the same functions run, slowly: they check the logic. Norms, attention,
embeddings and the head are unchanged.

Source: LLM.int8() (arXiv 2208.07339) for scales per row and column; no outlier columns are kept apart here.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stagevar.errors import UsageError, reason_of
from stagevar.models.variants import variant

if TYPE_CHECKING:
    from stagevar.models.base import NextScaleModel

Model = TypeVar("Model", bound="NextScaleModel")
#: Layers that a scale runs on its tokens, by the last part of their name. Others inside blocks see the text once.
_PRODUCTS = ("mat_qkv", "qkv_proj", "mat_q", "proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
#: Rows that integer products need at least on a GPU.
_LEAST_ROWS = 17


def quantize(x_NK: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(values in 8 bits, float32 scales (N, 1)) of rows, largest magnitude at the end of the range; x = values * scales."""
    x_NK = x_NK.float()
    scale_N1 = x_NK.abs().amax(1, keepdim=True).clamp_min(1e-12) / _LARGEST[precision]
    values = x_NK / scale_N1
    return (values.round() if precision == "int8" else values).to(_DTYPES[precision]), scale_N1


class LowPrecisionLinear(nn.Module):
    """A linear layer whose product runs in 8 bits; input and output have the plain layer's precision.

    Args:
        layer: the plain layer; its bias is kept.
        precision: "int8" or "fp8".
    """

    values_NK: Tensor
    scale_1N: Tensor

    def __init__(self, layer: nn.Linear, precision: str):
        super().__init__()
        self.precision, self.dtype, self.bias = precision, layer.weight.dtype, layer.bias
        values_NK, scale_N1 = quantize(layer.weight.detach(), precision)
        self.register_buffer("values_NK", values_NK, persistent=False)
        self.register_buffer("scale_1N", scale_N1.t().contiguous(), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `linear` of the plain layer; x is (..., K)."""
        x_MK, scale_M1 = quantize(x.flatten(0, -2), self.precision)
        weight_KN = self.values_NK.t()
        if self.precision == "fp8":
            # Scales per row and column come with bfloat16 results only.
            y_MN = torch._scaled_mm(x_MK, weight_KN, scale_M1, self.scale_1N, out_dtype=torch.bfloat16).float()
        else:
            missing = max(0, _LEAST_ROWS - x_MK.shape[0])
            product_MN = torch._int_mm(F.pad(x_MK, (0, 0, 0, missing)) if missing else x_MK, weight_KN)
            y_MN = product_MN[: x_MK.shape[0]] * scale_M1 * self.scale_1N
        bias = self.bias if bias is None else bias
        y_MN = y_MN if bias is None else y_MN + bias
        return y_MN.to(self.dtype).unflatten(0, x.shape[:-1])


@cache
def refused_because(precision: str, device: torch.device) -> str | None:
    """Why a device cannot multiply in 8 bits, found by a small test product; None if it can."""
    layer = nn.Linear(64, 32, device=device, dtype=torch.bfloat16)
    x_NK = torch.linspace(-1, 1, 32 * 64, device=device).reshape(32, 64).to(torch.bfloat16)
    try:
        with torch.inference_mode():
            ours, plain = LowPrecisionLinear(layer, precision)(x_NK).float(), layer(x_NK).float()
    except RuntimeError as error:  # libraries refuse by card and by version, each in its own words
        return reason_of(error)
    if not bool((ours - plain).abs().max() <= 0.1 * plain.abs().max()):
        return "its products are wrong"
    return None


def low_precision(transformer: Model, precision: str) -> Model:
    """The transformer with the products of its blocks in 8 bits; everything else is shared with the given one.

    Raises:
        UsageError: if the device has no units for them.
    """
    device = next(transformer.parameters()).device
    why = refused_because(precision, device) if device.type == "cuda" else None
    if why is not None:
        card = torch.cuda.get_device_name(device)
        raise UsageError(f"precision {precision} cannot run on {card} ({why}); use precision model")

    def exchange(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Linear) and is_quantizable(name, module):
            return LowPrecisionLinear(module, precision)
        return None

    return variant(transformer, exchange)


def is_quantizable(name: str, module: nn.Module) -> bool:
    """Whether a part of a transformer, by its full name, is a product that 8 bits apply to."""
    inside = name.startswith(("blocks.", "block_chunks."))
    return inside and isinstance(module, nn.Linear) and name.rpartition(".")[2] in _PRODUCTS
