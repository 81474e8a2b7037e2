"""What a card can do, found out by a small trial of each: recorded graphs, compiled pieces, kernels, 16 and 8 bits, attention.

Every check compares with what eager gives on the same card, so a driver or compiler that computes wrongly shows up, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stagevar.errors import first_line
from stagevar.profile.engine_choice import TOLERANCE

if TYPE_CHECKING:
    from stagevar.models.base import LoadedModel
    from stagevar.sampling.sampler import Sampler

_ENGINES = ("graph", "compiled", "graph-kernels")
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        fault: why it cannot be used; None if it can.
    """

    name: str
    fault: str | None


def selftest(model: LoadedModel, build: Callable[[str], Sampler] | None = None) -> Iterator[Check]:
    """Tries everything on the model's device; takes seconds with a tiny model.

    Args:
        model: a small one, on the card.
        build: makes a sampler, given an engine's name.
    """
    yield _tried("bfloat16", lambda: _bfloat16(model.device))
    for precision in ("int8", "fp8"):
        yield _tried(f"8-bit products, {precision}", partial(_eight_bits, precision, model.device))
    for name, backend in _BACKENDS.items():
        yield _tried(f"attention, {name}", partial(_attention, backend, model.device))
    images = _Images(model, build)
    for name in _ENGINES:
        yield _tried(f"engine {name}", partial(images.fault, name))


def _tried(name: str, check: Callable[[], str | None]) -> Check:
    try:
        return Check(name, check())
    except Exception as error:  # compilers, drivers and libraries have no common base
        return Check(name, first_line(error))


def _bfloat16(device: torch.device) -> str | None:
    a_NN = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    difference = float((a_NN.bfloat16() @ a_NN.bfloat16() - a_NN @ a_NN).abs().max())
    return None if difference < 0.5 else f"a product is off by {difference:.3g}"


def _eight_bits(precision: str, device: torch.device) -> str | None:
    from stagevar.models.precision import refused_because

    return refused_because(precision, device)


def _attention(backend: SDPBackend, device: torch.device) -> str | None:
    q = torch.linspace(-1, 1, 2 * 300 * 128, device=device, dtype=torch.bfloat16).reshape(1, 2, 300, 128)
    with sdpa_kernel([SDPBackend.MATH]):
        expected = F.scaled_dot_product_attention(q, q, q).float()
    with sdpa_kernel([backend]):
        difference = float((F.scaled_dot_product_attention(q, q, q).float() - expected).abs().max())
    return None if difference < 0.05 else f"off by {difference:.3g}"


class _Images:
    """One image of every engine against eager's."""

    def __init__(self, model: LoadedModel, build: Callable[[str], Sampler] | None):
        from stagevar.sampling.sampler import Sampler
        from stagevar.schedule import exact

        self.build = build or (lambda name: Sampler(model, engine=name))
        self.steps = exact(len(model.grids)).expand(model.grids, len(model.transformer.chunk_layers))
        self._eager: np.ndarray | None = None

    def fault(self, name: str) -> str | None:
        """Why an engine's image is not eager's, None if it is."""
        from stagevar.engine import fell_back_because

        if self._eager is None:
            self._eager = self._image(self.build("eager"))
        sampler = self.build(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of falling back, which is told below
            images = [self._image(sampler) for _ in range(2)]  # recorded, then replayed
        why = fell_back_because(sampler.engine)
        if why is not None:
            return f"falls back to eager: {why}"
        worst = max(float(abs(image - self._eager).mean() / 255) for image in images)
        return None if worst <= TOLERANCE else f"its image differs from eager's by {100 * worst:.1f} %"

    def _image(self, sampler: Sampler) -> np.ndarray:
        try:
            return sampler.generate(["a"], [0], self.steps).astype("float32")
        finally:
            sampler.release()
