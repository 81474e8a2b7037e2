"""One file per acceleration method, all behind `base.Accelerator`."""

from stagevar.accelerators.base import Accelerator
from stagevar.accelerators.exact import Exact
from stagevar.accelerators.stagevar import StageVAR

__all__ = ["Accelerator", "Exact", "StageVAR"]
