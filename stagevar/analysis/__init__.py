"""What `stagevar analyze` and `stagevar refit` find out about a model, and the schedule that it proposes for it."""

from stagevar.analysis.measure import analyze, nano_inputs
from stagevar.analysis.result import Analysis, load_proposal
from stagevar.analysis.similarity import SIMILARITIES, Similarity, find_similarity

__all__ = ["SIMILARITIES", "Analysis", "Similarity", "analyze", "find_similarity", "load_proposal", "nano_inputs"]
