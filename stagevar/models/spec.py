"""What a row of the table of models states. Light data: importing this file imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stagevar.models.hub import HubFile
from stagevar.schedule.grids import Grid
from stagevar.schedule.published import PublishedSettings


@dataclass(frozen=True)
class ModelSpec:
    """One loadable model.

    Attributes:
        builder: "module:function" that takes a LoadRequest and returns a LoadedModel; imported on use.
        parts: "module:function" that takes a LoadRequest and returns the modules that files fill
            (stagevar.models.loading); empty for models that ship in the package. Used by conversion and memory
            estimates.
        resolutions: accepted values of `resolution`, the default first.
        guidance, temperature: defaults, a number or one per scale (guidance s as in u + s(c - u); VAR and STAR ramp up
            to a single number over their scales).
        weights, tokenizer, text: public files; None if there are none.
        settings: what the family's constructors need.
        scales: token grids of a resolution, square; None if only the loaded model knows them.
        published: the acceleration settings published for the family.
    """

    name: str
    family: str
    builder: str
    summary: str
    resolutions: tuple[str, ...]
    guidance: float | tuple[float, ...]
    temperature: float | tuple[float, ...]
    top_k: int = 0
    top_p: float = 0.0
    parts: str = ""
    weights: HubFile | None = None
    tokenizer: HubFile | None = None
    text: HubFile | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    scales: Callable[[str], tuple[Grid, ...]] | None = None
    published: PublishedSettings | None = None
