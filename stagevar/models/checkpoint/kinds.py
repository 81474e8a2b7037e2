"""Which tensors can be weights: dense numbers in memory, of the kind (floating point, whole numbers) that the module has."""

from __future__ import annotations

import re

from torch import Tensor, dtype, strided

#: Numbers in a safetensors file by the letters before the number of bits; what is not listed is not a weight.
_SAFETENSORS = {"F": "floating point", "BF": "floating point", "I": "whole numbers", "U": "whole numbers"}


def kind_of(tensor: Tensor) -> str:
    """ "floating point", "whole numbers", or what keeps a tensor from being a weight."""
    for kind, holds in (
        ("nested", tensor.is_nested),
        ("quantized", tensor.is_quantized),
        ("sparse", tensor.layout != strided),
        ("without values (meta device)", tensor.is_meta),
    ):
        if holds:
            return kind
    return kind_of_dtype(tensor.dtype)


def kind_of_dtype(kind: dtype) -> str:
    """ "floating point", "whole numbers", or the name of a dtype that is neither."""
    if kind.is_floating_point:
        return "floating point"
    name = str(kind).removeprefix("torch.")
    return "whole numbers" if name.startswith(("int", "uint")) else name


def kind_in_safetensors(name: str) -> str:
    """The same from a dtype's name in a safetensors file, such as BF16 or BOOL."""
    letters = re.match(r"[A-Z]*", name)
    return _SAFETENSORS.get(letters.group() if letters else "", name.lower())
