"""The same model carried out differently: a copy of the module tree that shares every tensor, with some parts exchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)
#: (name below the root, module) -> what stands in its place, None to look inside it.
Exchange = Callable[[str, nn.Module], "nn.Module | None"]


def variant(module: Module, exchange: Exchange, name: str = "") -> Module:
    """A copy whose parts are new objects over the same parameters and buffers, except what `exchange` replaces."""
    copied = copy.copy(module)
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    copied._modules = {}
    for child_name, child in module._modules.items():
        path = f"{name}.{child_name}" if name else child_name
        copied._modules[child_name] = None if child is None else exchange(path, child) or variant(child, exchange, path)
    return copied
