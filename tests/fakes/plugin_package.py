"""Packages as an installer leaves them: a module and a dist-info with entry points, in a folder for sys.path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: One object of each kind that a package can offer, and things that are wrong with some.
MODULE = '''
import dataclasses

import numpy as np

from stagevar.accelerators.base import Accelerator
from stagevar.accelerators.fastvar import pivotal_indices
from stagevar.accelerators.stagevar import gather_rows, restore
from stagevar.analysis import Similarity
from stagevar.models.registry import SPECS
from tuner.metrics.base import Metric
from tuner.metrics.declarations import Declaration


class Brightness(Metric):
    """Mean pixel value, 0 to 1."""

    name = "brightness"
    declaration = Declaration("bounded", "share of white", 1.0, 0.05)

    def __init__(self, device="cpu", gain: float = 1.0):
        self.gain = gain

    def _score(self, images_uint8_BHW3, prompts, reference_images_uint8_BHW3):
        return self.gain * images_uint8_BHW3.mean(axis=(1, 2, 3)) / 255


class NamedOtherwise(Brightness):
    name = "lightness"


class Undeclared(Brightness):
    name = "undeclared"
    declaration = None


class Turned(Brightness):
    name = "turned"
    declaration = dataclasses.replace(Brightness.declaration, higher_is_better=False)


class FirstTokens(Accelerator):
    """Runs a sublayer on its most deviating tokens; the others repeat the cache scale's output, halved."""

    name = "halving"

    def around(self, context, updates):
        step = context.step

        def around(site, x_RLC, positions, run):
            index_Rk = pivotal_indices(x_RLC, step.reduction.kept)
            old_RLC = context.state[site].resized(step.grid, step.branches)
            return restore(run(gather_rows(x_RLC, index_Rk), index_Rk), index_Rk, old_RLC / 2)

        return around


class NeedsArguments(FirstTokens):
    name = "demanding"

    def __init__(self, strength):
        self.strength = strength


HOT = dataclasses.replace(SPECS["nano"], name="nano-hot", temperature=1.2)


def closeness(device="cpu", power="1"):
    def score(images_BHW3, finals_BHW3):
        return 1 - np.abs(images_BHW3 / 255.0 - finals_BHW3 / 255.0).mean(axis=(1, 2, 3)) ** float(power)

    return Similarity("closeness", score, "structure")
'''
OFFERS = {
    "stagevar.metrics": {"brightness": "Brightness"},
    "stagevar.accelerators": {"halving": "FirstTokens"},
    "stagevar.models": {"nano-hot": "HOT"},
    "stagevar.similarities": {"closeness": "closeness"},
}


def install(folder: Path, package: str, offers: Mapping[str, Mapping[str, str]] = OFFERS, module: str = MODULE) -> Path:
    """Lays a package of one module into a folder, as installed; returns the folder. offers: group -> name -> object."""
    name = package.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = []
    for group, entries in offers.items():
        lines += [f"[{group}]", *(f"{key} = {name}:{target}" for key, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
