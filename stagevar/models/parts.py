"""A model before it has weights: its modules on the meta device, with how its files fill them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stagevar.models.base import Grid
from stagevar.models.checkpoint.key_rules import KeyRules
from stagevar.models.checkpoint.weights import Precision


@dataclass(frozen=True)
class Part:
    """One module that one file fills: built on the meta device, with the family's key rules and weight precision."""

    module: nn.Module
    rules: KeyRules
    precision: Precision


@dataclass(frozen=True)
class Parts:
    """A model's modules and the grids that they were built for.

    Attributes:
        text_bytes: the text encoder's size while it is loaded.
    """

    transformer: Part
    tokenizer: Part
    grids: tuple[Grid, ...]
    pixels: tuple[int, int]
    text_bytes: int = 0
