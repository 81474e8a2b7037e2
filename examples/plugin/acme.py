"""A metric, an accelerator, a model and a similarity that a package of your own could offer; test_acme.py checks them.

pip install ./examples/plugin
stagevar-tune doctor                         # lists the four
stagevar-tune --model nano --budget 75% --space examples/plugin/space.yaml
"""

import dataclasses

import numpy as np
import torch

from stagevar.accelerators.base import Accelerator
from stagevar.accelerators.stagevar import gather_rows, restore
from stagevar.analysis import Similarity
from stagevar.models.registry import find
from tuner.metrics.base import Metric
from tuner.metrics.declarations import Declaration


class Sharpness(Metric):
    """Mean absolute difference of neighboring pixels, in levels of 255."""

    name = "sharpness"
    declaration = Declaration("bounded", "levels", 255.0, 2.0)

    def __init__(self, device: str = "cpu", step: int = 1):
        self.step = step

    def _score(self, images_uint8_BHW3, prompts, reference_images_uint8_BHW3):
        images_BHW3 = images_uint8_BHW3.astype(np.float64)
        down = np.abs(images_BHW3[:, self.step :] - images_BHW3[:, : -self.step]).mean(axis=(1, 2, 3))
        across = np.abs(images_BHW3[:, :, self.step :] - images_BHW3[:, :, : -self.step]).mean(axis=(1, 2, 3))
        return (down + across) / 2

    def describe(self):
        return {"name": self.name, "step": self.step}


class Spread(Accelerator):
    """Runs a sublayer on tokens spread evenly over the scale; the others repeat the cache scale's output."""

    name = "spread"

    def around(self, context, updates):
        step = context.step

        def around(site, x_RLC, positions, run):
            rows, tokens = x_RLC.shape[:2]
            index_k = torch.linspace(0, tokens - 1, step.reduction.kept, device=x_RLC.device).round().long()
            index_Rk = index_k.expand(rows, -1)
            y_RkC = run(gather_rows(x_RLC, index_Rk), index_Rk)
            return restore(y_RkC, index_Rk, context.state[site].resized(step.grid, step.branches))

        return around


NANO_WARM = dataclasses.replace(
    find("nano"), name="nano-warm", summary="nano, sampled a little warmer at every scale", temperature=1.1
)


def palette(device: str = "cpu") -> Similarity:
    """Overlap of the two images' color histograms, 8 levels per channel."""

    def histogram_B(images_BHW3):
        cells_BN = (images_BHW3 // 32).astype(np.int64).reshape(len(images_BHW3), -1, 3) @ np.array([64, 8, 1])
        return np.stack([np.bincount(cells_N, minlength=512) / len(cells_N) for cells_N in cells_BN])

    def score(images_BHW3, finals_BHW3):
        return np.minimum(histogram_B(images_BHW3), histogram_B(finals_BHW3)).sum(axis=1)

    return Similarity("palette", score, "semantic")
