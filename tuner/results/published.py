"""Figures that the StageVAR paper publishes, for reference beside our own measurements. Data only.

Source: arXiv 2512.16483, main comparison table. Latency is on a GPU that the paper does not name, so only
speed-ups carry over. A row from another paper names it. `None` means that the paper gives no figure.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2512.16483"


@dataclass(frozen=True)
class Published:
    """One row: latency of one image in seconds, speed-up over the model's own full run, GenEval and DPG overall.

    `source` names the paper of a row that is not from SOURCE.
    """

    name: str
    latency_s: float | None
    speedup: float | None
    geneval: float | None
    dpg: float | None
    parameters: str = ""
    source: str = ""


#: model name as registered -> its full run first, then the accelerated ones
METHODS: dict[str, tuple[Published, ...]] = {
    "infinity-2b": (
        Published("Infinity-2B", 2.20, 1.0, 0.73, 83.12, "2B"),
        Published("FastVAR", 0.80, 2.75, 0.72, 82.86),
        Published("SkipVAR", None, 2.62, 0.72, 83.16),
        Published("StageVAR", 0.64, 3.4, 0.72, 82.86),
    ),
    "infinity-8b": (
        Published("Infinity-8B", 4.80, 1.0, 0.79, 86.60, "8B"),
        Published("StageVAR", 1.77, 2.7, 0.78, 86.05),
    ),
    "star-1.7b": (
        Published("STAR-1.7B", 2.00, 1.0, 0.51, None, "1.7B"),
        Published("StageVAR", 1.15, 1.74, 0.51, None),
    ),
    "hart-0.7b": (
        Published("HART-0.7B", 0.95, 1.0, 0.51, 80.89, "0.7B"),
        Published("FastVAR", None, 1.5, None, None, source="arXiv 2503.23367"),
    ),
}

GENERATORS: tuple[Published, ...] = (
    Published("SDXL", 4.3, None, 0.55, 74.65, "2.6B"),
    Published("LlamaGen", 37.7, None, 0.32, 65.16, "0.8B"),
    Published("Show-o", 50.3, None, 0.68, 67.48, "1.3B"),
    Published("PixArt-Sigma", 2.7, None, 0.55, 80.54, "0.6B"),
    Published("HART", 0.95, None, 0.51, 80.89, "0.7B"),
    Published("DALL-E 3", None, None, 0.67, 83.50, ""),
    Published("Emu3", None, None, 0.66, 81.60, "8.5B"),
)


def methods_for(model: str) -> tuple[Published, ...]:
    """The paper's rows for a model, its full run first; empty if the paper does not have the model."""
    return METHODS.get(model.lower(), ())
