"""The same model carried out differently: a copy of the module tree that shares every tensor, some parts exchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

#: (name below the root, module) -> what stands in its place, None to look inside it.
Exchange = Callable[[str, nn.Module], "nn.Module | None"]


def variant(module: nn.Module, exchange: Exchange, name: str = "") -> nn.Module:
    """A copy whose parts are new objects over the same parameters and buffers, except what `exchange` replaces."""
    replaced = exchange(name, module)
    if replaced is not None:
        return replaced
    copied = copy.copy(module)
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    copied._modules = {
        child_name: None if child is None else variant(child, exchange, f"{name}.{child_name}" if name else child_name)
        for child_name, child in module._modules.items()
    }
    return copied
