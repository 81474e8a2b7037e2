"""What `stagevar analyze` and `stagevar refit` find out about a model, and the schedule that it proposes for it."""

from stagevar.analysis.measure import (
    SIMILARITIES,
    Similarity,
    analyze,
    find_similarity,
    nano_inputs,
)
from stagevar.analysis.result import Analysis, load_proposal

__all__ = ["SIMILARITIES", "Analysis", "Similarity", "analyze", "find_similarity", "load_proposal", "nano_inputs"]
