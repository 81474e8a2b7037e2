"""What `stagevar analyze` and `stagevar refit` find out about a model, and the schedule that it proposes for it."""

from stagevar.analysis.measure import (
    SIMILARITIES,
    Analysis,
    Similarity,
    analyze,
    find_similarity,
    load_proposal,
    nano_inputs,
)

__all__ = ["SIMILARITIES", "Analysis", "Similarity", "analyze", "find_similarity", "load_proposal", "nano_inputs"]
