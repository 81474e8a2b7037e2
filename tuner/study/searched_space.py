"""What a search has seen of its space, counted from its ledger."""

from __future__ import annotations

from stagevar.schedule import Steps
from tuner.config.coverage import SpaceCoverage, coverage
from tuner.evaluation.step_costs import StepCosts
from tuner.study.ledger import Ledger


def coverage_of(ledger: Ledger, table: StepCosts, seed: int) -> SpaceCoverage:
    """What was tried of a space, and what the budget excludes according to trusted step costs."""
    grids = ledger.facts.grids
    tried = [
        c.params or ledger.space.nearest_values(ledger.schedules[c.key], grids) for c in ledger.candidates.values()
    ]
    predicts = table.trusted

    def ratio(steps: Steps) -> float | None:
        return table.predict(steps).ratio if predicts and table.covers(steps) else None

    known = ledger.baseline is not None and ledger.baseline.latency is not None
    budget = ledger.budget_ratio if known else 1.0
    return coverage(ledger.space, grids, ledger.facts.chunks, tried, ratio, budget, seed)
