"""The plug-ins against the published contracts: python -m pytest examples/plugin"""

from acme import Sharpness, Spread, palette

from stagevar.testing.accelerators import PluggedContract
from stagevar.testing.similarities import SimilarityContract
from tuner.testing.metrics import MetricContract


class TestSharpness(MetricContract):
    """Values again and in any batch, their declared range, what does not fit refused."""

    def build(self):
        return Sharpness()


class TestSpread(PluggedContract):
    """Shapes, exactness where every token is kept, draws, rewinding, batches, every aspect ratio."""

    def plugged(self):
        return Spread()


class TestPalette(SimilarityContract):
    """Values of images, of themselves and of batches."""

    def similarity(self):
        return palette()
