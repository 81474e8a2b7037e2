"""One file per acceleration method, all behind `base.Accelerator`."""

from stagevar.accelerators.base import Accelerator
from stagevar.accelerators.composite import Composite
from stagevar.accelerators.exact import Exact
from stagevar.accelerators.fastvar import FastVAR
from stagevar.accelerators.skipvar import SkipVAR
from stagevar.accelerators.stagevar import StageVAR

__all__ = ["Accelerator", "Composite", "Exact", "FastVAR", "SkipVAR", "StageVAR"]
